"""Traces of calls, from the client to the engine, by OpenTelemetry.

Nothing of OpenTelemetry is imported, and a span costs nothing, unless a collector is named. There
is a span around every call that a server gets and around the work that is worth one, and calls to
other services carry it on. OpenTelemetry's own interceptors for gRPC are not taken: with them the
cancellation of a call does not reach the server. No span has a text of a question, a document or an
answer.
"""

import asyncio
import importlib.metadata
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partialmethod
from typing import TYPE_CHECKING, Any

import grpc

from services.runtime.errors import ServiceError
from services.runtime.status import now

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

# Where OpenTelemetry's own variables name the collector.
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
FLUSH_SECONDS = 2.0  # that the end of a process waits for the collector
TRACEPARENT = "traceparent"  # of W3C Trace Context

# Names of OpenTelemetry's semantic conventions: those for RPC, and those for generative AI, which
# still change (semantic-conventions-genai 0.1).
RPC_SYSTEM = "rpc.system.name"
RPC_METHOD = "rpc.method"
RPC_STATUS = "rpc.response.status_code"
ERROR_TYPE = "error.type"
OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"
REQUEST_MODEL = "gen_ai.request.model"
MAX_TOKENS = "gen_ai.request.max_tokens"
TEMPERATURE = "gen_ai.request.temperature"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
FINISH_REASONS = "gen_ai.response.finish_reasons"
FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"  # seconds
TOP_K = "gen_ai.retrieval.top_k"
DIMENSION = "gen_ai.embeddings.dimension.count"
# Our own.
REQUEST_ID = "tworoads.request_id"
ADAPTER = "tworoads.adapter"
PASSAGES = "tworoads.passages"
TEXTS = "tworoads.texts"

# What a server is to blame for; the other codes say what its caller did.
FAULTS = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)

Attributes = Mapping[str, str | int | float | Sequence[str]]
Headers = tuple[tuple[str, str], ...]

_tracer: "Tracer | None" = None


class NotInstalled(RuntimeError):
    """A collector is named, and OpenTelemetry is not there."""


class Span:
    """A part of the work. This one, of a process that does not trace, keeps nothing."""

    def set(self, attributes: Attributes) -> None:
        """Keep attributes. None of them may be a user's text."""

    def ended(self, code: str, blamed: bool) -> None:
        """End with a gRPC status; `blamed` says whether that is an error of this side."""


class _Recorded(Span):
    def __init__(self, span: Any) -> None:
        self._span = span

    def set(self, attributes: Attributes) -> None:
        self._span.set_attributes(attributes)

    def ended(self, code: str, blamed: bool) -> None:
        if not self._span.is_recording():  # gRPC may say it twice
            return
        self._span.set_attribute(RPC_STATUS, code)
        if code != "OK":
            self._span.set_attribute(ERROR_TYPE, code)
        if blamed:
            from opentelemetry.trace import StatusCode

            self._span.set_status(StatusCode.ERROR, code)
        self._span.end()


NOTHING = Span()


@contextmanager
def exporting(service: str, endpoint: str = "") -> Iterator[None]:
    """Send the spans of this process to a collector while the block runs.

    `endpoint` is HOST:PORT or a URL; if it is empty, OTEL_EXPORTER_OTLP_ENDPOINT is taken, and
    without that nothing is traced. OpenTelemetry's other variables hold too. A collector that is
    away costs spans, never a call. Raises NotInstalled.
    """
    global _tracer
    endpoint = endpoint or next(filter(None, map(os.environ.get, ENDPOINTS)), "")
    if not endpoint:
        yield
        return
    try:
        provider = _provider(os.environ.get("OTEL_SERVICE_NAME", service), endpoint)
    except ImportError as error:
        raise NotInstalled(
            f"traces shall go to {endpoint}, but OpenTelemetry is not installed:"
            " install tworoads[traces], or name no collector"
        ) from error
    _tracer = provider.get_tracer("tworoads", importlib.metadata.version("tworoads"))
    try:
        yield
    finally:
        _tracer = None
        # In a thread of its own, since the library takes no limit and waits for half a minute.
        flush = threading.Thread(target=provider.shutdown, daemon=True)
        flush.start()
        flush.join(FLUSH_SECONDS)


