"""EmbeddingService: checks the request, asks the model, fills the response."""

import grpc
from tworoads.v1 import embedding_pb2 as pb
from tworoads.v1 import embedding_pb2_grpc as pb_grpc

from services.embedding.batcher import Batcher, Kind, Model
from services.runtime import tracing
from services.runtime.errors import InvalidInput

MAX_TEXTS = 256
MAX_CODE_POINTS = 65_536
KINDS = {pb.EMBED_KIND_QUERY: Kind.QUERY, pb.EMBED_KIND_DOCUMENT: Kind.DOCUMENT}


class EmbeddingService(pb_grpc.EmbeddingServiceServicer):
    """Embeds by way of `batcher`, which runs `model`."""

    def __init__(self, model: Model, batcher: Batcher) -> None:
        self._model = model
        self._batcher = batcher

    async def Embed(
        self, request: pb.EmbedRequest, context: grpc.aio.ServicerContext
    ) -> pb.EmbedResponse:
        texts = list(request.texts)
        _check(texts)
        if request.kind not in KINDS:
            raise InvalidInput("KIND_UNKNOWN", "kind must be EMBED_KIND_QUERY or _DOCUMENT")
        asked: dict[str, str | int | float] = {
            tracing.REQUEST_MODEL: self._model.name,
            tracing.DIMENSION: self._model.dimension,
            tracing.TEXTS: len(texts),
        }
        with tracing.span("embeddings", self._model.name, asked):
            vectors = await self._batcher.embed(KINDS[request.kind], texts)
        return pb.EmbedResponse(
            vectors=[pb.Vector(values=vector) for vector in vectors], model_hash=self._model.hash
        )

    async def GetModel(
        self, request: pb.EmbeddingServiceGetModelRequest, context: grpc.aio.ServicerContext
    ) -> pb.EmbeddingServiceGetModelResponse:
        return pb.EmbeddingServiceGetModelResponse(
            model=pb.EmbeddingModel(
                name=self._model.name,
                hash=self._model.hash,
                dimension=self._model.dimension,
                max_tokens=self._model.max_tokens,
                normalized=True,
            ),
            tokenizer=self._model.tokenizer if request.include_tokenizer else b"",
        )


def _check(texts: list[str]) -> None:
    if not texts:
        raise InvalidInput("TEXTS_EMPTY", "texts must have at least one entry")
    if len(texts) > MAX_TEXTS:
        message = f"texts may have at most {MAX_TEXTS} entries"
        raise InvalidInput("TOO_MANY_TEXTS", message, limit=str(MAX_TEXTS))
    for index, text in enumerate(texts):
        if not text:
            raise InvalidInput("TEXT_EMPTY", f"texts[{index}] is empty", index=str(index))
        if len(text) > MAX_CODE_POINTS:
            raise InvalidInput(
                "TEXT_TOO_LONG",
                f"texts[{index}] has more than {MAX_CODE_POINTS} code points",
                index=str(index),
                limit=str(MAX_CODE_POINTS),
            )
