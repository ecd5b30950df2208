"""Replicas of generation that come, go, die and freeze behind a gateway that finds them by name.

Everything is real but the engine, whose speed is fixed. A text says which replica wrote it.
"""

import asyncio
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import grpc
import pytest
from grpc import StatusCode
from prometheus_client import REGISTRY
from tworoads.v1 import answer_pb2 as pb
from tworoads.v1.answer_pb2_grpc import AnswerServiceStub, add_AnswerServiceServicer_to_server
from tworoads.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tworoads.v1.generation_pb2 import GenerateOptions
from tworoads.v1.generation_pb2_grpc import GenerationServiceStub
from tworoads.v1.retrieval_pb2 import PATH_BASE
from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub
from tworoads.v1.tuning_pb2_grpc import TuningServiceStub

from services.gateway.service import AnswerService
from services.runtime.channel import connect
from services.runtime.errors import error_info
from services.runtime.gate import Open
from services.runtime.server import running
from services.runtime.settings import ServerSettings
from tests.dns_server import DnsServer, dns_server
from tests.probe import retry_seconds
from tests.replica import GENERATION, TUNING, Replica, replica, replicas

ANSWERS = "tworoads.v1.AnswerService"
RETRIEVAL = "tworoads.v1.RetrievalService"
EMBEDDING = "tworoads.v1.EmbeddingService"
NOBODY = "127.0.0.1:1"
ONE, TWO, THREE = "127.0.0.2", "127.0.0.3", "127.0.0.4"
QUICK = ("--connection-age-seconds=1", "--token-ms=10")


@pytest.fixture(autouse=True)
def _names_are_asked_for_each_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOROADS_DNS_SECONDS", "1")


@dataclass
class Heard:
    """What a caller of the gateway has heard so far."""

    text: str = ""
    finished: bool = False
    error: grpc.aio.AioRpcError | None = None
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0

    @property
    def host(self) -> str:
        return self.text.split(" ")[0]

    def whole(self, tokens: int) -> bool:
        return self.finished and self.text == written(self.host, tokens)


def written(host: str, tokens: int) -> str:
    return " ".join([host, *map(str, range(1, tokens))])


class Callers:
    """Ask the gateway, and note what they hear."""

    def __init__(self, stub: AnswerServiceStub) -> None:
        self._stub = stub

    async def ask(self, tokens: int = 1, heard: Heard | None = None) -> Heard:
        heard = heard or Heard()
        options = pb.AnswerOptions(generate=GenerateOptions(max_tokens=tokens))
        request = pb.AnswerRequest(question="How far?", path=PATH_BASE, options=options)
        try:
            async for event in self._stub.Answer(request):
                heard.text += event.text
                heard.finished |= event.HasField("finished")
        except grpc.aio.AioRpcError as error:
            heard.error = error
        heard.ended = time.monotonic()
        return heard

    @asynccontextmanager
    async def asking(self, count: int, tokens: int) -> AsyncIterator[list[Heard]]:
        """Ask that often at once; the block ends when all have heard the end."""
        all_heard = [Heard() for _ in range(count)]
        async with asyncio.TaskGroup() as group:
            for heard in all_heard:
                group.create_task(self.ask(tokens, heard))
            yield all_heard

    @asynccontextmanager
    async def asking_on(self, every: float) -> AsyncIterator[list[Heard]]:
        """Ask for one token every so many seconds while the block runs."""
        all_heard: list[Heard] = []

        async def ask_on() -> None:
            while True:
                all_heard.append(Heard())
                group.create_task(self.ask(1, all_heard[-1]))
                await asyncio.sleep(every)

        async with asyncio.TaskGroup() as group:
            asker = group.create_task(ask_on())
            yield all_heard
            asker.cancel()


@asynccontextmanager
async def gateway(generation: str) -> AsyncIterator[Callers]:
    """Run a gateway for the BASE path, which asks nobody but generation."""
    settings = ServerSettings(grace_seconds=0)
    async with (
        running(settings, [ANSWERS], Open()) as server,
        connect(NOBODY, RETRIEVAL) as retrieval,
        connect(NOBODY, EMBEDDING) as embedding,
        connect(NOBODY, TUNING) as tuning,
        connect(generation, GENERATION) as channel,
        connect(f"127.0.0.1:{server.port}", ANSWERS) as own,
    ):
        service = AnswerService(
            RetrievalServiceStub(retrieval),
            EmbeddingServiceStub(embedding),
            GenerationServiceStub(channel),
            TuningServiceStub(tuning),
        )
        await server.serve(lambda s: add_AnswerServiceServicer_to_server(service, s))
        yield Callers(AnswerServiceStub(own))


