import asyncio
import time
from typing import Any

from grpc import StatusCode
from tworoads.v1.embedding_pb2 import EmbedResponse

from services.runtime.errors import error_info
from tests.probe import Probe, failure, probe, retry_seconds, soon


class Gate:
    """A method that waits until it is opened, and counts who is inside."""

    def __init__(self) -> None:
        self.inside = 0
        self.most_inside = 0
        self.seen: list[str] = []
        self.open = asyncio.Event()
        self.entered = asyncio.Condition()

    async def embed(self, request: Any, context: Any) -> EmbedResponse:
        self.seen.extend(request.texts)
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        async with self.entered:
            self.entered.notify_all()
        try:
            await self.open.wait()
        finally:
            self.inside -= 1
        return EmbedResponse()

    async def until_inside(self, count: int) -> None:
        async with self.entered:
            await soon(self.entered.wait_for(lambda: len(self.seen) >= count))


async def fill(server: Probe, gate: Gate, running: int, waiting: int) -> list[asyncio.Task[Any]]:
    """Take every place: answers of the server show when the last of them waits."""
    calls = [asyncio.ensure_future(server.embed(f"r{n}")) for n in range(running)]
    await gate.until_inside(running)
    for n in range(waiting):
        # One connection keeps the order: whoever is refused behind it came after it.
        calls.append(asyncio.ensure_future(server.embed(f"w{n}")))
        await server.channel.unary_unary("/grpc.health.v1.Health/Check")(b"")
    return calls


async def test_of_200_calls_5_run_10_wait_and_the_others_are_refused_at_once() -> None:
    gate = Gate()
    async with probe(embed=gate.embed, max_running=5, max_waiting=10) as server:
        calls = [asyncio.ensure_future(server.embed()) for _ in range(200)]
        done: set[Any] = set()
        while len(done) < 185:
            done, _ = await asyncio.wait(calls, timeout=5, return_when=asyncio.FIRST_COMPLETED)
            assert done
            await asyncio.sleep(0)
        assert gate.inside == 5
        refused = [call.exception() for call in done]
        assert {error.code() for error in refused} == {StatusCode.RESOURCE_EXHAUSTED}
        info = error_info(refused[0])
        assert info and info.reason == "QUEUE_FULL"
        assert retry_seconds(refused[0]) == 1.0

        times = []
        for _ in range(20):
            start = time.perf_counter()
            await failure(server.embed())
            times.append(time.perf_counter() - start)
        assert sorted(times)[10] < 0.1

        gate.open.set()
        results = await soon(asyncio.gather(*calls, return_exceptions=True))
    assert sum(isinstance(result, EmbedResponse) for result in results) == 15
    assert gate.most_inside == 5


async def test_who_waits_is_served_in_order() -> None:
    gate = Gate()
    async with probe(embed=gate.embed, max_running=1, max_waiting=3) as server:
        calls = await fill(server, gate, 1, 3)
        gate.open.set()
        await soon(asyncio.gather(*calls))
    assert gate.seen == ["r0", "w0", "w1", "w2"]


async def test_a_waiting_caller_that_leaves_frees_its_place() -> None:
    gate = Gate()
    async with probe(embed=gate.embed, max_running=1, max_waiting=1) as server:
        running, leaving = await fill(server, gate, 1, 1)
        assert (await failure(server.embed())).code() == StatusCode.RESOURCE_EXHAUSTED
        leaving.cancel()
        await server.channel.unary_unary("/grpc.health.v1.Health/Check")(b"")
        staying = asyncio.ensure_future(server.embed("staying"))
        await server.channel.unary_unary("/grpc.health.v1.Health/Check")(b"")
        assert not staying.done()
        gate.open.set()
        await soon(asyncio.gather(running, staying))
    assert gate.seen == ["r0", "staying"]


async def test_health_answers_while_the_server_is_full() -> None:
    gate = Gate()
    async with probe(embed=gate.embed, max_running=1, max_waiting=0) as server:
        (running,) = await fill(server, gate, 1, 0)
        await soon(server.channel.unary_unary("/grpc.health.v1.Health/Check")(b""))
        gate.open.set()
        await running
