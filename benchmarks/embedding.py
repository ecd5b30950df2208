"""Micro-batching: single-text clients by gRPC against offline batches and against no batching.

    python -m benchmarks.embedding [--rounds 5] [--texts 512] [--clients 64] [--threads N]

For each precision that the processor computes in, three processes embed the same questions in
turn: sentence-transformers' own `encode_query` in batches of 64 (offline), the service, and the
service with one forward per text (one each). The clients are this process. A ratio is taken within
a round; printed are the medians over the rounds, by the clock and by the CPU time that the process
took for a text, which moves less when the machine does other work.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from statistics import median

from tworoads.v1 import embedding_pb2 as pb
from tworoads.v1.embedding_pb2_grpc import EmbeddingServiceStub

from services.embedding.__main__ import NAME
from services.runtime.channel import connect

WORDS = (
    "what when where which who how does may must can should the a an of for in on by to with"
    " employee manager office leave contract laptop travel budget review training invoice"
    " meeting security badge holiday notice period request approve report carry over claim team"
).split()


@dataclass(frozen=True)
class Cost:
    """Seconds for one text, by the clock and of the CPU."""

    clock: float
    cpu: float

    def over(self, other: "Cost") -> "Cost":
        return Cost(self.clock / other.clock, self.cpu / other.cpu)


def questions(count: int) -> list[str]:
    """Return questions of 8 to 20 words, the same ones each time."""
    chance = random.Random(7)
    return [" ".join(chance.choices(WORDS, k=chance.randint(8, 20))) + "?" for _ in range(count)]


class Offline:
    """A child process that embeds everything each time that it is told to."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def measure(self) -> Cost:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(b"go\n")
        return Cost(**json.loads(await self._process.stdout.readline()))


class Service:
    """The service in a child process, and its clients here."""

    def __init__(
        self, pid: int, stub: EmbeddingServiceStub, texts: list[str], clients: int
    ) -> None:
        self._pid = pid
        self._stub = stub
        self._texts = texts
        self._clients = clients

    async def measure(self) -> Cost:
        texts = iter(self._texts)

        async def client() -> None:
            for text in texts:
                await self._stub.Embed(pb.EmbedRequest(texts=[text], kind=pb.EMBED_KIND_QUERY))

        cpu, start = self._cpu_seconds(), time.perf_counter()
        await asyncio.gather(*(client() for _ in range(self._clients)))
        seconds, cpu = time.perf_counter() - start, self._cpu_seconds() - cpu
        return Cost(seconds / len(self._texts), cpu / len(self._texts))

    def _cpu_seconds(self) -> float:
        with open(f"/proc/{self._pid}/stat") as stat:
            fields = stat.read().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@asynccontextmanager
async def child(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *arguments, stdin=pipe, stdout=pipe, stderr=pipe
    )
    try:
        yield process
    finally:
        process.terminate()
        await process.communicate()


@asynccontextmanager
async def offline(dtype: str, options: argparse.Namespace) -> AsyncIterator[Offline]:
    texts, threads = f"--texts={options.texts}", f"--threads={options.threads}"
    async with child("benchmarks.embedding", f"--offline={dtype}", texts, threads) as process:
        yield Offline(process)


@asynccontextmanager
async def service(
    dtype: str, options: argparse.Namespace, *arguments: str
) -> AsyncIterator[Service]:
    flags = (f"--dtype={dtype}", f"--threads={options.threads}", *arguments)
    async with child("services.embedding", *flags) as process:
        assert process.stderr
        line = await process.stderr.readline()
        while " serves on port " not in (message := json.loads(line)["message"]):
            line = await process.stderr.readline()
        drained = asyncio.create_task(_drain(process.stderr))
        async with connect(f"127.0.0.1:{message.split()[-1]}", NAME) as channel:
            stub = EmbeddingServiceStub(channel)
            yield Service(process.pid, stub, questions(options.texts), options.clients)
        drained.cancel()


async def _drain(stream: asyncio.StreamReader) -> None:
    while await stream.readline():
        pass


async def compare(options: argparse.Namespace) -> None:
    costs: dict[tuple[str, str], list[Cost]] = {}
    async with AsyncExitStack() as stack:
        parties: dict[tuple[str, str], Offline | Service] = {}
        for dtype in _precisions():
            alone = service(dtype, options, "--max-batch-tokens=1")
            batched = service(dtype, options)
            parties[dtype, "offline"] = await stack.enter_async_context(offline(dtype, options))
            parties[dtype, "service"] = await stack.enter_async_context(batched)
            parties[dtype, "one each"] = await stack.enter_async_context(alone)
        for round_ in range(options.rounds + 1):
            for key, party in parties.items():
                cost = await party.measure()
                if round_:  # the first one warms up
                    costs.setdefault(key, []).append(cost)
    print(f"{options.clients} clients, {options.texts} texts, {options.rounds} rounds,", end=" ")
    print(f"{options.threads} model threads; median (least to most)")
    for (dtype, name), all_ in costs.items():
        print(f"{dtype:9} {name:9} texts/s {_spread([1 / c.clock for c in all_], 1)}", end="   ")
        print(f"CPU ms/text {_spread([c.cpu * 1e3 for c in all_], 2)}")
    for dtype in dict.fromkeys(dtype for dtype, _ in costs):
        goals = (("offline", 0.95), ("one each", 2.0 if dtype == "float32" else 4.0))
        for other, goal in goals:
            pairs = zip(costs[dtype, other], costs[dtype, "service"], strict=True)
            ratios = [theirs.over(ours) for theirs, ours in pairs]
            print(f"{dtype:9} service : {other:9} throughput", end=" ")
            print(_spread([ratio.clock for ratio in ratios], 2), end="   ")
            print(f"CPU {_spread([ratio.cpu for ratio in ratios], 2)}   goal {goal}")


def _precisions() -> list[str]:
    with open("/proc/cpuinfo") as file:
        flags = file.read()
    fast = "avx512_bf16" in flags or "amx_bf16" in flags
    return ["float32", "bfloat16"] if fast else ["float32"]


def _spread(values: list[float], digits: int) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def serve_offline(dtype: str, texts: list[str], threads: int) -> None:
    """Embed `texts` for each line that comes in; print what a text cost."""
    import torch
    from sentence_transformers import SentenceTransformer

    from services.embedding.model import PACKAGED, find

    torch.set_num_threads(threads)
    precision = {"dtype": getattr(torch, dtype)}
    model = SentenceTransformer(
        str(find(PACKAGED)), device="cpu", local_files_only=True, model_kwargs=precision
    )
    for _ in sys.stdin:
        cpu, start = time.process_time(), time.perf_counter()
        model.encode_query(texts, batch_size=64, normalize_embeddings=True)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        print(json.dumps({"clock": seconds / len(texts), "cpu": cpu / len(texts)}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    parser.add_argument("--offline", choices=["float32", "bfloat16"], help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.offline:
        serve_offline(chosen.offline, questions(chosen.texts), chosen.threads)
    else:
        asyncio.run(compare(chosen))
