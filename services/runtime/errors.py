"""The errors that a caller may see, and the gRPC status that each becomes.

Code below the servicers raises these and knows nothing of gRPC. `interceptors.py` is the only place
that turns them into a status.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode
from grpc_status import rpc_status

from services.runtime import metrics

DOMAIN = "tworoads"
STOPPING = "STOPPING"  # the reason of a replica that goes or has not come yet
LONGEST_TEXT = 300  # code points: up to 12 bytes each in a header


class ServiceError(Exception):
    """Base of the errors that a caller may see. `reason` is stable; the message is not.

    `retry_after` is the number of seconds after which the caller may try again, None if the error
    does not say.
    """

    code = StatusCode.INTERNAL
    retry_after: float | None = None

    def __init__(self, reason: str, message: str, /, **metadata: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.metadata = metadata

    def to_status(self) -> Status:
        metadata = {key: _short(value) for key, value in self.metadata.items()}
        details = [_packed(ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=metadata))]
        if self.retry_after is not None:
            delay = Duration()
            delay.FromMilliseconds(int(self.retry_after * 1000))
            details.append(_packed(RetryInfo(retry_delay=delay)))
        return Status(code=self.code.value[0], message=_short(str(self)), details=details)


class InvalidInput(ServiceError):
    """The request can never succeed as it is."""

    code = StatusCode.INVALID_ARGUMENT


class Unauthenticated(ServiceError):
    """Nobody knows who calls. The caller brings a valid key."""

    code = StatusCode.UNAUTHENTICATED


class Forbidden(ServiceError):
    """The caller is known and may not do this."""

    code = StatusCode.PERMISSION_DENIED


class NotFound(ServiceError):
    """The named thing does not exist, or is another tenant's."""

    code = StatusCode.NOT_FOUND


class AlreadyExists(ServiceError):
    """The thing to create is there."""

    code = StatusCode.ALREADY_EXISTS


class NotReady(ServiceError):
    """The state forbids it. The caller changes the state, then tries again."""

    code = StatusCode.FAILED_PRECONDITION


class Conflict(ServiceError):
    """Somebody else changed the thing. The caller reads it again, then tries again."""

    code = StatusCode.ABORTED


class Overloaded(ServiceError):
    """The service is full. The caller may try again later."""

    code = StatusCode.RESOURCE_EXHAUSTED
    retry_after = 1.0


class TooLate(ServiceError):
    """The time for the call is over."""

    code = StatusCode.DEADLINE_EXCEEDED


class Unavailable(ServiceError):
    """Something that this service needs is down. The caller may try again."""

    code = StatusCode.UNAVAILABLE
    retry_after = 1.0


class Stopping(Unavailable):
    """This replica goes or has not come yet; another one may answer at once."""

    retry_after = 0.0


ERRORS: dict[StatusCode, type[ServiceError]] = {
    error.code: error
    for error in (
        InvalidInput,
        NotFound,
        AlreadyExists,
        NotReady,
        Conflict,
        Overloaded,
        TooLate,
        Unavailable,
    )
}


@contextmanager
def downstream(service: str) -> Iterator[None]:
    """Translate the failures of calls to `service`, a word such as "embedding".

    What one of our services said for the caller (an ErrorInfo of our domain) goes on with its
    reason; every other text stays here. A service that cannot be reached becomes Unavailable with
    the reason SERVICE_UNAVAILABLE.
    """
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error, service) from error


def from_rpc(error: grpc.aio.AioRpcError, service: str) -> Exception:
    """Return what to raise here for a failed call to `service`; see `downstream`."""
    code = error.code()
    said = error_info(error)
    if said is not None and code in ERRORS and code is not StatusCode.UNAVAILABLE:
        return ERRORS[code](said.reason, error.details() or "", **said.metadata)
    if said is not None and code is StatusCode.UNAVAILABLE and said.reason != STOPPING:
        return Unavailable(said.reason, f"the {service} service cannot answer now; try again")
    if code in (StatusCode.UNAVAILABLE, StatusCode.CANCELLED):
        metrics.UNSERVED.labels(service).inc()
        reason = f"{service.upper()}_UNAVAILABLE"
        return Unavailable(reason, f"the {service} service is away; try again")
    if code is StatusCode.DEADLINE_EXCEEDED:
        return TooLate("DEADLINE", f"the {service} service did not answer in time")
    return RuntimeError(f"{service} failed with {code.name}: {error.details()}")


def error_info(error: grpc.aio.AioRpcError) -> ErrorInfo | None:
    """Return the ErrorInfo that one of our services put into a failed call, None without one."""
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        info = ErrorInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            return info
    return None


def _short(text: str) -> str:
    """Cut what a message quotes of its request: a status beyond 8 KiB does not get through."""
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


def _packed(message: ErrorInfo | RetryInfo) -> Any:
    detail = Any()
    detail.Pack(message)
    return detail
