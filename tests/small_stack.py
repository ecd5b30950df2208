"""The stack with models that need no library: what it says can be foretold, all else is real."""

import asyncio
import gzip
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from tworoads.v1 import embedding_pb2, generation_pb2
from tworoads.v1.answer_pb2_grpc import AnswerServiceStub, add_AnswerServiceServicer_to_server
from tworoads.v1.embedding_pb2_grpc import (
    EmbeddingServiceServicer,
    EmbeddingServiceStub,
    add_EmbeddingServiceServicer_to_server,
)
from tworoads.v1.evaluation_pb2_grpc import add_EvaluationServiceServicer_to_server
from tworoads.v1.generation_pb2_grpc import (
    GenerationServiceServicer,
    GenerationServiceStub,
    add_GenerationServiceServicer_to_server,
)
from tworoads.v1.retrieval_pb2_grpc import (
    RetrievalServiceStub,
    add_RetrievalServiceServicer_to_server,
)
from tworoads.v1.tuning_pb2_grpc import (
    TuningServiceStub,
    add_TuningServiceServicer_to_server,
)

from services.evaluation.asking import Gateway
from services.evaluation.comparison import Prices
from services.evaluation.comparisons import Comparisons
from services.evaluation.running import GatewayRunner
from services.evaluation.schema import SCHEMA
from services.evaluation.service import EvaluationService
from services.evaluation.uploads import Uploads
from services.gateway.forward import PUBLIC, Forwarder
from services.gateway.service import AnswerService
from services.retrieval.embedder import Embedder
from services.retrieval.parser import Parser
from services.retrieval.service import RetrievalService
from services.retrieval.stores.lancedb import LanceStore
from services.retrieval.stores.store import Store
from services.runtime.channel import connect
from services.runtime.database import Database
from services.runtime.gate import Gate, Open
from services.runtime.server import Server, running
from services.runtime.settings import ServerSettings
from tests.fake_tuning import TUNING, FakeTuning

ANSWERS = "tworoads.v1.AnswerService"
RETRIEVAL = "tworoads.v1.RetrievalService"
EMBEDDING = "tworoads.v1.EmbeddingService"
GENERATION = "tworoads.v1.GenerationService"
EVALUATION = "tworoads.v1.EvaluationService"
DIMENSION = 64
MEBIBYTE = 1024 * 1024
MOST_CORPORA = 20


class FakeEmbedding(EmbeddingServiceServicer):
    """A text's vector counts its words, hashed into 64 places."""

    def __init__(self) -> None:
        self.hash = "fake-1"
        self.embedded: list[str] = []
        self.error: Exception | None = None
        self.refused = 0
        self.meeting: asyncio.Barrier | None = None  # another call that must be under way too

    async def Embed(self, request, context):
        if self.error:
            self.refused += 1
            raise self.error
        if self.meeting:
            await self.meeting.wait()
        self.embedded += request.texts
        vectors = [embedding_pb2.Vector(values=vector(text)) for text in request.texts]
        return embedding_pb2.EmbedResponse(vectors=vectors, model_hash=self.hash)

    async def GetModel(self, request, context):
        if self.error:
            raise self.error
        words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        return embedding_pb2.EmbeddingServiceGetModelResponse(
            model=embedding_pb2.EmbeddingModel(
                name="fake", hash=self.hash, dimension=DIMENSION, max_tokens=256, normalized=True
            ),
            tokenizer=gzip.compress(words.to_str().encode()),
        )


class FakeGeneration(GenerationServiceServicer):
    """Writes `answer`, or what `says` makes of a request, a word at a time; remembers what it was
    asked."""

    def __init__(self) -> None:
        self.answer = "I do not know."
        self.says: Callable[[generation_pb2.GenerateRequest], str] | None = None
        self.requests: list[generation_pb2.GenerateRequest] = []
        self.parts_that_fit = 100
        self.error: Exception | None = None
        self.adapter_error: Exception | None = None  # of requests with an adapter
        self.hold_after: int | None = None  # words, after which it waits to be cancelled
        self.hold_from: int | None = None  # requests, behind which all wait to be cancelled
        self.running = 0

    async def Generate(self, request, context):
        if self.error:
            raise self.error
        if self.adapter_error and request.adapter:
            raise self.adapter_error
        self.requests.append(request)
        self.running += 1
        try:
            if self.hold_from is not None and len(self.requests) > self.hold_from:
                await asyncio.Event().wait()
            parts = [p.id for m in request.messages for p in m.parts if p.droppable]
            used = parts[: self.parts_that_fit]
            prompt = generation_pb2.PromptInfo(tokens=100, used_parts=used)
            words = (self.says(request) if self.says else self.answer).split(" ")
            for index, word in enumerate(words):
                if index == self.hold_after:
                    await asyncio.Event().wait()
                text = word if index == 0 else f" {word}"
                yield generation_pb2.GenerateResponse(text=text, prompt=prompt)
                prompt = None
            yield generation_pb2.GenerateResponse(
                finish=generation_pb2.GenerateFinish(
                    reason=generation_pb2.FINISH_REASON_STOP,
                    tokens=len(words),
                    queue_ms=1,
                    prefill_ms=2,
                    decode_ms=3,
                )
            )
        finally:
            self.running -= 1

    async def GetModel(self, request, context):
        if self.error:
            raise self.error
        return generation_pb2.GenerationServiceGetModelResponse(id="fake", context_length=2048)


@dataclass
class SmallStack:
    """A running stack: the gateway's address, the fakes, and stubs that go past the gateway."""

    address: str
    embedding: FakeEmbedding
    generation: FakeGeneration
    tuning: FakeTuning
    store: Store
    retrieval: RetrievalServiceStub
    servers: dict[str, Server]
    comparisons: Comparisons


