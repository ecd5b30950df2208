"""What every call passes through, on every service."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from services.runtime import metrics, tracing
from services.runtime.admission import Admission
from services.runtime.call import Call, current
from services.runtime.errors import (
    InvalidInput,
    ServiceError,
    Stopping,
    TooLate,
    Unavailable,
    from_rpc,
)
from services.runtime.gate import REQUEST_ID, Caller, Entry, Gate

OURS = ("/tworoads.", "/grpc.reflection.")  # all but the health, which everybody may ask for
DEFAULT_SECONDS = 60.0
MOST_SECONDS = 300.0
IDLE_SECONDS = 60.0
LONG = ("Watch", "Download")  # server streams of work; client streams are long by their kind
FIT_FOR_A_LOG_LINE = re.compile(r"(?!-$)[A-Za-z0-9._:-]{1,64}")

log = logging.getLogger(__name__)


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Gives each call its identity, deadline and place, logs it once, turns errors into a status.

    `gate` says who may call. Streams of responses must be async generators.
    """

    def __init__(self, admission: Admission, gate: Gate) -> None:
        self.serving = False
        self._admission = admission
        self._gate = gate
        self._under_way = 0
        self._none_under_way = asyncio.Event()
        self._none_under_way.set()

    async def ended(self) -> None:
        """Wait until no call is under way, the status of the last one sent."""
        await self._none_under_way.wait()

    def _begin(self, context: Any) -> None:
        self._under_way += 1
        self._none_under_way.clear()
        context.add_done_callback(self._end)

    def _end(self, context: Any) -> None:
        self._under_way -= 1
        if self._under_way == 0:
            self._none_under_way.set()

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if not method.startswith(OURS):
            return handler
        if not self.serving:
            return grpc.unary_unary_rpc_method_handler(_refuse)
        if handler is None:
            return None
        return _Guard(handler, method, self._gate, self._admission, self._begin).guarded()


class _Guard:
    """One call's way through: what is written here runs around the servicer's own code.

    Messages are parsed and serialised in here too, since gRPC sends the text of what fails outside
    to the caller.
    """

    def __init__(
        self,
        handler: Any,
        method: str,
        gate: Gate,
        admission: Admission,
        begin: Callable[[Any], None],
    ) -> None:
        self._handler = handler
        self._method = method
        self._gate = gate
        self._entry = Entry(Caller())
        self._admission = admission
        self._begin = begin
        self._long = handler.request_streaming or method.rpartition("/")[2].startswith(LONG)
        requests = "stream" if handler.request_streaming else "unary"
        responses = "stream" if handler.response_streaming else "unary"
        self._kind = f"{requests}_{responses}"
        self._behavior = getattr(handler, self._kind)

    def guarded(self) -> Any:
        """Return the handler that gRPC shall run."""
        if self._handler.response_streaming:
            return self._handler._replace(request_deserializer=None, **{self._kind: self._stream})
        return self._handler._replace(
            request_deserializer=None, response_serializer=None, **{self._kind: self._unary}
        )

    async def _unary(self, raw: Any, context: Any) -> Any:
        async with self._around(context):
            response = await self._behavior(self._request(raw), context)
            serialize = self._handler.response_serializer
            return serialize(response) if serialize else response

    async def _stream(self, raw: Any, context: Any) -> None:
        # Written here, not yielded to gRPC: a cancelled write then ends the servicer at once, and
        # not when its generator is collected.
        async with self._around(context):
            async with aclosing(self._behavior(self._request(raw), context)) as responses:
                async for response in responses:
                    if self._long:
                        async with _idle_limit("read"):
                            await context.write(response)
                    else:
                        await context.write(response)

    def _request(self, raw: Any) -> Any:
        parse = self._handler.request_deserializer
        if self._handler.request_streaming:
            return _requests(raw, parse, self._entry)
        self._entry.received(len(raw))
        return _parsed(raw, parse)

    @asynccontextmanager
    async def _around(self, context: Any) -> AsyncIterator[None]:
        self._begin(context)
        start = time.monotonic()
        seconds = self._seconds(context)
        deadline = None if seconds is None else start + seconds
        metadata = context.invocation_metadata()
        call = Call(
            _request_id(dict(metadata).get(REQUEST_ID)),
            peer=unquote(context.peer()),
            deadline=deadline,
            started=start,
        )
        current.set(call)
        span = tracing.NOTHING
        code = grpc.StatusCode.CANCELLED
        limit = asyncio.timeout(seconds)
        try:
            self._entry = self._gate.enter(self._method, metadata, context.auth_context())
            # Strangers cost no spans, nor do they decide what is sampled.
            span = tracing.begun(self._method, metadata, call.request_id)
            caller = self._entry.caller
            current.set(
                replace(call, tenant=caller.tenant, principal=caller.principal, entry=self._entry)
            )
            async with limit, self._admission.admit():
                with metrics.running(self._method):
                    yield
            code = grpc.StatusCode.OK
        except grpc.aio.BaseError:  # gRPC's own word that the caller has left
            raise
        except (Exception, asyncio.CancelledError) as problem:
            if _cancelled(problem):
                if context.time_remaining() == 0:
                    code = grpc.StatusCode.DEADLINE_EXCEEDED
                raise
            if error := _service_error(problem, limit.expired()):
                code = error.code
                metrics.ERRORS.labels(error.reason).inc()
                await _abort(context, error)
            else:
                code = grpc.StatusCode.INTERNAL
                log.error("%s failed", self._method, exc_info=problem)
                await context.abort(code, f"internal error, request {call.request_id}")
        finally:
            seconds = time.monotonic() - start
            self._entry.ended(code.name, seconds)
            metrics.finished(self._method, code.name, seconds)
            span.ended(code.name, blamed=code.name in tracing.FAULTS)
            source = f" from {call.peer}" if code is grpc.StatusCode.UNAUTHENTICATED else ""
            log.info("%s %s %.1f ms%s", self._method, code.name, seconds * 1e3, source)

    def _seconds(self, context: Any) -> float | None:
        remaining: float | None = context.time_remaining()
        if self._long:
            return remaining
        return DEFAULT_SECONDS if remaining is None else min(remaining, MOST_SECONDS)


