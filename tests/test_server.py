import asyncio
import json
import signal
import socket
import sys
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from tworoads.v1.embedding_pb2 import EmbedRequest, EmbedResponse
from tworoads.v1.embedding_pb2_grpc import (
    EmbeddingServiceServicer,
    EmbeddingServiceStub,
    add_EmbeddingServiceServicer_to_server,
)
from tworoads.v1.generation_pb2 import GenerateResponse

from services.runtime import server as servers
from services.runtime.errors import error_info
from services.runtime.server import Server, running
from services.runtime.settings import ServerSettings
from tests.probe import EMBEDDING, GENERATION, NAMES, failure, handlers, probe, program, soon

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class OneVector(EmbeddingServiceServicer):
    async def Embed(self, request: EmbedRequest, context: Any) -> EmbedResponse:
        return EmbedResponse(model_hash="h")

    async def GetModel(self, request: Any, context: Any) -> Any:
        raise NotImplementedError


async def test_it_is_not_serving_and_refuses_calls_until_it_has_a_servicer() -> None:
    async with running(ServerSettings(grace_seconds=0), [EMBEDDING]) as server:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            embeddings = EmbeddingServiceStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest(service=EMBEDDING))
            assert (await soon(watch.read())).status == NOT_SERVING
            for name in ("", EMBEDDING):
                response = await health.Check(health_pb2.HealthCheckRequest(service=name))
                assert response.status == NOT_SERVING
            refused = await failure(embeddings.Embed(EmbedRequest()))
            info = error_info(refused)
            assert refused.code() == StatusCode.UNAVAILABLE
            assert info and info.reason == "STOPPING"
            streamed = await failure(channel.unary_stream(f"/{GENERATION}/Generate")(b""))
            assert streamed.code() == StatusCode.UNAVAILABLE

            await server.serve(lambda s: add_EmbeddingServiceServicer_to_server(OneVector(), s))

            assert (await soon(watch.read())).status == SERVING
            response = await health.Check(health_pb2.HealthCheckRequest(service=""))
            assert response.status == SERVING
            assert (await embeddings.Embed(EmbedRequest())).model_hash == "h"
            watch.cancel()


async def test_a_service_may_report_that_it_broke() -> None:
    async with probe() as server:
        health = health_pb2_grpc.HealthStub(server.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=EMBEDDING))
        assert (await soon(watch.read())).status == SERVING
        await server.server.report(NOT_SERVING)
        assert (await soon(watch.read())).status == NOT_SERVING
        watch.cancel()


async def test_reflection_lists_and_describes_the_services() -> None:
    def ask(port: int) -> tuple[list[str], str]:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            names = list(database.get_services())
            service = DescriptorPool(database).FindServiceByName(EMBEDDING)
            return names, service.methods_by_name["Embed"].input_type.full_name

    async with probe() as server:
        names, request = await asyncio.to_thread(ask, server.server.port)
    assert set(names) == {
        *NAMES,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert request == "tworoads.v1.EmbedRequest"


@pytest.mark.parametrize("setting", ["listen", "metrics"])
async def test_a_taken_port_is_named(setting: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OSError, match=address):
            async with running(ServerSettings(**{setting: address}), [EMBEDDING]):
                pass


async def test_two_servers_never_share_a_port() -> None:
    async with probe() as server:
        with pytest.raises(OSError, match=server.address):
            async with running(ServerSettings(listen=server.address), [EMBEDDING]):
                pass


async def test_messages_over_16_mebibytes_are_refused_and_smaller_ones_are_not() -> None:
    async with probe() as server:
        response = await server.embed("a" * (16 * 2**20 - 100))
        assert response.model_hash == "1 texts"
        refused = await failure(server.embed("a" * (16 * 2**20)))
        assert refused.code() == StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("how", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_a_compressed_message_is_refused_and_never_unpacked(how: grpc.Compression) -> None:
    async with probe() as server:
        refused = await failure(server.embed("a" * 1000, compression=how))
        assert refused.code() == StatusCode.UNIMPLEMENTED
        assert await server.embed("a" * 1000)


async def test_a_connection_has_no_more_streams_than_are_ever_worked_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert servers.OPTIONS["grpc.max_concurrent_streams"] == 1024
    monkeypatch.setitem(servers.OPTIONS, "grpc.max_concurrent_streams", 5)
    request = health_pb2.HealthCheckRequest()
    async with probe() as server, grpc.aio.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        await health.Check(request)  # now the limit is known
        watches = [health.Watch(request) for _ in range(8)]
        reading = [asyncio.ensure_future(watch.read()) for watch in watches]

        def answered() -> int:
            return sum(read.done() and not read.exception() for read in reading)

        async with asyncio.timeout(10):
            while answered() < 5:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)  # the others wait, or are refused
        assert answered() == 5
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*reading, return_exceptions=True)


FREEZES = """
import asyncio, sys
import grpc

async def main():
    async with grpc.aio.insecure_channel(sys.argv[1]) as channel:
        call = channel.unary_stream("/tworoads.v1.TuningService/WatchJob")(b"")
        print(await call.read(), flush=True)
        await call.read()

asyncio.run(main())
"""