@asynccontextmanager
async def retrieval_stack(
    store: Store, embedding: FakeEmbedding, most_bytes: int = 4 * MEBIBYTE, **parser: object
) -> AsyncIterator[tuple[Server, Server]]:
    """Run the real retrieval service over `store`, and the fake embedding service behind it."""
    settings = ServerSettings(grace_seconds=0)
    async with (
        running(settings, [EMBEDDING]) as embedding_server,
        running(settings, [RETRIEVAL]) as server,
        connect(f"127.0.0.1:{embedding_server.port}", EMBEDDING) as channel,
        Parser(**parser) as parser_pool,
    ):
        await embedding_server.serve(lambda s: add_EmbeddingServiceServicer_to_server(embedding, s))
        embedder = Embedder(EmbeddingServiceStub(channel))
        service = RetrievalService(store, embedder, parser_pool, most_bytes, MOST_CORPORA)
        await server.serve(lambda s: add_RetrievalServiceServicer_to_server(service, s))
        yield server, embedding_server


@asynccontextmanager
async def small_stack(
    folder: Path,
    tuning: FakeTuning | None = None,
    writer: GenerationServiceServicer | None = None,
    *,
    gate: Gate | None = None,
    tuning_address: str = "",
    **options: object,
) -> AsyncIterator[SmallStack]:
    """Run gateway and retrieval for real, over LanceDB in `folder`, with fake models.

    A `writer` is served as generation instead of the fake one; `gate` stands before the gateway,
    open by default; `tuning_address` is that of another tuning service than the fake one.
    """
    embedding, generation, tuning = FakeEmbedding(), FakeGeneration(), tuning or FakeTuning()
    settings = ServerSettings(grace_seconds=0)
    async with (
        LanceStore.open(folder) as store,
        retrieval_stack(store, embedding, **options) as (retrieval_server, embedding_server),
        running(settings, [GENERATION]) as generation_server,
        running(settings, [TUNING]) as tuning_server,
        running(settings, [ANSWERS, *PUBLIC], gate or Open()) as gateway,
        running(settings, [ANSWERS, *PUBLIC]) as internal,
        connect(f"127.0.0.1:{retrieval_server.port}", RETRIEVAL) as retrieval,
        connect(f"127.0.0.1:{embedding_server.port}", EMBEDDING) as embedding_channel,
        connect(f"127.0.0.1:{generation_server.port}", GENERATION) as generation_channel,
        connect(tuning_address or f"127.0.0.1:{tuning_server.port}", TUNING) as tuning_channel,
        evaluation_service(folder / "evaluation", f"127.0.0.1:{internal.port}") as evaluation,
    ):
        evaluation_server, evaluation_channel, comparisons = evaluation
        await generation_server.serve(
            lambda s: add_GenerationServiceServicer_to_server(writer or generation, s)
        )
        await tuning_server.serve(lambda s: add_TuningServiceServicer_to_server(tuning, s))
        answers = AnswerService(
            RetrievalServiceStub(retrieval),
            EmbeddingServiceStub(embedding_channel),
            GenerationServiceStub(generation_channel),
            TuningServiceStub(tuning_channel),
        )
        channels = {
            RETRIEVAL: retrieval,
            EMBEDDING: embedding_channel,
            GENERATION: generation_channel,
            TUNING: tuning_channel,
            EVALUATION: evaluation_channel,
        }

        def forward(server: grpc.aio.Server) -> None:
            server.add_generic_rpc_handlers((Forwarder(channels, answers.forget),))

        for server in (gateway, internal):
            await server.serve(lambda s: add_AnswerServiceServicer_to_server(answers, s), forward)
        yield SmallStack(
            f"127.0.0.1:{gateway.port}",
            embedding,
            generation,
            tuning,
            store,
            RetrievalServiceStub(retrieval),
            {
                "gateway": gateway,
                "retrieval": retrieval_server,
                "embedding": embedding_server,
                "generation": generation_server,
                "tuning": tuning_server,
                "evaluation": evaluation_server,
            },
            comparisons,
        )


@asynccontextmanager
async def evaluation_service(
    folder: Path, gateway: str, patience_seconds: float = 60.0
) -> AsyncIterator[tuple[Server, grpc.aio.Channel, Comparisons]]:
    """Run the real evaluation service, which asks the gateway at an address."""
    settings = ServerSettings(grace_seconds=0)
    async with (
        running(settings, [EVALUATION]) as server,
        connect(gateway, ANSWERS, RETRIEVAL, TUNING, EMBEDDING) as channel,
        connect(f"127.0.0.1:{server.port}", EVALUATION) as own_channel,
    ):
        asked = Gateway(
            AnswerServiceStub(channel),
            RetrievalServiceStub(channel),
            TuningServiceStub(channel),
            EmbeddingServiceStub(channel),
        )
        folder.mkdir(parents=True, exist_ok=True)
        with closing(Database(folder / "evaluation.db", SCHEMA)) as database:
            runner = GatewayRunner(asked, None, patience_seconds)
            async with Comparisons(folder, database, runner) as comparisons:
                tmp = folder / "tmp"
                uploads = Uploads(tmp, comparisons, asked, Prices(), "", 4 * MEBIBYTE)
                service = EvaluationService(comparisons, uploads)
                await server.serve(lambda s: add_EvaluationServiceServicer_to_server(service, s))
                yield server, own_channel, comparisons
                comparisons.stop()


def vector(text: str) -> list[float]:
    counts = np.zeros(DIMENSION, np.float32)
    for word in text.lower().split():
        counts[zlib.crc32(word.strip(".,?!").encode()) % DIMENSION] += 1
    return (counts / (np.linalg.norm(counts) or 1)).tolist()