def _request_id(given: Any) -> str:
    """Keep the caller's id if it is fit for a log line, else make one."""
    if isinstance(given, str) and FIT_FOR_A_LOG_LINE.fullmatch(given):
        return given
    return uuid.uuid4().hex


def _parsed(raw: Any, parse: Callable[[Any], Any] | None) -> Any:
    try:
        return parse(raw) if parse else raw
    except DecodeError:
        raise InvalidInput("REQUEST_MALFORMED", "the request is not a valid message") from None


async def _requests(
    raw: AsyncIterator[Any], parse: Callable[[Any], Any] | None, entry: Entry
) -> AsyncIterator[Any]:
    """Pass a stream of requests on; raise TooLate (IDLE) when none comes for a minute."""
    end = object()
    iterator = aiter(raw)
    while True:
        async with _idle_limit("sent"):
            request: Any = await anext(iterator, end)
        if request is end:
            return
        entry.received(len(request))
        yield _parsed(request, parse)


@asynccontextmanager
async def _idle_limit(what: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(IDLE_SECONDS):
            yield
    except TimeoutError:
        raise TooLate("IDLE", f"nothing was {what} for {IDLE_SECONDS:g} s") from None


def _cancelled(problem: BaseException) -> bool:
    """Say whether this call itself was cancelled: by its caller, its deadline, or the server's end.

    A CancelledError can also come from something that the call waited for. That one is a failure:
    taken for a cancelled call, it would leave the caller waiting.
    """
    task = asyncio.current_task()
    return isinstance(problem, asyncio.CancelledError) and bool(task and task.cancelling())


def _service_error(problem: BaseException, expired: bool) -> ServiceError | None:
    """Return what the caller may see of a problem, None if it is a bug."""
    while isinstance(problem, ExceptionGroup):  # of a task group
        problem = problem.exceptions[0]
    if isinstance(problem, TimeoutError) and expired:
        return TooLate("DEADLINE", "the time for this call is over")
    if isinstance(problem, grpc.aio.AioRpcError):
        problem = from_rpc(problem, "downstream")
    return problem if isinstance(problem, ServiceError) else None


async def _abort(context: Any, error: ServiceError) -> None:
    status = rpc_status.to_status(error.to_status())
    trailing = tuple(status.trailing_metadata or ())
    if isinstance(error, Unavailable) and not isinstance(error, Stopping):
        # The hop next to the failure has tried again already: callers further up must not.
        trailing += (("grpc-retry-pushback-ms", "-1"),)
    await context.abort(status.code, status.details, trailing)


async def _refuse(request: Any, context: Any) -> Any:
    await _abort(context, Stopping("STOPPING", "this replica is starting or stopping; try again"))
