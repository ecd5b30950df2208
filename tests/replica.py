"""`python -m tests.replica --listen 127.0.0.2:0 --token-ms 20 --capacity 64`

A replica of the generation service: all of it is real but its engine, which writes at a fixed
speed. It prints its port when it listens. Its first token is its host, the next are 1, 2, 3, ...
"""

import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic_settings import SettingsConfigDict
from tworoads.v1.generation_pb2_grpc import add_GenerationServiceServicer_to_server
from tworoads.v1.tuning_pb2_grpc import TuningServiceStub

from services.generation.adapter_store import AdapterStore
from services.generation.adapters import Adapters, Lora
from services.generation.checks import Sampling
from services.generation.service import Finish, GenerationService, Load, Model, Piece
from services.prompts.rendering import Renderer
from services.runtime.channel import connect
from services.runtime.server import run, running
from services.runtime.settings import ServerSettings
from tests.tiny_tokenizer import TinyTokenizer

GENERATION = "tworoads.v1.GenerationService"
TUNING = "tworoads.v1.TuningService"
MODEL = Model("paced", "ab" * 32, "float32", 4096)
TOGETHER = 8  # tokens that the real engine sends together at most
START_SECONDS = 60


class Settings(ServerSettings):
    """How fast it writes, and what is wrong with it."""

    model_config = SettingsConfigDict(cli_kebab_case=True, use_attribute_docstrings=True)

    token_ms: float = 20.0
    """Between two tokens of a text."""

    capacity: int = 64
    """Texts that are written at once; more wait, and have no token until others end."""

    loads: bool = False
    """Serve only after SIGUSR1."""

    broken: bool = False
    """Fail every text by a bug, at once, and report SERVING all the same."""


@dataclass(eq=False)
class Writing:
    """A text that is being written."""

    tokens: int
    together: int
    arrived: float
    pieces: asyncio.Queue[Piece] = field(default_factory=asyncio.Queue)
    first: float = 0.0
    written: int = 0
    text: str = ""
    unsent: int = 0


class PacedEngine:
    """Implements `service.Engine`: a step every `token_ms` gives each text one token.

    So a replica writes capacity / token_ms at most, however fast the machine is.
    """

    model = MODEL

    def __init__(self, name: str, settings: Settings) -> None:
        self._name = name
        self._settings = settings
        self._texts: list[Writing] = []
        self._stepping: asyncio.Task[None] | None = None

    def load(self) -> Load:
        running = min(len(self._texts), self._settings.capacity)
        return Load(running, len(self._texts) - running)

    async def generate(
        self, prompt: list[int], how: Sampling, salt: str, lora: Lora | None = None
    ) -> AsyncGenerator[Piece, None]:
        if self._settings.broken:
            raise RuntimeError("it is broken")
        assert how.max_tokens is not None
        together = 1 if how.every_token else min(TOGETHER, 1 + len(self._texts))
        writing = Writing(how.max_tokens, together, time.monotonic())
        self._texts.append(writing)
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.create_task(self._steps())
        try:
            while True:
                piece = await writing.pieces.get()
                yield piece
                if piece.finish:
                    return
        finally:
            if writing in self._texts:
                self._texts.remove(writing)

    async def score(
        self, prompt: list[int], continuation: list[int], salt: str, lora: Lora | None = None
    ) -> list[float]:
        raise NotImplementedError

    async def load_lora(self, lora: Lora) -> None:
        raise NotImplementedError

    async def unload_lora(self, lora: Lora) -> None:
        raise NotImplementedError

    async def _steps(self) -> None:
        seconds = self._settings.token_ms / 1e3
        due = time.monotonic()
        while self._texts:
            due = max(due + seconds, time.monotonic())  # what was late is not made up for
            await asyncio.sleep(due - time.monotonic())
            for writing in self._texts[: self._settings.capacity]:
                if self._step(writing):
                    self._texts.remove(writing)

    def _step(self, writing: Writing) -> bool:
        """Write a token; return whether it was the last one."""
        now = time.monotonic()
        writing.first = writing.first or now
        writing.text += f" {writing.written}" if writing.written else self._name
        writing.written += 1
        writing.unsent += 1
        last = writing.written == writing.tokens
        if last or writing.written == 1 or writing.unsent == writing.together:
            finish = Finish("length", writing.arrived, writing.first, now) if last else None
            writing.pieces.put_nowait(Piece(writing.text, writing.unsent, finish=finish))
            writing.text, writing.unsent = "", 0
        return last


async def main(settings: Settings) -> None:
    loaded = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, loaded.set)
    with tempfile.TemporaryDirectory() as folder, AdapterStore.open(Path(folder)) as store:
        async with (
            running(settings, [GENERATION]) as server,
            connect("127.0.0.1:1", TUNING) as none,
        ):
            print(server.port, flush=True)
            if settings.loads:
                await loaded.wait()
            engine = PacedEngine(settings.listen.rpartition(":")[0], settings)
            tuning = TuningServiceStub(none)
            adapters = Adapters(store, tuning, engine, MODEL.hash, most=1, max_rank=16)
            service = GenerationService(engine, Renderer(TinyTokenizer()), adapters)
            await server.serve(lambda s: add_GenerationServiceServicer_to_server(service, s))
            await server.until_stopped()


@dataclass(frozen=True)
class Replica:
    """A replica that runs, and where it listens."""

    process: asyncio.subprocess.Process
    host: str
    port: int

    def send(self, sent: signal.Signals) -> None:
        self.process.send_signal(sent)

    async def ended(self) -> int:
        """Return its exit code when it has ended."""
        return await self.process.wait()


@asynccontextmanager
async def replicas(*hosts: str, settings: Iterable[str] = ()) -> AsyncIterator[list[Replica]]:
    """Run one on each host while the block runs, all on one port."""
    first, *others = hosts
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(replica(first, 0, *settings))
        rest = [replica(host, one.port, *settings) for host in others]
        yield [one, *[await stack.enter_async_context(each) for each in rest]]


@asynccontextmanager
async def replica(host: str, port: int = 0, *settings: str) -> AsyncIterator[Replica]:
    """Run one while the block runs; it listens when the block begins."""
    command = ["-m", "tests.replica", f"--listen={host}:{port}", "--log-level=WARNING", *settings]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout
        line = await asyncio.wait_for(process.stdout.readline(), START_SECONDS)
        yield Replica(process, host, int(line))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


if __name__ == "__main__":
    chosen = Settings(_cli_parse_args=True)  # type: ignore[call-arg]
    run(lambda: main(chosen), chosen)
