"""Traces end to end, as a collector on this machine gets them."""

import asyncio
import io
import logging
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from prometheus_client import generate_latest
from tworoads.v1.embedding_pb2 import EmbedResponse
from tworoads.v1.tuning_pb2_grpc import TuningServiceStub

from clients.client import Client
from clients.documents import NewDocument
from clients.errors import TworoadsError
from services.generation.adapter_store import AdapterStore
from services.generation.adapters import Adapters
from services.generation.service import Finish, GenerationService, Model, Piece
from services.prompts.rendering import Renderer
from services.runtime import tracing
from services.runtime.errors import InvalidInput, Unauthenticated, Unavailable
from services.runtime.gate import Entry
from services.runtime.logs import JsonFormatter
from tests.fake_engine import FakeEngine
from tests.probe import failure, probe, raising
from tests.small_stack import SmallStack, small_stack
from tests.tiny_tokenizer import TinyTokenizer

QUESTION = "How many days of leave does canary-question get?"
DOCUMENT = "Employees get 27 days of paid leave, says canary-document."
ANSWER = "Employees get 27 days of paid leave, says canary-answer."


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans that it gets."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str, kind: Any) -> Span:
        (span,) = [s for s in self.spans if s.name == name and s.kind == kind]
        return span


@contextmanager
def collecting() -> Iterator[Collector]:
    """Trace while the block runs; behind it the collector has all spans."""
    collector = Collector()
    # Not of the event loop: the flush at the end of the block holds that up.
    server = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.MonkeyPatch.context() as patient:
            patient.setattr(tracing, "FLUSH_SECONDS", 25.0)
            with tracing.exporting("tests", f"127.0.0.1:{port}"):
                yield collector
    finally:
        server.stop(None).wait()


def attributes(span: Span) -> dict[str, Any]:
    values = {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}
    return {
        key: [v.string_value for v in value.values] if hasattr(value, "values") else value
        for key, value in values.items()
    }


async def until(true: Callable[[], bool], seconds: float = 25.0) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.002)


async def fill(client: Client) -> None:
    await client.create_corpus("c")
    async for _ in client.ingest("c", [NewDocument("leave", DOCUMENT.encode(), "text/plain")]):
        pass


def engine_service(folder: Path) -> tuple[FakeEngine, GenerationService]:
    engine = FakeEngine()
    engine.model = Model("tiny", engine.model.hash, "float32", 100_000)
    engine.pieces = [
        Piece(ANSWER, 9, cached_tokens=5),
        Piece("", 1, finish=Finish("stop", 10.0, 10.25, 11.25)),
    ]
    nowhere = TuningServiceStub(grpc.aio.insecure_channel("127.0.0.1:1"))
    store = AdapterStore.open(folder)
    adapters = Adapters(store.__enter__(), nowhere, engine, engine.model.hash, 4, 16)
    return engine, GenerationService(engine, Renderer(TinyTokenizer()), adapters)


async def test_one_answer_is_one_trace_from_the_client_to_the_engine(tmp_path: Path) -> None:
    engine, service = engine_service(tmp_path / "adapters")
    with collecting() as collector:
        async with small_stack(tmp_path / "stack", writer=service) as stack:
            async with Client(stack.address) as client:
                await fill(client)
                answer = await client.ask(QUESTION, "c", "rag")
    assert answer.text == ANSWER and answer.citations

    asked = "tworoads.v1.AnswerService/Answer"
    root = collector.named(asked, Span.SPAN_KIND_CLIENT)
    assert not root.parent_span_id
    spans = {s.span_id: s for s in collector.spans if s.trace_id == root.trace_id}
    tree = Counter(
        (s.name, spans[s.parent_span_id].name) for s in spans.values() if s.parent_span_id
    )
    generate = "tworoads.v1.GenerationService/Generate"
    search = "tworoads.v1.RetrievalService/Search"
    assert tree == {
        (asked, asked): 1,  # the gateway's, under the client's
        ("tworoads.v1.GenerationService/GetModel", asked): 1,
        (search, asked): 1,
        ("retrieval", search): 1,
        ("tworoads.v1.EmbeddingService/Embed", "retrieval"): 1,
        (generate, asked): 1,
        ("chat tiny", generate): 1,
    }
    gateway = collector.named(asked, Span.SPAN_KIND_SERVER)
    seen = attributes(gateway)
    assert seen.pop("tworoads.request_id")
    assert seen == {
        "rpc.system.name": "grpc",
        "rpc.method": asked,
        "rpc.response.status_code": "OK",
    }
    seen = attributes(collector.named("chat tiny", Span.SPAN_KIND_INTERNAL))
    assert seen.pop("gen_ai.usage.input_tokens") == len(engine.asked[0][0])
    assert 0 < seen.pop("gen_ai.response.time_to_first_chunk") < 60
    assert seen == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": engine.asked[0][1].max_tokens,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.usage.cache_read.input_tokens": 5,
        "gen_ai.usage.output_tokens": 10,
        "gen_ai.response.finish_reasons": ["stop"],
        "tworoads.adapter": "",
    }
    (found,) = [span for span in spans.values() if span.name == "retrieval"]
    assert attributes(found) == {
        "gen_ai.operation.name": "retrieval",
        "gen_ai.retrieval.top_k": 3,
        "tworoads.passages": 1,
    }