@asynccontextmanager
async def scaled(
    *hosts: str, settings: tuple[str, ...] = QUICK
) -> AsyncIterator[tuple[Callers, DnsServer, list[Replica]]]:
    """Run a replica on each host, a name server that names them all, and a gateway."""
    async with AsyncExitStack() as stack:
        all_replicas = await stack.enter_async_context(replicas(*hosts, settings=settings))
        dns = await stack.enter_async_context(dns_server(*hosts))
        target = dns.target(all_replicas[0].port)
        callers = await stack.enter_async_context(gateway(target))
        await until(lambda: every_host_answers(callers, hosts))
        yield callers, dns, all_replicas


async def every_host_answers(callers: Callers, hosts: tuple[str, ...]) -> bool:
    async with callers.asking(2 * len(hosts), tokens=1) as heard:
        pass
    return {each.host for each in heard} == set(hosts)


async def until(holds: Callable[[], bool | Awaitable[bool]], seconds: float = 30) -> None:
    """Wait until something holds, so many seconds at most."""
    async with asyncio.timeout(seconds):
        while True:
            held = holds()
            if held if isinstance(held, bool) else await held:
                return
            await asyncio.sleep(0.02)


def unserved() -> float:
    labels = {"service": "generation"}
    return REGISTRY.get_sample_value("tworoads_unserved_total", labels) or 0.0


async def test_a_new_replica_is_found_within_seconds() -> None:
    """By itself gRPC asks a name server again after 30 s at the earliest."""
    async with scaled(ONE, TWO) as (callers, dns, _):
        dns.addresses = [ONE]
        await until(lambda: hosts_of_ten(callers, {ONE}))
        dns.addresses = [ONE, TWO]
        await until(lambda: hosts_of_ten(callers, {ONE, TWO}), 10)


async def hosts_of_ten(callers: Callers, hosts: set[str]) -> bool:
    async with callers.asking(10, tokens=1) as heard:
        pass
    assert not any(each.error for each in heard)
    return {each.host for each in heard} == hosts


async def test_short_calls_are_spread_evenly() -> None:
    async with scaled(ONE, TWO, THREE, settings=("--token-ms=1",)) as (callers, _, _):
        async with callers.asking(150, tokens=1) as first:
            pass
        async with callers.asking(150, tokens=1) as second:
            pass
    counts = Counter(heard.host for heard in first + second)
    assert sum(counts.values()) == 300
    assert len(counts) == 3 and max(counts.values()) <= 1.2 * min(counts.values())


async def test_a_replica_that_leaves_the_name_and_drains_loses_no_stream() -> None:
    async with scaled(ONE, TWO) as (callers, dns, (one, _)):
        async with callers.asking(20, tokens=250) as heard, callers.asking_on(0.05) as later:
            await until(lambda: all(each.text for each in heard))
            dns.addresses = [TWO]
            one.send(signal.SIGTERM)
        assert await one.ended() == 0
    counts = Counter(each.host for each in heard)
    assert len(counts) == 2 and min(counts.values()) >= 5
    assert all(each.whole(250) for each in heard)
    assert all(each.whole(1) for each in later)


async def test_sigterm_of_one_replica_of_three_under_100_streams_loses_none() -> None:
    settings = ("--token-ms=50", "--connection-age-seconds=1")
    async with scaled(ONE, TWO, THREE, settings=settings) as (callers, _, (one, *_)):
        async with callers.asking(100, tokens=100) as heard:
            await until(lambda: all(each.text for each in heard))
            one.send(signal.SIGTERM)
            async with callers.asking(20, tokens=1) as later:
                pass
        assert await one.ended() == 0
    counts = Counter(each.host for each in heard)
    assert len(counts) == 3 and min(counts.values()) >= 20
    assert [each for each in heard if not each.whole(100)] == []
    assert [each for each in later if not each.whole(1)] == []


