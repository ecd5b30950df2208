import asyncio
import io
import json
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from tworoads.v1.embedding_pb2 import EmbedResponse
from tworoads.v1.generation_pb2 import GenerateResponse
from tworoads.v1.retrieval_pb2 import PutDocumentsRequest, PutDocumentsResponse

from services.runtime import interceptors
from services.runtime.call import MARGIN, current, outgoing, tenant
from services.runtime.errors import NotFound, error_info
from services.runtime.gate import Gate, Inside, Open
from services.runtime.logs import JsonFormatter
from tests.probe import EMBEDDING, failure, probe, raising, soon

MODEL = "tworoads.v1.EmbeddingService/Embed"


class Blocked:
    """A method that never answers by itself, and says when it starts and when it was cancelled."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def embed(self, request: Any, context: Any) -> EmbedResponse:
        await self._block()
        return EmbedResponse()

    async def generate(self, request: Any, context: Any) -> AsyncIterator[GenerateResponse]:
        yield GenerateResponse(text="a")
        await self._block()

    async def _block(self) -> None:
        self.started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


@contextmanager
def json_lines() -> Iterator[list[dict[str, str]]]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    lines: list[dict[str, str]] = []
    try:
        yield lines
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        lines += map(json.loads, stream.getvalue().splitlines())


@pytest.mark.parametrize("method", ["embed", "generate"])
async def test_a_bug_leaks_nothing_and_is_logged_with_the_request_id(method: str) -> None:
    with json_lines() as lines:
        async with probe(**raising(ValueError("secret"))) as server:
            seen = await failure(getattr(server, method)(metadata=(("x-request-id", "r1"),)))
    assert seen.code() == StatusCode.INTERNAL
    assert seen.details() == "internal error, request r1"
    assert "secret" not in repr(seen) and "ValueError" not in repr(seen)
    (line,) = [line for line in lines if "exception" in line]
    assert line["request"] == "r1" and "secret" in line["exception"]
    (line,) = [line for line in lines if "INTERNAL" in line["message"]]
    assert line["request"] == "r1"


async def test_a_response_of_the_wrong_type_leaks_nothing() -> None:
    async def embed(request: Any, context: Any) -> Any:
        return "secret"

    async with probe(embed=embed) as server:
        seen = await failure(server.embed(metadata=(("x-request-id", "r1"),)))
    assert (seen.code(), seen.details()) == (StatusCode.INTERNAL, "internal error, request r1")


async def test_bytes_that_are_no_message_are_refused() -> None:
    async with probe() as server:
        raw = server.channel.unary_unary(f"/{MODEL}")
        seen = await failure(raw(b"\xff\xff\xff"))
    info = error_info(seen)
    assert seen.code() == StatusCode.INVALID_ARGUMENT
    assert info and info.reason == "REQUEST_MALFORMED"


async def test_something_cancelled_inside_a_call_is_a_failure_of_that_call() -> None:
    async def embed(request: Any, context: Any) -> EmbedResponse:
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future
        return EmbedResponse()

    async with probe(embed=embed) as server:
        assert (await soon(failure(server.embed()))).code() == StatusCode.INTERNAL


async def test_a_timeout_of_the_servicers_own_is_a_bug_and_not_the_callers_deadline() -> None:
    async with probe(**raising(TimeoutError("secret"))) as server:
        assert (await failure(server.embed(timeout=30))).code() == StatusCode.INTERNAL


async def seen_call(gate: Gate | None = None, **kwargs: Any) -> tuple[str, str]:
    async def embed(request: Any, context: Any) -> EmbedResponse:
        return EmbedResponse(model_hash=f"{current.get().request_id} {tenant()}")

    async with probe(embed=embed, gate=gate) as server:
        request_id, name = (await server.embed(**kwargs)).model_hash.split()
        return request_id, name


async def test_a_fit_request_id_is_kept() -> None:
    request_id, _ = await seen_call(metadata=(("x-request-id", "Job-1.a:b_c"),))
    assert request_id == "Job-1.a:b_c"


@pytest.mark.parametrize("given", ["", "-", "a b", 'a"b', "{a}", "a" * 65])
async def test_an_unfit_request_id_is_replaced(given: str) -> None:
    request_id, _ = await seen_call(metadata=(("x-request-id", given),))
    assert request_id != given and len(request_id) == 32


@pytest.mark.parametrize(("gate", "expected"), [(Inside(), "acme"), (Open(), "default")])
async def test_the_tenant_is_taken_from_our_own_services_only(gate: Gate, expected: str) -> None:
    _, name = await seen_call(gate, metadata=(("x-tworoads-tenant", "acme"),))
    assert name == expected


async def test_without_a_tenant_it_is_the_default() -> None:
    assert (await seen_call())[1] == "default"


async def test_calls_side_by_side_never_see_each_others_identity() -> None:
    both = asyncio.Barrier(2)

    async def generate(request: Any, context: Any) -> AsyncIterator[GenerateResponse]:
        for _ in range(5):
            await both.wait()
            inner = await asyncio.create_task(read())
            yield GenerateResponse(text=f"{tenant()} {current.get().request_id} {inner}")

    async def read() -> str:
        return tenant()

    async def ask(name: str) -> set[str]:
        metadata = (("x-tworoads-tenant", name), ("x-request-id", f"id-{name}"))
        return {r.text async for r in server.generate(metadata=metadata)}

    async with probe(generate=generate) as server:
        one, two = await soon(asyncio.gather(ask("one"), ask("two")))
    assert (one, two) == ({"one id-one one"}, {"two id-two two"})
    assert current.get().request_id == "-"


@pytest.mark.parametrize(
    ("given", "least", "most"),
    [(None, 59, 60), (5.0, 4, 5.05), (1000.0, 299, 300)],  # gRPC rounds what is given up, by 1 %
)
async def test_what_remains_of_the_deadline_goes_on_less_a_margin(
    given: float | None, least: float, most: float
) -> None:
    async def embed(request: Any, context: Any) -> EmbedResponse:
        assert outgoing(at_most=0.5)["timeout"] == 0.5
        return EmbedResponse(model_hash=str(outgoing()["timeout"]))

    async with probe(embed=embed) as server:
        seconds = float((await server.embed(timeout=given)).model_hash)
    assert least - MARGIN < seconds <= most - MARGIN


@pytest.mark.parametrize("given", [None, 1000.0])
async def test_a_stream_of_work_has_no_deadline_but_its_callers(given: float | None) -> None:
    remaining: list[float | None] = []

    async def watch(request: bytes, context: Any) -> AsyncIterator[bytes]:
        remaining.append(context.time_remaining())  # gRPC has rounded it
        yield str(outgoing()["timeout"]).encode()

    async with probe(watch=watch) as server:
        (said,) = [message async for message in server.watch(b"", timeout=given)]
    if given is None:
        assert (said, remaining) == (b"None", [None])
    else:
        assert remaining[0] and remaining[0] > interceptors.MOST_SECONDS
        assert float(said) == pytest.approx(remaining[0] - MARGIN, abs=1)


async def test_no_call_goes_out_when_no_time_remains() -> None:
    calls = 0

    async def embed(request: Any, context: Any) -> EmbedResponse:
        nonlocal calls
        calls += 1
        while True:
            outgoing()
            await asyncio.sleep(0)

    async with probe(embed=embed) as server:
        seen = await failure(server.embed(timeout=1))
    assert seen.code() == StatusCode.DEADLINE_EXCEEDED and calls == 1


@pytest.mark.parametrize("method", ["embed", "generate"])
@pytest.mark.parametrize("whose", ["the caller's", "the server's"])
async def test_a_deadline_cancels_the_method(
    method: str, whose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = Blocked()
    if whose == "the server's":
        monkeypatch.setattr(interceptors, "DEFAULT_SECONDS", 0.1)
    async with probe(embed=blocked.embed, generate=blocked.generate) as server:
        timeout = 0.1 if whose == "the caller's" else None
        seen = await soon(failure(getattr(server, method)(timeout=timeout)))
        await soon(blocked.cancelled.wait())
    assert seen.code() == StatusCode.DEADLINE_EXCEEDED
    if whose == "the server's":
        info = error_info(seen)
        assert info and info.reason == "DEADLINE"


@pytest.mark.parametrize("method", ["embed", "generate"])
async def test_a_caller_that_leaves_cancels_the_method(method: str) -> None:
    blocked = Blocked()
    async with probe(embed=blocked.embed, generate=blocked.generate) as server:
        call = getattr(server, method)()
        if method == "generate":
            await call.read()
        else:
            sent = asyncio.ensure_future(call)
        await soon(blocked.started.wait())
        call.cancel()
        await soon(blocked.cancelled.wait())
        if method == "embed":
            with pytest.raises(asyncio.CancelledError):
                await sent


@pytest.mark.parametrize("how", ["leaves", "stalls past its deadline", "stalls on work"])
async def test_a_caller_that_does_not_read_ends_the_stream_at_once(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = asyncio.Event()
    request_ids = []

    async def parts() -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(100_000)
        finally:
            await asyncio.sleep(0)  # cleaning up may wait
            request_ids.append(current.get().request_id)
            ended.set()

    async def generate(request: Any, context: Any) -> AsyncIterator[GenerateResponse]:
        async with aclosing(parts()) as texts:
            async for text in texts:
                yield GenerateResponse(text=text.decode())

    async def watch(request: Any, context: Any) -> AsyncIterator[bytes]:
        async with aclosing(parts()) as texts:
            async for text in texts:
                yield text

    if how == "stalls past its deadline":
        monkeypatch.setattr(interceptors, "DEFAULT_SECONDS", 0.3)
    if how == "stalls on work":
        monkeypatch.setattr(interceptors, "IDLE_SECONDS", 0.3)
    metadata = (("x-request-id", "r1"),)
    async with probe(generate=generate, watch=watch) as server:
        on_work = how == "stalls on work"
        call = (
            server.watch(b"", metadata=metadata) if on_work else server.generate(metadata=metadata)
        )
        await call.read()
        if how == "leaves":
            call.cancel()
        await soon(ended.wait())
        call.cancel()
    assert request_ids == ["r1"]


async def test_a_stream_of_requests_that_falls_silent_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interceptors, "IDLE_SECONDS", 0.2)
    async with probe() as server:
        call = server.put()
        for _ in range(3):
            await call.write(PutDocumentsRequest())
            assert await call.read() == PutDocumentsResponse()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await soon(call.read())
    info = error_info(caught.value)
    assert caught.value.code() == StatusCode.DEADLINE_EXCEEDED
    assert info and info.reason == "IDLE"


async def test_streams_of_work_outlive_the_default_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interceptors, "DEFAULT_SECONDS", 0.05)
    monkeypatch.setattr(interceptors, "MOST_SECONDS", 0.05)

    async def watch(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"a"
        await asyncio.sleep(0.15)
        yield b"b"

    async def parts() -> AsyncIterator[bytes]:
        yield b"a"
        await asyncio.sleep(0.15)
        yield b"b"

    async with probe(watch=watch) as server:
        assert [message async for message in server.watch(b"")] == [b"a", b"b"]
        assert await server.upload(parts()) == b"ab"


async def test_an_error_in_the_middle_of_a_request_stream_is_a_status() -> None:
    async def put(requests: Any, context: Any) -> AsyncIterator[PutDocumentsResponse]:
        async for _ in requests:
            raise NotFound("CORPUS_NOT_FOUND", "there is no such corpus")
        yield PutDocumentsResponse()

    async with probe(put=put) as server:
        call = server.put()
        await call.write(PutDocumentsRequest())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await soon(call.read())
    assert caught.value.code() == StatusCode.NOT_FOUND


async def test_an_unknown_method_is_unimplemented() -> None:
    async with probe() as server:
        raw = server.channel.unary_unary(f"/{EMBEDDING}/Nothing")
        assert (await failure(raw(b""))).code() == StatusCode.UNIMPLEMENTED
