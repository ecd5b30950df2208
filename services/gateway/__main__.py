"""`python -m services.gateway`"""

from typing import Any

from tworoads.v1.answer_pb2 import DESCRIPTOR
from tworoads.v1.answer_pb2_grpc import add_AnswerServiceServicer_to_server
from tworoads.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tworoads.v1.generation_pb2_grpc import GenerationServiceStub
from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub
from tworoads.v1.tuning_pb2_grpc import TuningServiceStub

from services.gateway.forward import PUBLIC, Forwarder
from services.gateway.service import AnswerService
from services.gateway.settings import Settings
from services.runtime.channel import connect
from services.runtime.gate import Open
from services.runtime.server import run, running

RETRIEVAL = "tworoads.v1.RetrievalService"
EMBEDDING = "tworoads.v1.EmbeddingService"
GENERATION = "tworoads.v1.GenerationService"
TUNING = "tworoads.v1.TuningService"
EVALUATION = "tworoads.v1.EvaluationService"


async def main(settings: Settings) -> None:
    name = DESCRIPTOR.services_by_name["AnswerService"].full_name
    async with (
        running(settings, [name, *PUBLIC], Open()) as server,
        connect(settings.retrieval, RETRIEVAL) as retrieval,
        connect(settings.embedding, EMBEDDING) as embedding,
        connect(settings.generation, GENERATION) as generation,
        connect(settings.tuning, TUNING) as tuning,
        connect(settings.evaluation, EVALUATION) as evaluation,
    ):
        answers = AnswerService(
            RetrievalServiceStub(retrieval),
            EmbeddingServiceStub(embedding),
            GenerationServiceStub(generation),
            TuningServiceStub(tuning),
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

        await server.serve(lambda s: add_AnswerServiceServicer_to_server(answers, s), forward)
        await server.until_stopped()


if __name__ == "__main__":
    chosen = Settings(_cli_parse_args=True)  # type: ignore[call-arg]
    run(lambda: main(chosen), chosen)
