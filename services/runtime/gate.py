"""Who may call a server, for whom, and what it may cost them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.runtime.errors import Unauthenticated

REQUEST_ID = "x-request-id"
TENANT = "x-tworoads-tenant"
PRINCIPAL = "x-tworoads-principal"
DEFAULT_TENANT = "default"

Metadata = Sequence[tuple[str, str | bytes]]
Peer = Mapping[str, Iterable[bytes]]  # grpc.ServicerContext.auth_context()


@dataclass(frozen=True)
class Caller:
    """Whose data a call is about, and who makes it (empty if nobody has to say)."""

    tenant: str = DEFAULT_TENANT
    principal: str = ""


class Entry:
    """One call that was let in. This one costs nothing and is not recorded."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller

    def received(self, size: int) -> None:
        """Count a message of `size` bytes. Raises Overloaded if it is one too many."""

    def spent(self, tokens: int) -> None:
        """Count tokens that were read and written for the call."""

    def ended(self, code: str, seconds: float) -> None:
        """Note that the call has ended with this status; called once."""


class Gate(Protocol):
    """What stands in front of a server."""

    def enter(self, method: str, metadata: Metadata, peer: Peer) -> Entry:
        """Let a call in. Raises Unauthenticated, Forbidden, or Overloaded beyond a quota."""


class Open:
    """Lets everybody in, as the default tenant: a gateway on one machine without keys."""

    def enter(self, method: str, metadata: Metadata, peer: Peer) -> Entry:
        return Entry(Caller())


class Inside:
    """Lets our own services in and believes them whom they call for.

    `callers` are the DNS names of their certificates; empty takes any that the server's TLS took.
    Without TLS there is no certificate to look at, and the network has to keep others out.
    """

    def __init__(self, callers: Iterable[str] = ()) -> None:
        self._callers = {caller.encode() for caller in callers}

    def enter(self, method: str, metadata: Metadata, peer: Peer) -> Entry:
        encrypted = b"ssl" in peer.get("transport_security_type", ())
        if self._callers and encrypted and self._callers.isdisjoint(peer.get("peer_dns", ())):
            raise Unauthenticated("PEER_UNKNOWN", "this service is not for the caller")
        said = {key: value for key, value in metadata if isinstance(value, str)}
        return Entry(Caller(said.get(TENANT, DEFAULT_TENANT), said.get(PRINCIPAL, "")))
