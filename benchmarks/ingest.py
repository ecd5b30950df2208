"""Ingest: passages per second against the embedder alone, and the memory of many documents.

    python -m benchmarks.ingest [--rounds 5] [--passages 512]

Speed, on a running stack: documents of one passage and of about twenty go into a new corpus by
PutDocuments at the gateway. Compared with the same passages' texts embedded by the same service in
calls of 64, several at a time so that its model never waits. A ratio is taken within a round.

Memory: a gateway and a retrieval service of their own, over LanceDB, with an embedding service that
needs no model; what the retrieval process holds after 1,000 and after 10,000 documents.
"""

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from pathlib import Path

import psutil
from tworoads.v1 import embedding_pb2
from tworoads.v1.embedding_pb2_grpc import EmbeddingServiceStub

from benchmarks import texts
from benchmarks.ratios import ratios, spread
from benchmarks.stack import cpu_seconds, leashed, process, running_stack
from clients import health
from clients.client import ANSWERS, RETRIEVAL, Client
from clients.documents import NewDocument
from clients.local import ServiceState
from clients.stack import free_addresses
from services.retrieval.chunking import chunk
from services.retrieval.embedder import BATCH, Embedder
from services.retrieval.parsing import parse
from services.runtime.channel import connect

EMBEDDING = "tworoads.v1.EmbeddingService"
CHUNK_TOKENS = 200  # of a corpus, unless it says otherwise
AT_ONCE = 3  # calls for embeddings
GOAL = 0.85
LENGTHS = {"1 passage": 9, "20 passages": 242}  # sentences of a document
FEW, MANY = 1_000, 10_000
SAMPLE_SECONDS = 0.2


async def embedded_texts(embedder: Embedder, documents: list[NewDocument]) -> list[str]:
    """Return what retrieval embeds for documents of plain text: each passage behind its title."""
    model = await embedder.identity()
    tokenizer = await embedder.tokenizer(model.hash)
    found = []
    for document in documents:
        parsed = parse(document.content, document.media_type)
        for piece in chunk(parsed, tokenizer, CHUNK_TOKENS):
            found.append(f"{document.title}\n{parsed.text[piece.start : piece.end]}")
    return found


async def embed(stub: EmbeddingServiceStub, passages: list[str]) -> float:
    """Return the seconds that embedding the passages takes."""
    batches = iter([passages[i : i + BATCH] for i in range(0, len(passages), BATCH)])

    async def caller() -> None:
        for batch in batches:
            kind = embedding_pb2.EMBED_KIND_DOCUMENT
            await stub.Embed(embedding_pb2.EmbedRequest(texts=batch, kind=kind), timeout=300)

    start = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(AT_ONCE)))
    return time.perf_counter() - start


async def ingest(client: Client, documents: list[NewDocument], passages: int) -> float:
    """Return the seconds that indexing the documents takes."""
    async with texts.ingested(client, []) as corpus:
        start = time.perf_counter()
        count = await texts.put(client, corpus, documents)
        seconds = time.perf_counter() - start
    if count != passages:
        raise RuntimeError(f"{count} passages were indexed, {passages} were embedded")
    return seconds


async def speed(services: dict[str, ServiceState], rounds: int, passages: int) -> None:
    counted = [services[name] for name in ("embedding", "retrieval", "gateway")]
    embedding, _, gateway = counted
    async with (
        connect(embedding.address, EMBEDDING) as channel,
        Client(gateway.address) as client,
    ):
        stub = EmbeddingServiceStub(channel)
        print(f"passages/s, about {passages} passages, {rounds} rounds; median (least to most)")
        for kind, length in LENGTHS.items():
            per_document = int(kind.partition(" ")[0])
            names = [f"Place{i}" for i in range(passages // per_document)]
            documents = texts.about(names, length)
            expected = await embedded_texts(Embedder(stub), documents)
            count = len(expected)
            rates: tuple[list[float], list[float]] = [], []
            work: dict[str, list[float]] = {}
            for round_ in range(rounds + 1):
                at_start = cpu_seconds(process(embedding))
                embedder_s = await embed(stub, expected)
                before = {s.name: cpu_seconds(process(s)) for s in counted}
                ingest_s = await ingest(client, documents, count)
                if round_:  # the first one warms up
                    rates[0].append(count / ingest_s)
                    rates[1].append(count / embedder_s)
                    alone = (before["embedding"] - at_start) / count * 1e3
                    work.setdefault("embedding alone", []).append(alone)
                    for s in counted:
                        cost = (cpu_seconds(process(s)) - before[s.name]) / count * 1e3
                        work.setdefault(s.name, []).append(cost)
            print(f"  {len(documents)} documents, {count / len(documents):.1f} passages each")
            print(f"    embedder  {spread(rates[1], 1)}")
            print(f"    ingest    {spread(rates[0], 1)}", end="")
            print(f"   : embedder {spread(ratios(*rates))}   goal >= {GOAL}")
            costs = ", ".join(f"{name} {spread(values, 1)}" for name, values in work.items())
            print(f"    CPU ms/passage: {costs}")


@asynccontextmanager
async def service(name: str, full_name: str, *flags: str) -> AsyncIterator[tuple[str, int]]:
    """Run a module that serves; yield its address and its process id."""
    address = free_addresses(1)[0]
    command = leashed(name, f"--listen={address}", "--log-level=ERROR", *flags)
    child = await asyncio.create_subprocess_exec(*command)
    try:
        async with asyncio.timeout(60), aclosing(health.watch(address, full_name)) as answers:
            async for ready in answers:
                if ready:
                    break
        yield address, child.pid
    finally:
        with suppress(ProcessLookupError):
            child.terminate()
        await child.wait()


async def memory() -> None:
    """Print the resident memory of the retrieval process after few and after many documents."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        fake = service("benchmarks.fake_embedding", EMBEDDING)
        embedding, _ = await stack.enter_async_context(fake)
        flags = (f"--embedding={embedding}", f"--folder={folder}")
        own = service("services.retrieval", RETRIEVAL, *flags)
        address, pid = await stack.enter_async_context(own)
        front = service("services.gateway", ANSWERS, f"--retrieval={address}")
        gateway, _ = await stack.enter_async_context(front)
        client = await stack.enter_async_context(Client(gateway))
        await client.create_corpus("many")
        retrieval = psutil.Process(pid)
        print("memory of the retrieval process with an embedder that needs no model, MiB")
        after: list[float] = []
        most: list[float] = []
        for first, last in ((0, FEW), (FEW, MANY)):
            documents = (texts.about([f"m{i}"])[0] for i in range(first, last))
            start = time.perf_counter()
            work = asyncio.create_task(texts.put(client, "many", documents))
            samples = [_mebibytes(retrieval)]
            while not (await asyncio.wait((work,), timeout=SAMPLE_SECONDS))[0]:
                samples.append(_mebibytes(retrieval))
            await work
            rate = (last - first) / (time.perf_counter() - start)
            after.append(_mebibytes(retrieval))
            most.append(max(samples))
            print(f"  {last:6,} documents: {after[-1]:.0f} after, {most[-1]:.0f} at most", end="")
            print(f"   ({rate:.0f} documents/s)")
    print(f"  {MANY:,} : {FEW:,} documents {after[1] / after[0]:.2f} after,", end=" ")
    print(f"{most[1] / most[0]:.2f} at most   goal: flat")


def _mebibytes(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / 2**20


async def measure(rounds: int, passages: int) -> None:
    await speed(running_stack(), rounds, passages)
    await memory()
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passages", type=int, default=512)
    chosen = parser.parse_args()
    asyncio.run(measure(chosen.rounds, chosen.passages))