def begun(method: str, metadata: Sequence[tuple[str, str | bytes]], request_id: str) -> Span:
    """Begin the span of a call that a server got, as the current one of the call's own task."""
    if _tracer is None:
        return NOTHING
    from opentelemetry.context import attach
    from opentelemetry.trace import SpanKind, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    parent = TraceContextTextMapPropagator().extract(
        {key: value for key, value in metadata if key == TRACEPARENT and isinstance(value, str)}
    )
    span = _tracer.start_span(
        method.lstrip("/"), parent, SpanKind.SERVER, _call(method) | {REQUEST_ID: request_id}
    )
    attach(set_span_in_context(span))  # its task ends with the call: nobody has to detach it
    return _Recorded(span)


@contextmanager
def span(operation: str, name: str, attributes: Attributes) -> Iterator[Span]:
    """Trace the block as work of this process: an `operation` of generative AI on `name`, such as
    "chat" with a model. It is not an error if it was cancelled."""
    if _tracer is None:
        yield NOTHING
        return
    from opentelemetry.trace import StatusCode

    with _tracer.start_as_current_span(
        f"{operation} {name}".rstrip(),
        attributes={OPERATION: operation, **attributes},
        record_exception=False,  # its message may have a user's text
        set_status_on_exception=False,
    ) as recorded:
        try:
            yield _Recorded(recorded)
        except (asyncio.CancelledError, GeneratorExit):
            recorded.set_attribute(ERROR_TYPE, "CANCELLED")
            raise
        except BaseException as error:
            kind = error.reason if isinstance(error, ServiceError) else type(error).__name__
            recorded.set_attribute(ERROR_TYPE, kind)
            recorded.set_status(StatusCode.ERROR, kind)
            raise


def headers() -> Headers:
    """Return the metadata that makes a call to another service part of this trace."""
    if _tracer is None:
        return ()
    from opentelemetry.trace import get_current_span

    return _header(get_current_span())


def trace_id() -> str:
    """Return the id of the current trace in hex, empty if there is none."""
    return dict(headers()).get(TRACEPARENT, "--").split("-")[1]


def traced(channel: grpc.aio.Channel) -> grpc.aio.Channel:
    """Return a client's channel, with a span around each call.

    They go where `exporting` sends them, or where the client's own OpenTelemetry does. Without
    either it is the channel itself.
    """
    if _tracer is not None:
        return _Traced(channel, _tracer)
    if "opentelemetry.trace" in sys.modules:
        return _Traced(channel, sys.modules["opentelemetry.trace"].get_tracer("tworoads"))
    return channel


class _Traced:
    """Makes the calls of a channel, which stay what they are: no interceptor is between."""

    def __init__(self, channel: grpc.aio.Channel, tracer: "Tracer") -> None:
        self._channel = channel
        self._tracer = tracer

    def _method(self, kind: str, method: str, *arguments: Any, **options: Any) -> Any:
        from opentelemetry.trace import SpanKind

        make = getattr(self._channel, kind)(method, *arguments, **options)

        def call(*arguments: Any, metadata: Any = None, **options: Any) -> Any:
            span = self._tracer.start_span(
                method.lstrip("/"), kind=SpanKind.CLIENT, attributes=_call(method)
            )
            recorded = _Recorded(span)
            started = make(*arguments, metadata=(*(metadata or ()), *_header(span)), **options)

            def ended(call: Any) -> None:
                code = now(call.code()).name
                recorded.ended(code, blamed=code not in ("OK", "CANCELLED"))

            started.add_done_callback(ended)
            return started

        return call

    unary_unary = partialmethod(_method, "unary_unary")
    unary_stream = partialmethod(_method, "unary_stream")
    stream_unary = partialmethod(_method, "stream_unary")
    stream_stream = partialmethod(_method, "stream_stream")


def _call(method: str) -> dict[str, str]:
    return {RPC_SYSTEM: "grpc", RPC_METHOD: method.lstrip("/")}


def _header(span: Any) -> Headers:
    context = span.get_span_context()
    if not context.is_valid:
        return ()
    return (
        (
            TRACEPARENT,
            f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}",
        ),
    )


def _provider(service: str, endpoint: str) -> "TracerProvider":
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    exporter = OTLPSpanExporter(
        endpoint=endpoint if "://" in endpoint else f"http://{endpoint}",
        channel_options=(("grpc.enable_http_proxy", 0),),  # type: ignore[arg-type]
    )
    provider = TracerProvider(
        resource=Resource.create({"service.namespace": "tworoads", "service.name": service}),
        shutdown_on_exit=False,  # `exporting` does it
    )
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider
