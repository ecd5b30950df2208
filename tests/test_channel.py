import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2
from tworoads.v1.embedding_pb2 import EmbedResponse
from tworoads.v1.generation_pb2 import GenerateResponse
from tworoads.v1.retrieval_pb2 import CreateCorpusResponse

from services.runtime import channel as channels
from services.runtime.channel import connect
from services.runtime.errors import Stopping, Unavailable
from tests.probe import EMBEDDING, GENERATION, NAMES, Probe, failure, probe, program, soon

STOPPING = Stopping("STOPPING", "this replica is starting or stopping")


class Failing:
    """Methods that fail the first `times` attempts with `error`."""

    def __init__(self, error: Exception, times: int) -> None:
        self.attempts = 0
        self._error = error
        self._times = times

    def methods(self) -> dict[str, Any]:
        return {"embed": self.embed, "create": self.create, "generate": self.generate}

    def attempt(self) -> None:
        self.attempts += 1
        if self.attempts <= self._times:
            raise self._error

    async def embed(self, request: Any, context: Any) -> EmbedResponse:
        self.attempt()
        return EmbedResponse()

    async def create(self, request: Any, context: Any) -> CreateCorpusResponse:
        self.attempt()
        return CreateCorpusResponse()

    async def generate(self, request: Any, context: Any) -> AsyncIterator[GenerateResponse]:
        self.attempt()
        yield GenerateResponse(text="a")


async def answer(server: Probe, method: str) -> None:
    call = getattr(server, method)()
    if method == "generate":
        assert [response.text async for response in call] == ["a"]
    else:
        await call


@pytest.mark.parametrize("method", ["embed", "generate"])
async def test_a_read_is_tried_three_times(method: str) -> None:
    failing = Failing(STOPPING, times=2)
    async with probe(**failing.methods()) as server:
        await answer(server, method)
    assert failing.attempts == 3


@pytest.mark.parametrize(
    ("method", "error", "times", "attempts"),
    [
        ("embed", STOPPING, 9, 3),
        ("create", STOPPING, 1, 1),  # a write
        ("embed", Unavailable("STORE_UNAVAILABLE", "the store is away"), 1, 1),  # tried below
        ("embed", RuntimeError(), 1, 1),
    ],
)
async def test_what_is_not_tried_again(
    method: str, error: Exception, times: int, attempts: int
) -> None:
    failing = Failing(error, times)
    async with probe(**failing.methods()) as server:
        await failure(getattr(server, method)())
    assert failing.attempts == attempts


async def test_a_stream_that_breaks_after_its_first_message_is_not_tried_again() -> None:
    attempts = 0

    async def generate(request: Any, context: Any) -> AsyncIterator[GenerateResponse]:
        nonlocal attempts
        attempts += 1
        yield GenerateResponse(text="a")
        raise STOPPING

    async with probe(generate=generate) as server:
        call = server.generate()
        assert (await call.read()).text == "a"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() == StatusCode.UNAVAILABLE
    assert attempts == 1


async def test_in_a_total_outage_retries_add_less_than_a_tenth() -> None:
    failing = Failing(STOPPING, times=10**6)
    async with probe(**failing.methods()) as server:
        await asyncio.gather(*(failure(server.embed()) for _ in range(1000)))
    assert 1000 < failing.attempts <= 1100


class Counting:
    def __init__(self) -> None:
        self.calls = 0
        self.called = asyncio.Event()

    async def embed(self, request: Any, context: Any) -> EmbedResponse:
        self.calls += 1
        self.called.set()
        return EmbedResponse()


async def test_calls_go_to_every_replica_that_serves_and_to_no_other() -> None:
    one, two = Counting(), Counting()
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(probe(embed=one.embed))
        second = await stack.enter_async_context(probe(embed=two.embed))
        await second.server.report(health_pb2.HealthCheckResponse.NOT_SERVING)
        target = f"ipv4:{first.address},{second.address}"
        channel = await stack.enter_async_context(connect(target, EMBEDDING))
        embed = channel.unary_unary(f"/{EMBEDDING}/Embed")
        await asyncio.gather(*(embed(b"") for _ in range(50)))
        assert (one.calls, two.calls) == (50, 0)

        await second.server.report(health_pb2.HealthCheckResponse.SERVING)
        async with asyncio.timeout(5):
            while not two.called.is_set():
                await embed(b"")
        before = two.calls
        await asyncio.gather(*(embed(b"") for _ in range(50)))
        assert 20 <= two.calls - before <= 30

        await first.server.report(health_pb2.HealthCheckResponse.NOT_SERVING)
        async with asyncio.timeout(5):
            while True:
                before = one.calls
                await asyncio.gather(*(embed(b"") for _ in range(10)))
                if one.calls == before:
                    break


async def test_a_replica_that_dies_leaves_the_others_answering() -> None:
    counting = Counting()
    async with program() as (process, port), probe(embed=counting.embed) as other:
        async with connect(f"ipv4:127.0.0.1:{port},{other.address}", *NAMES) as channel:
            embed = channel.unary_unary(f"/{EMBEDDING}/Embed")
            await asyncio.gather(*(embed(b"") for _ in range(10)))
            process.kill()
            await asyncio.gather(*(embed(b"") for _ in range(50)))
    assert counting.calls >= 50


async def test_a_silent_peer_is_kept_and_a_frozen_one_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in production at five times the pace: a ping every second.

    A server that finds pings too frequent hangs up at the fourth; a client that gives up pinging
    does so after the second.
    """
    name = "grpc.keepalive_time_ms"
    monkeypatch.setitem(channels.OPTIONS, name, channels.OPTIONS[name] // 5)
    async with program() as (process, port):
        async with connect(f"127.0.0.1:{port}", GENERATION) as channel:
            call = channel.unary_stream(f"/{GENERATION}/Generate")(b"")
            await soon(call.read())
            await asyncio.wait([asyncio.ensure_future(call.code())], timeout=4.5)
            assert not call.done()
            process.send_signal(signal.SIGSTOP)
            assert await soon(call.code()) == StatusCode.UNAVAILABLE


async def test_a_connection_over_a_slow_network_is_made() -> None:
    async def forward(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, late: float
    ) -> None:
        await asyncio.sleep(late)
        while part := await reader.read(65536):
            writer.write(part)
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(*server.address.rsplit(":", 1))
        await asyncio.gather(forward(reader, there[1], 0), forward(there[0], writer, 1.0))

    async with probe() as server, await asyncio.start_server(connected, "127.0.0.1", 0) as proxy:
        port = proxy.sockets[0].getsockname()[1]
        async with connect(f"127.0.0.1:{port}", EMBEDDING) as channel:
            embed = channel.unary_unary(f"/{EMBEDDING}/Embed")
            assert await embed(b"", timeout=20) is not None


async def test_a_web_proxy_in_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    async with probe() as server:
        assert (await server.embed()).model_hash == "0 texts"


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "localhost:{}", "dns:///127.0.0.1:{}"])
async def test_addresses_may_be_names_or_uris(form: str) -> None:
    async with probe() as server:
        async with connect(form.format(server.server.port), EMBEDDING) as channel:
            await channel.unary_unary(f"/{EMBEDDING}/Embed")(b"")


async def test_channels_to_one_address_do_not_share_a_connection() -> None:
    peers: list[str] = []

    async def embed(request: Any, context: Any) -> EmbedResponse:
        peers.append(context.peer())
        return EmbedResponse()

    async with probe(embed=embed) as server:
        async with connect(server.address, *NAMES) as other:
            await server.embed()
            await other.unary_unary(f"/{EMBEDDING}/Embed")(b"")
    assert len(set(peers)) == 2