async def test_a_silent_caller_is_kept_and_a_frozen_one_holds_no_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in production at a faster pace: a ping every second, answered within 3.3 s."""
    for key, pace in (("keepalive_time", 30), ("keepalive_timeout", 3), ("http2.ping_timeout", 3)):
        name = f"grpc.{key}_ms"
        monkeypatch.setitem(servers.OPTIONS, name, servers.OPTIONS[name] // pace)
    left = asyncio.Event()

    async def watch(request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            yield b"a"
            await asyncio.Event().wait()
        finally:
            left.set()

    async with probe(watch=watch) as server:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", FREEZES, server.address), stdout=asyncio.subprocess.PIPE
        )
        try:
            assert process.stdout and await soon(process.stdout.readline())
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(left.wait(), 5.5)
            process.send_signal(signal.SIGSTOP)
            await soon(left.wait())
        finally:
            process.kill()
            await process.wait()


async def scrape(port: int | None) -> str:
    def read() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=25) as response:
            return str(response.read(), "utf-8")

    return await asyncio.to_thread(read)


def value(page: str, start: str) -> float:
    (line,) = [line for line in page.splitlines() if line.startswith(start)] or ["0 0"]
    return float(line.split()[-1])


async def test_metrics_count_calls_by_method_and_code() -> None:
    settings = ServerSettings(metrics="127.0.0.1:0", grace_seconds=0)
    method = f'method="/{EMBEDDING}/Embed"'
    counted = f'tworoads_calls_total{{code="OK",{method}}}'
    running_now = f"tworoads_calls_running{{{method}}}"
    gate, inside = asyncio.Event(), asyncio.Event()

    async def embed(request: Any, context: Any) -> EmbedResponse:
        inside.set()
        await gate.wait()
        return EmbedResponse()

    async with running(settings, NAMES) as server:
        await server.serve(handlers(embed=embed))
        before = value(await scrape(server.metrics_port), counted)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            call = channel.unary_unary(f"/{EMBEDDING}/Embed")(b"")
            await soon(inside.wait())
            assert value(await scrape(server.metrics_port), running_now) == 1
            gate.set()
            await call
            await failure(channel.unary_unary(f"/{EMBEDDING}/Embed")(b"\xff"))
            await failure(channel.unary_unary(f"/{EMBEDDING}/made-up-by-a-caller")(b""))
            await failure(channel.unary_unary("/tworoads.made.up/Embed")(b""))
        page = await scrape(server.metrics_port)
    assert value(page, counted) == before + 1
    assert value(page, running_now) == 0
    assert value(page, f'tworoads_calls_total{{code="INVALID_ARGUMENT",{method}}}') >= 1
    assert "tworoads_call_seconds_bucket" in page
    assert "made" not in page
    with pytest.raises(OSError):
        await scrape(server.metrics_port)


class Stoppable:
    """A server in a task of its own, as a service's main runs it."""

    def __init__(self, settings: ServerSettings, **methods: Any) -> None:
        self._ready: asyncio.Future[Server] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.create_task(self._run(settings, methods))

    async def _run(self, settings: ServerSettings, methods: Any) -> None:
        async with running(settings, NAMES) as server:
            await server.serve(handlers(**methods))
            self._ready.set_result(server)
            await server.until_stopped()

    async def ready(self) -> Server:
        return await soon(self._ready)


async def test_a_stop_lets_streams_end_and_refuses_new_calls() -> None:
    go_on = asyncio.Event()

    async def generate(request: Any, context: Any) -> AsyncIterator[GenerateResponse]:
        yield GenerateResponse(text="a")
        await go_on.wait()
        yield GenerateResponse(text="b")

    stoppable = Stoppable(ServerSettings(), generate=generate)
    server = await stoppable.ready()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        generation = channel.unary_stream(
            f"/{GENERATION}/Generate", None, GenerateResponse.FromString
        )
        call = generation(b"")
        assert (await call.read()).text == "a"
        server.stop()
        async with asyncio.timeout(25):
            while True:
                try:
                    await channel.unary_unary(f"/{EMBEDDING}/Embed")(b"")
                except grpc.aio.AioRpcError as error:
                    assert error.code() == StatusCode.UNAVAILABLE
                    break
        assert not stoppable.ended.done()
        go_on.set()
        assert (await call.read()).text == "b"
        assert await call.read() is grpc.aio.EOF
        assert await call.code() == StatusCode.OK
        await soon(stoppable.ended)


async def test_a_call_that_outlasts_the_grace_is_cancelled() -> None:
    async def generate(request: Any, context: Any) -> AsyncIterator[GenerateResponse]:
        yield GenerateResponse(text="a")
        await asyncio.Event().wait()

    stoppable = Stoppable(ServerSettings(grace_seconds=0.1), generate=generate)
    server = await stoppable.ready()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = channel.unary_stream(f"/{GENERATION}/Generate")(b"")
        await call.read()
        server.stop()
        assert await soon(call.code()) == StatusCode.UNAVAILABLE
        await soon(stoppable.ended)


async def test_while_it_drains_it_says_so_and_still_answers() -> None:
    stoppable = Stoppable(ServerSettings(drain_seconds=4))
    server = await stoppable.ready()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=EMBEDDING))
        assert (await soon(watch.read())).status == SERVING
        server.stop()
        assert (await soon(watch.read())).status == NOT_SERVING
        await channel.unary_unary(f"/{EMBEDDING}/Embed")(b"")
        assert not stoppable.ended.done()
        await soon(stoppable.ended)  # although the watch stays open and the grace is 30 s


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_the_program_cleanly(sent: signal.Signals) -> None:
    async with program() as (process, port):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_stream(f"/{GENERATION}/Generate")(b"")
            await soon(call.read())
            process.send_signal(sent)
            assert await soon(call.code()) == StatusCode.UNAVAILABLE
            assert await soon(process.wait()) == 0


async def test_a_program_that_cannot_start_says_why_in_its_log() -> None:
    async with probe() as server:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.probe",
            stderr=asyncio.subprocess.PIPE, env={"LISTEN": server.address},
        )  # fmt: skip
        _, said = await soon(process.communicate())
    assert process.returncode == 1
    lines = said.decode().splitlines()
    assert server.address in json.loads(lines[-1])["message"]
