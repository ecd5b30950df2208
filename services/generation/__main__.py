"""`python -m services.generation --model FOLDER`"""

import asyncio

from tworoads.v1.generation_pb2 import DESCRIPTOR
from tworoads.v1.generation_pb2_grpc import add_GenerationServiceServicer_to_server

from services.generation.engine import VllmEngine
from services.generation.service import GenerationService
from services.generation.settings import Settings
from services.runtime.checkpoint import Unfit
from services.runtime.server import run, running

NAME = DESCRIPTOR.services_by_name["GenerationService"].full_name


async def main(settings: Settings) -> None:
    async with running(settings, [NAME]) as server:
        try:
            engine = await VllmEngine.start(settings)
        except Unfit as error:
            raise SystemExit(f"cannot serve {settings.model}: {error}") from error
        service = GenerationService(engine, engine.renderer())
        await server.serve(lambda s: add_GenerationServiceServicer_to_server(service, s))
        dead = asyncio.create_task(engine.until_dead())
        dead.add_done_callback(lambda _: server.stop())
        await server.until_stopped()
        died = dead.done()
    dead.cancel()
    engine.close()
    if died:
        raise SystemExit("the engine died")


if __name__ == "__main__":
    chosen = Settings(_cli_parse_args=True)  # type: ignore[call-arg]
    run(lambda: main(chosen), chosen)
