"""`python -m services.evaluation`"""

import asyncio
from contextlib import AsyncExitStack, closing

from tworoads.v1.answer_pb2_grpc import AnswerServiceStub
from tworoads.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tworoads.v1.evaluation_pb2 import DESCRIPTOR
from tworoads.v1.evaluation_pb2_grpc import add_EvaluationServiceServicer_to_server
from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub
from tworoads.v1.tuning_pb2_grpc import TuningServiceStub

from services.evaluation.asking import Gateway
from services.evaluation.comparison import Prices
from services.evaluation.comparisons import Comparisons
from services.evaluation.judge import Judge
from services.evaluation.running import GatewayRunner
from services.evaluation.schema import SCHEMA
from services.evaluation.service import EvaluationService
from services.evaluation.settings import Settings
from services.evaluation.uploads import MEBIBYTE, Uploads
from services.runtime.channel import connect
from services.runtime.database import Database
from services.runtime.owner import owned
from services.runtime.server import run, running

NAME = DESCRIPTOR.services_by_name["EvaluationService"].full_name
GATEWAY = (
    "tworoads.v1.AnswerService",
    "tworoads.v1.RetrievalService",
    "tworoads.v1.TuningService",
    "tworoads.v1.EmbeddingService",
)


async def main(settings: Settings) -> None:
    async with (
        running(settings, [NAME]) as server,
        connect(settings.gateway, *GATEWAY, tls=settings.tls) as channel,
        AsyncExitStack() as stack,
    ):
        folder = stack.enter_context(owned(settings.folder))
        database = stack.enter_context(closing(Database(folder / "evaluation.db", SCHEMA)))
        judge = None
        if settings.judge_url:
            judge = await stack.enter_async_context(
                Judge(settings.judge_url, settings.judge_model, settings.judge_key_file)
            )
        gateway = Gateway(
            AnswerServiceStub(channel),
            RetrievalServiceStub(channel),
            TuningServiceStub(channel),
            EmbeddingServiceStub(channel),
        )
        runner = GatewayRunner(gateway, judge, settings.patience_seconds)
        comparisons = await stack.enter_async_context(
            Comparisons(folder, database, runner, settings.max_comparisons, settings.max_queued)
        )
        prices = Prices(
            settings.currency,
            settings.answering_second,
            settings.training_second,
            settings.answers_per_training,
        )
        uploads = Uploads(
            folder / "tmp",
            comparisons,
            gateway,
            prices,
            judge.name if judge else "",
            settings.upload_mb * MEBIBYTE,
        )
        service = EvaluationService(comparisons, uploads)
        await server.serve(lambda s: add_EvaluationServiceServicer_to_server(service, s))
        stopping = asyncio.create_task(server.stopping())
        stopping.add_done_callback(lambda _: comparisons.stop())
        await server.until_stopped()


if __name__ == "__main__":
    chosen = Settings(_cli_parse_args=True)  # type: ignore[call-arg]
    run(lambda: main(chosen), chosen)
