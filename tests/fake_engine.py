"""An engine that writes what it is told, and a generation service with it."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tworoads.v1 import generation_pb2 as pb
from tworoads.v1.generation_pb2_grpc import add_GenerationServiceServicer_to_server
from tworoads.v1.tuning_pb2_grpc import TuningServiceStub

from services.generation.adapter_store import AdapterStore
from services.generation.adapters import Adapters, Lora
from services.generation.checks import Sampling
from services.generation.service import Finish, GenerationService, Load, Model, Piece
from services.prompts.rendering import Renderer
from services.runtime.channel import connect
from services.runtime.server import running
from services.runtime.settings import ServerSettings
from tests.fake_tuning import BASE_HASH, TUNING
from tests.tiny_tokenizer import TinyTokenizer

NAME = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name
CONTEXT = 600
MAX_RANK = 16


class FakeEngine:
    """Writes the pieces that it is given, and keeps what it was asked.

    `error` fails every generation, `load_error` every load. `waits` writes on for ever after the
    last piece. `loaded` are the adapters that it has now, `loads` all that it ever was given.
    """

    model = Model("tiny", BASE_HASH, "float32", CONTEXT)

    def __init__(self) -> None:
        self.pieces = [
            Piece("", 1, cached_tokens=3),
            Piece("Ada", 2, cached_tokens=3),
            Piece("", 1),
            Piece(" wrote", 3),
            Piece("", 1, finish=Finish("stop", 10.0, 10.25, 11.25)),
        ]
        self.error: Exception | None = None
        self.waits = False
        self.asked: list[tuple[list[int], Sampling, str, Lora | None]] = []
        self.scored: list[tuple[list[int], list[int], Lora | None]] = []
        self.running = 0
        self.idle = asyncio.Event()
        self.load_error: Exception | None = None
        self.loaded: dict[int, Lora] = {}
        self.loads: list[Lora] = []

    def load(self) -> Load:
        return Load(self.running, 2, 0.5)

    async def generate(
        self, prompt: list[int], how: Sampling, salt: str, lora: Lora | None = None
    ) -> AsyncGenerator[Piece, None]:
        self.asked.append((prompt, how, salt, lora))
        assert lora is None or self.loaded[lora.number] == lora
        self.running += 1
        try:
            if self.error:
                raise self.error
            for piece in self.pieces:
                yield piece
            if self.waits:
                await asyncio.Event().wait()
            assert lora is None or self.loaded[lora.number] == lora
        finally:
            self.running -= 1
            self.idle.set()

    async def score(
        self, prompt: list[int], continuation: list[int], salt: str, lora: Lora | None = None
    ) -> list[float]:
        self.scored.append((prompt, continuation, lora))
        assert lora is None or self.loaded[lora.number] == lora
        return [-float(i) for i in range(len(continuation))]

    async def load_lora(self, lora: Lora) -> None:
        self.loads.append(lora)
        await asyncio.sleep(0)
        if self.load_error:
            raise self.load_error
        assert lora.number not in self.loaded
        assert lora.name not in [other.name for other in self.loaded.values()]
        self.loaded[lora.number] = lora

    async def unload_lora(self, lora: Lora) -> None:
        await asyncio.sleep(0)
        del self.loaded[lora.number]


@asynccontextmanager
async def serving(
    engine: FakeEngine, folder: Path, tuning: str, most: int = 32
) -> AsyncIterator[tuple[Adapters, str]]:
    """Serve the engine while the block runs, with adapters in `folder` and the tuning service at
    this address. Yields the adapters, and the address."""
    async with (
        connect(tuning, TUNING) as channel,
        running(ServerSettings(grace_seconds=0), [NAME]) as server,
    ):
        with AdapterStore.open(folder) as store:
            stub = TuningServiceStub(channel)
            adapters = Adapters(store, stub, engine, engine.model.hash, most, MAX_RANK)
            await adapters.start()
            service = GenerationService(engine, Renderer(TinyTokenizer()), adapters)
            await server.serve(lambda s: add_GenerationServiceServicer_to_server(service, s))
            try:
                yield adapters, f"127.0.0.1:{server.port}"
            finally:
                await server.drain()
                await adapters.close()
