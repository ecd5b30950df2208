"""`python -m services.gateway`"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tworoads.v1.answer_pb2 import DESCRIPTOR
from tworoads.v1.answer_pb2_grpc import add_AnswerServiceServicer_to_server
from tworoads.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tworoads.v1.generation_pb2_grpc import GenerationServiceStub
from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub
from tworoads.v1.tuning_pb2_grpc import TuningServiceStub

from services.gateway.audit import Audit
from services.gateway.forward import PUBLIC, Forwarder
from services.gateway.gate import Identified
from services.gateway.keys import Keys
from services.gateway.quotas import Limits, Quotas
from services.gateway.replicas import Replicas
from services.gateway.service import AnswerService
from services.gateway.settings import Settings
from services.gateway.tokens import Tokens
from services.runtime.channel import connect
from services.runtime.gate import Gate, Open
from services.runtime.server import Server, run, running

RETRIEVAL = "tworoads.v1.RetrievalService"
EMBEDDING = "tworoads.v1.EmbeddingService"
GENERATION = "tworoads.v1.GenerationService"
TUNING = "tworoads.v1.TuningService"
EVALUATION = "tworoads.v1.EvaluationService"
NAMES = (DESCRIPTOR.services_by_name["AnswerService"].full_name, *PUBLIC)
MEBIBYTE = 1024 * 1024


async def main(settings: Settings) -> None:
    async with (
        running(settings, NAMES, gate(settings), public_tls=settings.public_tls) as server,
        internal(settings) as inside,
        connect(settings.retrieval, RETRIEVAL, tls=settings.tls) as retrieval,
        connect(settings.embedding, EMBEDDING, tls=settings.tls) as embedding,
        connect(settings.generation, GENERATION, tls=settings.tls) as generation,
        connect(settings.tuning, TUNING, tls=settings.tls) as tuning,
        connect(settings.evaluation, EVALUATION, tls=settings.tls) as evaluation,
    ):
        answers = AnswerService(
            RetrievalServiceStub(retrieval),
            EmbeddingServiceStub(embedding),
            GenerationServiceStub(generation),
            TuningServiceStub(tuning),
            Replicas(
                settings.generation,
                lambda address: connect(address, GENERATION, tls=settings.tls),
            ),
        )
        channels = {
            RETRIEVAL: retrieval,
            EMBEDDING: embedding,
            GENERATION: generation,
            TUNING: tuning,
            EVALUATION: evaluation,
        }

        def forward(grpc_server: Any) -> None:
            grpc_server.add_generic_rpc_handlers((Forwarder(channels, answers.forget),))

        for one in (inside, server):
            if one:
                await one.serve(lambda s: add_AnswerServiceServicer_to_server(answers, s), forward)
        await asyncio.gather(server.until_stopped(), drained_with(server, inside))


def gate(settings: Settings) -> Gate:
    """Return what stands before the clients. Raises ValueError for settings that do not go
    together, ValueError and OSError for files that cannot be used."""
    limits = Limits(
        settings.requests_per_minute,
        settings.tokens_per_minute,
        settings.streams,
        settings.ingest_mb_per_minute * MEBIBYTE,
    )
    if (settings.jwt_issuer or settings.jwt_audience) and not settings.jwt_keys:
        raise ValueError("--jwt-issuer and --jwt-audience need --jwt-keys")
    if not (settings.keys or settings.jwt_keys):
        if limits != Limits():
            raise ValueError("quotas are counted by principal: they need --keys or --jwt-keys")
        return Open()
    tokens = None
    if settings.jwt_keys:
        if not (settings.jwt_issuer and settings.jwt_audience):
            raise ValueError("--jwt-keys needs --jwt-issuer and --jwt-audience")
        tokens = Tokens(
            settings.jwt_keys,
            settings.jwt_issuer,
            settings.jwt_audience,
            settings.jwt_tenant,
            settings.jwt_role,
        )
    keys = Keys(settings.keys) if settings.keys else None
    return Identified(keys, tokens, Quotas(limits), Audit(settings.audit))


@asynccontextmanager
async def internal(settings: Settings) -> AsyncIterator[Server | None]:
    """Listen for our own services while the block runs, if there is an address for them."""
    if not settings.internal:
        yield None
        return
    changes = {"listen": settings.internal, "health": "", "metrics": ""}
    async with running(settings.model_copy(update=changes), NAMES) as server:
        yield server


async def drained_with(server: Server, other: Server | None) -> None:
    """Return when `other` has ended its calls, which begins when `server` is stopped."""
    await server.stopping()
    if other:
        await other.drain()


if __name__ == "__main__":
    chosen = Settings(_cli_parse_args=True)  # type: ignore[call-arg]
    run(lambda: main(chosen), chosen)
