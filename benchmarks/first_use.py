"""How long the first use of an adapter takes on a running stack, against the same done by hand.

    python -m benchmarks.first_use [--rounds 8] [--rank 16]

By hand: SHA-256 of an adapter's files, a copy of them, vLLM's add_lora, and the answer, in a
process of its own with the settings of the service. On the stack: Generate at an address that never
saw the adapter, which pulls it from the tuning service. The adapters are random ones of all linear
layers, imported first; every answer is one token. A ratio is taken within a round.
"""

import argparse
import asyncio
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import uuid
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import IO

import uvloop
from tworoads.v1.generation_pb2 import GenerateOptions, GenerateRequest
from tworoads.v1.generation_pb2_grpc import GenerationServiceStub

from benchmarks.generation import GENERATION, SECONDS, messages
from benchmarks.ratios import ratios, spread
from benchmarks.stack import environment, leashed, running_stack
from clients.client import Client
from services.generation.adapters import Lora
from services.generation.checks import Sampling
from services.generation.engine import VllmEngine
from services.generation.settings import Settings
from services.prompts.words import conversation
from services.runtime.channel import connect
from tests.real.random_adapter import layers, random_adapter

QUESTION = "Say yes."
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GOAL = 1.5


@asynccontextmanager
async def hand(settings: Mapping[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run the engine of those who do it by hand while the block runs; it is loaded before."""
    command = leashed("benchmarks.first_use", "--by-hand")
    process = await asyncio.create_subprocess_exec(
        *command, stdin=PIPE, stdout=PIPE, env=dict(settings)
    )
    try:
        await _line(process)
        yield process
    finally:
        process.kill()
        await process.wait()


async def by_hand(process: asyncio.subprocess.Process, folder: Path) -> list[float]:
    """Return the seconds of the first and of the second answer with an adapter."""
    assert process.stdin
    process.stdin.write(f"{folder}\n".encode())
    seconds: list[float] = json.loads(await _line(process))
    return seconds


async def on_the_stack(stub: GenerationServiceStub, adapter: str) -> list[float]:
    """Return the seconds of the first three answers with an adapter."""
    request = GenerateRequest(
        messages=messages(conversation(QUESTION)),
        adapter=adapter,
        options=GenerateOptions(max_tokens=1),
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        async for _ in stub.Generate(request, timeout=SECONDS):
            pass
        seconds.append(time.perf_counter() - start)
    return seconds


async def measure(rounds: int, rank: int) -> None:
    services = running_stack()
    settings = environment(services["generation"])
    shapes = layers(Path(settings["TWOROADS_GENERATION_MODEL"]), *LAYERS)
    hands: list[list[float]] = []
    stack: list[list[float]] = []
    async with AsyncExitStack() as parts:
        folder = Path(parts.enter_context(tempfile.TemporaryDirectory()))
        client = await parts.enter_async_context(Client(services["gateway"].address))
        channel = connect(services["generation"].address, GENERATION)
        stub = GenerationServiceStub(await parts.enter_async_context(channel))
        process = await parts.enter_async_context(hand(settings))
        name = f"first-use-{uuid.uuid4().hex[:8]}"
        for i in range(rounds + 1):  # the first one warms up
            files = random_adapter(shapes, seed=i, rank=rank)
            made = folder / str(i)
            made.mkdir()
            for file, content in files.items():
                (made / file).write_bytes(content)
            adapter = await client.import_adapter(made, name)
            hands.append(await by_hand(process, made))
            stack.append(await on_the_stack(stub, adapter.id))
            await client.delete_adapter(adapter.id)
    size = sum(map(len, files.values())) / 1e6
    _print(hands[1:], stack[1:], f"adapters of rank {rank}, {size:.1f} MB, {rounds} rounds")


def _print(hands: list[list[float]], stack: list[list[float]], what: str) -> None:
    first, second = (list(times) for times in zip(*hands, strict=True))
    ours, next_one, third = (list(times) for times in zip(*stack, strict=True))
    print(f"seconds until the answer, {what}; median (least to most)")
    print(f"  first, by hand       {spread(first, 3)}")
    print(f"  first, on the stack  {spread(ours, 3)}", end="")
    print(f"   : by hand {spread(ratios(ours, first))}   goal <= {GOAL}")
    print(f"  second, by hand      {spread(second, 3)}")
    print(f"  second, on the stack {spread(next_one, 3)}", end="")
    print(f"   : third {spread(ratios(next_one, third))}")
    print(f"load average {os.getloadavg()[0]:.1f}")


async def _line(process: asyncio.subprocess.Process) -> bytes:
    assert process.stdout
    line = await process.stdout.readline()
    if not line:
        raise RuntimeError("the engine's process ended")
    return line


async def _serve(settings: Settings, out: IO[str]) -> None:
    engine = await VllmEngine.start(settings)
    ids = engine.renderer().render(conversation(QUESTION), engine.model.context_length).token_ids

    async def answer(lora: Lora) -> None:
        async for _ in engine.generate(ids, Sampling(1), "", lora):
            pass

    print("loaded", file=out, flush=True)
    number = 0
    with tempfile.TemporaryDirectory() as folder:
        while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
            number += 1
            lora = Lora(line, number, Path(folder) / str(number))
            start = time.perf_counter()
            await asyncio.to_thread(_hash_and_copy, Path(line), lora.folder)
            await engine.load_lora(lora)
            await answer(lora)
            middle = time.perf_counter()
            await answer(lora)
            took = [middle - start, time.perf_counter() - middle]
            print(json.dumps(took), file=out, flush=True)


def _hash_and_copy(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")
        shutil.copyfile(path, target / path.name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--by-hand", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.by_hand:
        logging.basicConfig(level=logging.ERROR)
        # What a library prints goes to standard error; standard output is for the one who asks.
        answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        uvloop.run(_serve(Settings(log_level="ERROR", _cli_parse_args=False), answers))  # type: ignore[call-arg]
    else:
        asyncio.run(measure(chosen.rounds, chosen.rank))