async def test_a_reader_who_leaves_still_stops_the_backends(tmp_path: Path) -> None:
    with collecting() as collector:
        async with small_stack(tmp_path) as stack, Client(stack.address) as client:
            stack.generation.hold_after = 2
            async with aclosing(client.answer(QUESTION, path="base")) as events:
                async for _ in events:
                    if stack.generation.running:
                        break
            await until(lambda: stack.generation.running == 0)
    asked = "tworoads.v1.AnswerService/Answer"
    generated = "tworoads.v1.GenerationService/Generate"
    for name, kind in (
        (asked, Span.SPAN_KIND_CLIENT),
        (asked, Span.SPAN_KIND_SERVER),
        (generated, Span.SPAN_KIND_SERVER),
    ):
        span = collector.named(name, kind)
        assert attributes(span)["rpc.response.status_code"] == "CANCELLED"
        assert span.status.code == Status.STATUS_CODE_UNSET


async def test_a_unary_call_that_is_cancelled_still_stops_the_backends(tmp_path: Path) -> None:
    with collecting() as collector:
        async with small_stack(tmp_path) as stack, Client(stack.address) as client:
            await fill(client)
            meeting = stack.embedding.meeting = asyncio.Barrier(2)
            searching = asyncio.create_task(client.search(QUESTION, "c"))
            await until(lambda: meeting.n_waiting == 1)
            searching.cancel()
            await until(lambda: meeting.n_waiting == 0)
            with pytest.raises(asyncio.CancelledError):
                await searching
    searched = [s for s in collector.spans if s.name == "tworoads.v1.RetrievalService/Search"]
    assert len(searched) == 3  # client, gateway, retrieval
    for span in searched:
        assert attributes(span)["rpc.response.status_code"] == "CANCELLED"
    (work,) = [s for s in collector.spans if s.name == "retrieval"]
    assert attributes(work)["error.type"] == "CANCELLED"
    assert work.status.code == Status.STATUS_CODE_UNSET


async def test_an_engine_that_is_left_says_how_far_it_came(tmp_path: Path) -> None:
    engine, service = engine_service(tmp_path / "adapters")
    engine.pieces, engine.waits = engine.pieces[:1], True
    with collecting() as collector:
        async with small_stack(tmp_path / "stack", writer=service) as stack:
            async with Client(stack.address) as client:
                async with aclosing(client.answer(QUESTION, path="base")) as events:
                    async for event in events:
                        if event == ANSWER or getattr(event, "text", "") == ANSWER:
                            break
                await asyncio.wait_for(engine.idle.wait(), 25)
    seen = attributes(collector.named("chat tiny", Span.SPAN_KIND_INTERNAL))
    assert seen["error.type"] == "CANCELLED"
    assert seen["gen_ai.usage.output_tokens"] == 9
    assert "gen_ai.response.finish_reasons" not in seen


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (None, "OK", Status.STATUS_CODE_UNSET),
        (InvalidInput("X", "x"), "INVALID_ARGUMENT", Status.STATUS_CODE_UNSET),
        (Unavailable("X", "x"), "UNAVAILABLE", Status.STATUS_CODE_ERROR),
        (ValueError("canary"), "INTERNAL", Status.STATUS_CODE_ERROR),
    ],
)
async def test_a_span_says_how_its_call_ended(
    error: Exception | None, code: str, status: Any
) -> None:
    with collecting() as collector:
        async with probe(**raising(error) if error else {}) as server:
            if error:
                await failure(server.embed())
            else:
                await server.embed()
    (span,) = collector.spans
    assert attributes(span)["rpc.response.status_code"] == code
    assert span.status.code == status
    assert not span.events and b"canary" not in span.SerializeToString()


