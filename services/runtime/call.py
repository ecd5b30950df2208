"""What travels with a call: its request id, who makes it for whom, and its deadline.

The server interceptor sets it on the way in, `outgoing` puts it on every call that goes further.
"""

import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from services.runtime import tracing
from services.runtime.errors import TooLate
from services.runtime.gate import DEFAULT_TENANT, PRINCIPAL, REQUEST_ID, TENANT, Caller, Entry

MARGIN = 0.05  # seconds kept back, so that the answer of a call that timed out still gets home


@dataclass(frozen=True)
class Call:
    """One incoming call. `peer` is the address that it came from, as gRPC writes it; `deadline` is
    on the clock of `time.monotonic`, None without a limit."""

    request_id: str = "-"
    tenant: str = DEFAULT_TENANT
    principal: str = ""
    peer: str = ""
    deadline: float | None = None
    entry: Entry = field(default=Entry(Caller()), compare=False)
    started: float = field(default_factory=time.monotonic)


NO_CALL = Call()
current: ContextVar[Call] = ContextVar("call", default=NO_CALL)


def tenant() -> str:
    """Return whose data the current call is about."""
    return current.get().tenant


def author() -> str:
    """Return who makes the current call: the principal, or the tenant if nobody has to say."""
    return current.get().principal or tenant()


def outgoing(at_most: float | None = None) -> dict[str, Any]:
    """Return the keyword arguments of a call to another service: identity and what time remains.

    `at_most` is a limit in seconds of this call's own. Raises TooLate when no time remains.
    """
    call = current.get()
    timeout = at_most
    if call.deadline is not None:
        remaining = call.deadline - time.monotonic() - MARGIN
        if remaining <= 0:
            raise TooLate("DEADLINE", "the time for this call is over")
        timeout = remaining if at_most is None else min(at_most, remaining)
    return {
        "metadata": (
            (REQUEST_ID, call.request_id),
            (TENANT, call.tenant),
            (PRINCIPAL, call.principal),
            *tracing.headers(),
        ),
        "timeout": timeout,
    }
