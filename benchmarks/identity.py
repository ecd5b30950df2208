"""What one abusive client does to the others, and what it costs to tell who calls.

    python -m benchmarks.identity [--rounds 5] [--seconds 5]

A gateway over real retrieval with a fake embedding model is a process of its own. Ten clients
search at an even pace below their quota; in every second round another process sends ten times its
quota. Measured is the time that the ten wait for an answer. The machine has to be quiet: clients,
abuser and server share its cores. The second part measures the gate alone, call by call.
"""

import argparse
import asyncio
import math
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
from tworoads.v1 import retrieval_pb2
from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub

from benchmarks.ratios import ratios, spread
from services.gateway import keys
from services.gateway.audit import Audit
from services.gateway.gate import Identified
from services.gateway.keys import Keys
from services.gateway.quotas import Limits, Quotas
from services.runtime.channel import connect
from tests.issuer import ec_key, token, tokens, write_keys
from tests.small_stack import RETRIEVAL, small_stack
from tests.test_retrieval import END, document, start

CLIENTS = 10
QUOTA = 150  # requests a minute
PACE = 0.8  # of the quota, of those who behave
ABUSE = 10.0  # of the quota
CORPUS = "c"
SPAWN = multiprocessing.get_context("spawn")

Metadata = tuple[tuple[str, str], ...]


async def _serve(folder: Path, pipe: Connection) -> None:
    gate = Identified(
        Keys(folder / "keys.json"), None, Quotas(Limits(requests=QUOTA)), Audit(folder / "audit")
    )
    async with small_stack(folder / "store", gate=gate) as stack:
        await stack.retrieval.CreateCorpus(
            retrieval_pb2.CreateCorpusRequest(name=CORPUS),
            metadata=(("x-tworoads-tenant", "acme"),),
        )
        texts = [
            part
            for number in range(50)
            for part in document(f"d{number}", f"Rule {number} is about leave and travel.")
        ]
        async for _ in stack.retrieval.PutDocuments(
            iter([start(CORPUS), *texts, END]), metadata=(("x-tworoads-tenant", "acme"),)
        ):
            pass
        pipe.send(stack.address)
        await asyncio.to_thread(pipe.recv)


def serve(folder: Path, pipe: Connection) -> None:
    asyncio.run(_serve(folder, pipe))


async def _paced(search: Any, metadata: Metadata, per_minute: float, until: float) -> list[float]:
    """Search at an even pace, whatever the answers take; return how long each took that came."""
    took: list[float] = []

    async def one() -> None:
        began = time.perf_counter()
        request = retrieval_pb2.SearchRequest(corpus=CORPUS, query="leave and travel", limit=3)
        try:
            await search(request, metadata=metadata, timeout=30)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
        else:
            took.append(time.perf_counter() - began)

    async with asyncio.TaskGroup() as group:
        due = time.perf_counter()
        while due < until:
            await asyncio.sleep(due - time.perf_counter())
            group.create_task(one())
            due += 60 / per_minute
    return took


async def _abuse(address: str, key: str, pipe: Connection) -> None:
    metadata = (("authorization", f"Bearer {key}"),)
    async with connect(address, RETRIEVAL) as channel:
        search = RetrievalServiceStub(channel).Search
        while await _paced(search, metadata, 10 * ABUSE * QUOTA, time.perf_counter() + 0.1):
            pass  # the first minute's worth is there at once, and is used up here
        while True:
            pipe.send("ready")
            seconds = await asyncio.to_thread(pipe.recv)
            if not seconds:
                return
            until = time.perf_counter() + seconds
            taken = await _paced(search, metadata, ABUSE * QUOTA, until)
            pipe.send(len(taken))


def abuse(address: str, key: str, pipe: Connection) -> None:
    asyncio.run(_abuse(address, key, pipe))


@contextmanager
def process(target: Any, *args: Any) -> Iterator[Connection]:
    here, there = SPAWN.Pipe()
    child = SPAWN.Process(target=target, args=(*args, there), daemon=True)
    child.start()
    there.close()
    try:
        yield here
    finally:
        here.send(None)
        child.join()


async def round_of(address: str, callers: list[str], seconds: float) -> float:
    """Return the 95th percentile of the time of a search, in seconds."""
    until = time.perf_counter() + seconds
    async with connect(address, RETRIEVAL) as channel:
        search = RetrievalServiceStub(channel).Search
        found = await asyncio.gather(
            *(
                _paced(search, (("authorization", f"Bearer {key}"),), PACE * QUOTA, until)
                for key in callers
            )
        )
    took = sorted(second for each in found for second in each)
    asked = CLIENTS * math.ceil(seconds * PACE * QUOTA / 60)
    if len(took) < 0.95 * asked:
        raise RuntimeError(f"only {len(took)} of {asked} searches were answered")
    return took[math.ceil(0.95 * len(took)) - 1]


def beside(folder: Path, rounds: int, seconds: float) -> None:
    """Print the ratio of the others' 95th percentile with and without an abusive client."""
    file = folder / "keys.json"
    callers = [keys.add(file, "acme", f"p{number}", "reader")[1] for number in range(CLIENTS)]
    _, bad = keys.add(file, "acme", "abuser", "reader")
    alone: list[float] = []
    abused: list[float] = []
    let_in = sent = 0.0
    with process(serve, folder) as server:
        address = server.recv()
        with process(abuse, address, bad) as abuser:
            abuser.recv()
            asyncio.run(round_of(address, callers, 1.0))  # warms up
            for _ in range(rounds):
                alone.append(asyncio.run(round_of(address, callers, seconds)))
                abuser.send(seconds)
                abused.append(asyncio.run(round_of(address, callers, seconds)))
                let_in += abuser.recv()
                sent += seconds * ABUSE * QUOTA / 60
                abuser.recv()
    print(f"{CLIENTS} clients at {PACE * QUOTA:.0f} searches a minute, quota {QUOTA}", end="; ")
    print(f"p95 in ms, median (least to most) of {rounds} rounds of {seconds:g} s")
    print(f"  alone                     {spread([1e3 * value for value in alone])}")
    print(
        f"  beside {ABUSE:.0f} times the quota  {spread([1e3 * value for value in abused])}", end=""
    )
    print(f"   : alone {spread(ratios(abused, alone))}   goal <= 1.2")
    print(f"  of the abuser's {sent:.0f} calls {let_in:.0f} were let in")


def alone(folder: Path) -> None:
    """Print what the gate costs a call."""
    _, key = keys.add(folder / "own.json", "acme", "ann", "reader")
    known = tokens(write_keys(folder / "jwks.json"))
    gate = Identified(Keys(folder / "own.json"), known, Quotas(Limits(requests=10**9)), Audit())
    shown = {
        "key": key,
        "RS256 token": token(),
        "ES256 token": token(ec_key(), "ES256", {"kid": "ec"}),
    }
    for name, text in shown.items():
        metadata = (("authorization", f"Bearer {text}"),)
        costs = []
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(2000):
                gate.enter(f"/{RETRIEVAL}/Search", metadata, {}).ended("OK", 0.0)
            costs.append((time.perf_counter() - began) / 2000 * 1e6)
        print(f"  the gate with a {name:11}  {spread(costs, 1)} us a call")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        beside(Path(name), options.rounds, options.seconds)
        alone(Path(name))
