"""What a failed call becomes."""

from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from services.runtime.errors import error_info

# What is said of a call that none of our services answered.
UNANSWERED = {
    grpc.StatusCode.UNAVAILABLE: (
        "SERVER_UNAVAILABLE",
        "nothing answers at {address}: start it with `tworoads up`, or see `tworoads status`",
    ),
    grpc.StatusCode.DEADLINE_EXCEEDED: ("DEADLINE", "the time for this call is over"),
}


class TworoadsError(Exception):
    """A call that failed. `code` is the gRPC status, `reason` a stable word."""

    def __init__(self, code: grpc.StatusCode, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason


@contextmanager
def translated(address: str) -> Iterator[None]:
    """Raise the failures of calls to the gateway at `address` as TworoadsError."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise TworoadsError(
            grpc.StatusCode.INVALID_ARGUMENT, "NOT_TEXT", "what was sent is not UTF-8 text"
        ) from error
    except grpc.aio.AioRpcError as error:
        code, said = error.code(), error_info(error)
        if said is None and code in UNANSWERED:
            reason, message = UNANSWERED[code]
            raise TworoadsError(code, reason, message.format(address=address)) from error
        reason = said.reason if said else code.name
        message = error.details() or code.name.lower()
        raise TworoadsError(code, reason, message) from error
