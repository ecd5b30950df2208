"""AnswerService: checks the request, has it answered, and says what the server is."""

import asyncio
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Any

import grpc
from tworoads.v1 import answer_pb2 as pb
from tworoads.v1 import answer_pb2_grpc as pb_grpc
from tworoads.v1.embedding_pb2 import EmbeddingServiceGetModelRequest
from tworoads.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tworoads.v1.generation_pb2 import GenerationServiceGetModelRequest
from tworoads.v1.generation_pb2_grpc import GenerationServiceStub
from tworoads.v1.retrieval_pb2 import (
    PATH_AUTO,
    PATH_BASE,
    PATH_HYBRID,
    PATH_RAG,
    PATH_TUNED,
    ListCorporaRequest,
)
from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub
from tworoads.v1.tuning_pb2 import ListAdaptersRequest
from tworoads.v1.tuning_pb2_grpc import TuningServiceStub

from services.gateway import metrics
from services.gateway.adapters import Adapters
from services.gateway.answering import Answering
from services.gateway.checks import check
from services.gateway.replicas import Replicas
from services.prompts.words import VERSIONS
from services.runtime.call import outgoing
from services.runtime.errors import ServiceError, downstream

INFO_SECONDS = 2.0


class AnswerService(pb_grpc.AnswerServiceServicer):
    """Answers by calling the other services."""

    def __init__(
        self,
        retrieval: RetrievalServiceStub,
        embedding: EmbeddingServiceStub,
        generation: GenerationServiceStub,
        tuning: TuningServiceStub,
        replicas: Replicas | None = None,
    ) -> None:
        self._replicas = replicas
        self._retrieval = retrieval
        self._embedding = embedding
        self._generation = generation
        self._tuning = tuning
        self._adapters = Adapters(tuning)
        self.forget = self._adapters.forget  # to be told of adapters that are deleted
        self._model = ""

    async def Answer(
        self, request: pb.AnswerRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.AnswerResponse]:
        check(request)
        answering = Answering(
            request,
            self._retrieval,
            self._embedding,
            self._generation,
            self._adapters,
            await self._name(),
        )
        counted = metrics.Answer()
        async for event in answering.events():
            counted.add(event)
            yield event

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetServerInfoResponse:
        model, embedder, corpora, adapters, replicas = await asyncio.gather(
            self._asked(self._generation.GetModel, GenerationServiceGetModelRequest()),
            self._asked(self._embedding.GetModel, EmbeddingServiceGetModelRequest()),
            self._asked(self._retrieval.ListCorpora, ListCorporaRequest(page_size=1)),
            self._asked(self._tuning.ListAdapters, ListAdaptersRequest(page_size=1)),
            self._looked(),
        )
        base = "" if model else "the generation service is away"
        rag = base or ("" if embedder else "the embedding service is away")
        rag = rag or ("" if corpora else "the retrieval service is away")
        tuning = "" if adapters else "the tuning service is away"
        closed = {
            PATH_BASE: base,
            PATH_RAG: rag,
            PATH_TUNED: base or tuning,
            PATH_HYBRID: rag or tuning,
            PATH_AUTO: base,
        }
        return pb.GetServerInfoResponse(
            version=version("tworoads"),
            model=model.id if model else "",
            embedding_model=embedder.model.name if embedder else "",
            context_length=model.context_length if model else 0,
            paths=[
                pb.PathInfo(path=path, open=not reason, reason=reason)
                for path, reason in closed.items()
            ],
            prompt_versions=VERSIONS,
            replicas=replicas,
        )

    async def _looked(self) -> list[pb.Replica]:
        try:
            return await self._replicas.look() if self._replicas else []
        except ServiceError:
            return []

    async def _asked(self, method: Any, request: Any) -> Any:
        """Return a service's answer, None if it cannot answer now."""
        try:
            with downstream("needed"):
                return await method(request, **outgoing(INFO_SECONDS))
        except (ServiceError, RuntimeError):
            return None

    async def _name(self) -> str:
        """Return the model's name, asked for once."""
        if not self._model:
            with downstream("generation"):
                response = await self._generation.GetModel(
                    GenerationServiceGetModelRequest(), **outgoing()
                )
            self._model = response.id
        return self._model
