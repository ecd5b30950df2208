"""vLLM's AsyncLLM in a process of its own, made by the generation service's own function.

`python -m benchmarks.offline_engine` says when it is loaded; then for each line of standard input,
{"questions": [...], "max_tokens": N}, it streams the answers at once and prints what that took. Its
settings are those of the generation service, from the environment.
"""

import asyncio
import json
import logging
import os
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import IO

import uvloop

from benchmarks.stack import leashed
from services.generation.checks import Sampling
from services.generation.engine import VllmEngine
from services.generation.settings import Settings
from services.prompts.words import conversation


@dataclass(frozen=True)
class Written:
    """Tokens of all streams together, and the seconds from the first request to the last token."""

    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class OfflineEngine:
    """The engine, as the process that started it sees it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def write(self, questions: list[str], max_tokens: int) -> Written:
        """Answer all questions at the same time."""
        assert self._process.stdin
        command = json.dumps({"questions": questions, "max_tokens": max_tokens})
        self._process.stdin.write(command.encode() + b"\n")
        return Written(**json.loads(await self.line()))

    async def line(self) -> bytes:
        assert self._process.stdout
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("the engine's process ended")
        return line


@asynccontextmanager
async def offline_engine(environment: Mapping[str, str]) -> AsyncIterator[OfflineEngine]:
    """Run an engine by the settings in `environment` while the block runs; it is loaded before."""
    command = leashed("benchmarks.offline_engine")
    process = await asyncio.create_subprocess_exec(
        *command, stdin=PIPE, stdout=PIPE, env=environment
    )
    try:
        engine = OfflineEngine(process)
        await engine.line()
        yield engine
    finally:
        process.kill()  # the kernel ends the engine's own process with it
        await process.wait()


async def _serve(settings: Settings, out: IO[str]) -> None:
    engine = await VllmEngine.start(settings)
    renderer = engine.renderer()
    print("loaded", file=out, flush=True)

    async def stream(prompt: list[int], max_tokens: int) -> int:
        pieces = engine.generate(prompt, Sampling(max_tokens), "")
        return sum([piece.tokens async for piece in pieces])

    while line := await asyncio.to_thread(sys.stdin.readline):
        command = json.loads(line)
        limit = engine.model.context_length
        start = time.perf_counter()
        prompts = [
            renderer.render(conversation(question), limit).token_ids
            for question in command["questions"]
        ]
        counts = await asyncio.gather(*(stream(p, command["max_tokens"]) for p in prompts))
        written = Written(sum(counts), time.perf_counter() - start)
        print(json.dumps(asdict(written)), file=out, flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    # What a library prints goes to standard error; standard output is for the one who asks.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    uvloop.run(_serve(Settings(log_level="ERROR"), answers))  # type: ignore[call-arg]