async def test_kill_9_fails_only_the_streams_that_had_begun_on_that_replica() -> None:
    settings = ("--token-ms=50", "--capacity=10")  # the first ten of each take 4 s
    async with scaled(ONE, TWO, THREE, settings=settings) as (callers, _, (one, *_)):
        async with callers.asking(45, tokens=80) as heard:
            await until(lambda: sum(1 for each in heard if each.text) >= 30)
            begun = [each for each in heard if each.host == ONE]
            one.send(signal.SIGKILL)
    assert len(begun) == 10
    for each in begun:
        assert each.error and each.error.code() == StatusCode.UNAVAILABLE
        assert error_info(each.error).reason == "GENERATION_UNAVAILABLE"
        assert retry_seconds(each.error)
        assert written(ONE, 80).startswith(each.text)
    others = [each for each in heard if each not in begun]
    assert [each for each in others if not each.whole(80) or each.host == ONE] == []


async def test_a_frozen_replica_is_noticed_gets_no_more_calls_and_is_used_again() -> None:
    """With the intervals of production: 5 s between pings, 5 s for the answer."""
    settings = ("--token-ms=100",)
    async with scaled(ONE, TWO, THREE, settings=settings) as (callers, _, (one, *_)):
        async with callers.asking(9, tokens=130) as streams:
            await until(lambda: all(each.text for each in streams))
            async with callers.asking_on(0.2) as short:
                one.send(signal.SIGSTOP)
                on_it = [each for each in streams if each.host == ONE]
                await until(lambda: all(each.error for each in on_it), 15)
                before = len(short)
                await until(lambda: len(short) >= before + 10)
        # None of these has waited until a ping was not answered.
        assert all(each.ended - each.began < 5 for each in short[before:])
        assert [each for each in short if not each.whole(1)] == []  # the others took over
        assert len(on_it) == 3
        assert all(each.error.code() == StatusCode.UNAVAILABLE for each in on_it)
        assert all(each.whole(130) for each in streams if each not in on_it)
        one.send(signal.SIGCONT)  # what failed so often is looked at again after 5 to 10 s
        await until(lambda: every_host_answers(callers, (ONE, TWO, THREE)))


async def test_from_zero_callers_are_told_to_come_again_until_a_replica_has_loaded() -> None:
    settings = ("--loads=true", *QUICK)
    async with replicas(ONE, settings=settings) as (one,), dns_server() as dns:
        async with gateway(dns.target(one.port)) as callers:
            before = unserved()
            await assert_told_to_come_again(await callers.ask())
            assert unserved() == before + 1
            dns.addresses = [ONE]
            await until(lambda: dns.asked > 3)
            await assert_told_to_come_again(await callers.ask())
            assert unserved() == before + 2

            one.send(signal.SIGUSR1)
            await until(lambda: answers(callers), 10)
            served = unserved()
            assert (await callers.ask()).whole(1)
            assert unserved() == served


async def assert_told_to_come_again(heard: Heard) -> None:
    assert heard.error and heard.error.code() == StatusCode.UNAVAILABLE
    assert error_info(heard.error).reason == "GENERATION_UNAVAILABLE"
    assert retry_seconds(heard.error)
    assert heard.ended - heard.began < 4


async def answers(callers: Callers) -> bool:
    return (await callers.ask()).whole(1)


async def test_after_a_long_time_with_no_replica_a_new_one_is_found_as_fast() -> None:
    """By itself gRPC asks a name server after 1, 3, 5, 9, 16, 27, 44 s, ... and not in between."""
    async with replicas(ONE, settings=QUICK) as (one,), dns_server() as dns:
        async with gateway(dns.target(one.port)) as callers:
            assert (await callers.ask()).error
            start = time.monotonic()
            while time.monotonic() < start + 11:
                assert (await callers.ask()).error
                await asyncio.sleep(0.1)
            assert dns.asked > 7
            dns.addresses = [ONE]
            await until(lambda: answers(callers), 10)


async def test_a_replica_that_fails_every_call_is_left_out_for_a_while() -> None:
    async with replicas(ONE, settings=("--broken=true",)) as (broken,), AsyncExitStack() as stack:
        dns = await stack.enter_async_context(dns_server(ONE, TWO, THREE))
        for host in (TWO, THREE):
            well = replica(host, broken.port, "--token-ms=1")
            await stack.enter_async_context(well)
        callers = await stack.enter_async_context(gateway(dns.target(broken.port)))
        await until(lambda: of_thirty_fail(callers, least=5, most=15))
        await until(lambda: of_thirty_fail(callers, least=0, most=0), 60)


async def of_thirty_fail(callers: Callers, least: int, most: int) -> bool:
    async with callers.asking(30, tokens=1) as heard:
        pass
    return least <= sum(1 for each in heard if not each.whole(1)) <= most