@pytest.mark.parametrize("given", ["", "garbage", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
async def test_a_traceparent_that_is_none_begins_a_trace(given: str) -> None:
    with collecting() as collector:
        async with probe() as server:
            await server.embed(metadata=(("traceparent", given),))
    (span,) = collector.spans
    assert any(span.trace_id) and not span.parent_span_id


async def test_a_stranger_costs_no_span_whatever_their_traceparent_says() -> None:
    class Closed:
        def enter(self, method: str, metadata: Any, peer: Any) -> Entry:
            raise Unauthenticated("CREDENTIALS_MISSING", "none")

    with collecting() as collector:
        async with probe(gate=Closed()) as server:
            sampled = f"00-{'1' * 32}-{'2' * 16}-01"
            await failure(server.embed(metadata=(("traceparent", sampled),)))
    assert not collector.spans


async def test_a_client_that_traces_by_itself_is_the_parent(tmp_path: Path) -> None:
    from opentelemetry.sdk.trace import TracerProvider

    with collecting() as collector:
        async with small_stack(tmp_path) as stack, Client(stack.address) as client:
            with TracerProvider().get_tracer("app").start_as_current_span("app") as own:
                await client.ask(QUESTION, path="base")
    root = collector.named("tworoads.v1.AnswerService/Answer", Span.SPAN_KIND_CLIENT)
    assert root.parent_span_id == own.get_span_context().span_id.to_bytes(8, "big")
    assert trace.get_current_span() is trace.INVALID_SPAN


@pytest.mark.parametrize("listens", [False, True])
async def test_a_collector_that_does_not_answer_costs_no_call(
    listens: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "FLUSH_SECONDS", 0.2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if listens:  # and never says a word
            taken.listen()
        async with small_stack(tmp_path) as stack:
            with tracing.exporting("tests", f"127.0.0.1:{taken.getsockname()[1]}"):
                async with Client(stack.address) as client:
                    for _ in range(20):
                        assert (await client.ask(QUESTION, path="base")).text
                ended = time.monotonic()
            assert time.monotonic() - ended < 5


async def test_no_text_of_a_user_is_in_a_span_a_log_line_or_a_metric(tmp_path: Path) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        with collecting() as collector:
            async with small_stack(tmp_path) as stack, Client(stack.address) as client:
                stack.generation.answer = ANSWER
                await fill(client)
                assert (await client.ask(QUESTION, "c", "rag")).text == ANSWER
                assert await client.search(QUESTION, "c")
                with pytest.raises(TworoadsError):
                    await client.ask(QUESTION, "canary-corpus", "rag")
                await _left_in_the_middle(stack, client)
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    written = stream.getvalue()
    assert "AnswerService/Answer" in written and "trace" in written
    assert "canary" not in written
    assert collector.spans
    assert not any(b"canary" in span.SerializeToString() for span in collector.spans)
    assert b"canary" not in generate_latest()


async def _left_in_the_middle(stack: SmallStack, client: Client) -> None:
    stack.generation.hold_after = 2
    async with aclosing(client.answer(QUESTION, "c", "rag")) as events:
        async for _ in events:
            if stack.generation.running:
                break
    await until(lambda: stack.generation.running == 0)


async def test_without_a_collector_nothing_is_sent_along_or_imported(tmp_path: Path) -> None:
    seen = []

    async def embed(request: Any, context: Any) -> EmbedResponse:
        seen.append([key for key, _ in context.invocation_metadata()])
        assert tracing.headers() == ()
        return EmbedResponse()

    async with probe(embed=embed) as server:
        await server.embed()
    assert len(seen) == 1 and "traceparent" not in seen[0]
    script = """
import sys
import clients.cli.app, services.gateway.__main__, services.generation.service
import services.embedding.service, services.retrieval.service
from services.runtime import tracing
with tracing.exporting("test"), tracing.span("chat", "m", {}) as span:
    span.set({"a": 1})
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    assert _python(script).stdout == "[]\n"


@pytest.mark.parametrize("by", ["setting", "variable"])
def test_a_service_says_what_is_missing_when_it_shall_trace_and_cannot(by: str) -> None:
    script = f"""
import sys
sys.modules["opentelemetry.sdk.trace"] = None
from services.runtime.server import run
from services.runtime.settings import ServerSettings
async def main():
    print("began")
run(main, ServerSettings(traces="{"127.0.0.1:4317" if by == "setting" else ""}"))
"""
    env = {} if by == "setting" else {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317"}
    ended = _python(script, **env)
    assert ended.returncode == 1 and not ended.stdout
    assert "install tworoads[traces]" in ended.stderr


def _python(script: str, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    return subprocess.run(
        [sys.executable, "-c", script],
        env=kept | env,
        capture_output=True,
        text=True,
        timeout=120,
    )
