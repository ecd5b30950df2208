"""`python -m services.generation --model FOLDER`"""

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tworoads.v1 import generation_pb2, tuning_pb2
from tworoads.v1.generation_pb2_grpc import add_GenerationServiceServicer_to_server
from tworoads.v1.tuning_pb2_grpc import TuningServiceStub

from services.generation.adapter_store import AdapterStore
from services.generation.adapters import Adapters
from services.generation.engine import VllmEngine
from services.generation.service import GenerationService
from services.generation.settings import Settings
from services.runtime.channel import connect
from services.runtime.checkpoint import Unfit
from services.runtime.server import run, running

NAME = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
TUNING = tuning_pb2.DESCRIPTOR.services_by_name["TuningService"].full_name


async def main(settings: Settings) -> None:
    async with running(settings, [NAME]) as server, AsyncExitStack() as parts:
        store = parts.enter_context(AdapterStore.open(parts.enter_context(folder(settings))))
        try:
            engine = await VllmEngine.start(settings)
        except Unfit as error:
            raise SystemExit(f"cannot serve {settings.model}: {error}") from error
        parts.callback(engine.close)
        tuning = TuningServiceStub(
            await parts.enter_async_context(connect(settings.tuning, TUNING, tls=settings.tls))
        )
        adapters = Adapters(
            store,
            tuning,
            engine,
            model_hash=engine.model.hash,
            most=settings.max_adapters,
            max_rank=settings.max_lora_rank,
        )
        await adapters.start()
        parts.push_async_callback(adapters.close)
        service = GenerationService(engine, engine.renderer(), adapters)
        await server.serve(lambda s: add_GenerationServiceServicer_to_server(service, s))
        dead = asyncio.create_task(engine.until_dead())
        dead.add_done_callback(lambda _: server.stop())
        await server.until_stopped()
        died = dead.done()
        dead.cancel()
    if died:
        raise SystemExit("the engine died")


@contextmanager
def folder(settings: Settings) -> Iterator[Path]:
    """Yield the folder for adapters; without a setting one that is removed afterwards."""
    if settings.adapters:
        yield Path(settings.adapters)
    else:
        with TemporaryDirectory(prefix="tworoads-adapters-") as made:
            yield Path(made)


if __name__ == "__main__":
    chosen = Settings(_cli_parse_args=True)  # type: ignore[call-arg]
    run(lambda: main(chosen), chosen)
