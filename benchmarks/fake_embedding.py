"""An embedding service without a model: a text's vector is drawn from its hash.

python -m benchmarks.fake_embedding --listen HOST:PORT
"""

import gzip
import zlib

import grpc
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from tworoads.v1 import embedding_pb2 as pb
from tworoads.v1.embedding_pb2_grpc import (
    EmbeddingServiceServicer,
    add_EmbeddingServiceServicer_to_server,
)

from services.runtime.server import run, running
from services.runtime.settings import ServerSettings

NAME = "tworoads.v1.EmbeddingService"
MODEL = pb.EmbeddingModel(name="fake", hash="fake", dimension=384, max_tokens=256, normalized=True)


class FakeEmbedding(EmbeddingServiceServicer):
    """Embeds faster than any model."""

    def __init__(self) -> None:
        words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        self._tokenizer = gzip.compress(words.to_str().encode())

    async def Embed(
        self, request: pb.EmbedRequest, context: grpc.aio.ServicerContext
    ) -> pb.EmbedResponse:
        vectors = [pb.Vector(values=_vector(text)) for text in request.texts]
        return pb.EmbedResponse(vectors=vectors, model_hash=MODEL.hash)

    async def GetModel(
        self, request: pb.EmbeddingServiceGetModelRequest, context: grpc.aio.ServicerContext
    ) -> pb.EmbeddingServiceGetModelResponse:
        return pb.EmbeddingServiceGetModelResponse(model=MODEL, tokenizer=self._tokenizer)


def _vector(text: str) -> list[float]:
    values = np.random.default_rng(zlib.crc32(text.encode())).standard_normal(MODEL.dimension)
    unit: list[float] = (values / np.linalg.norm(values)).tolist()
    return unit


async def main(settings: ServerSettings) -> None:
    async with running(settings, [NAME]) as server:
        service = FakeEmbedding()
        await server.serve(lambda s: add_EmbeddingServiceServicer_to_server(service, s))
        await server.until_stopped()


if __name__ == "__main__":
    chosen = ServerSettings(_cli_parse_args=True, _cli_kebab_case=True)  # type: ignore[call-arg]
    run(lambda: main(chosen), chosen)
