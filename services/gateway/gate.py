"""Lets in who has a key or a token, to what their role allows, within their quotas."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from google.protobuf.descriptor_pb2 import MethodOptions
from google.protobuf.descriptor_pool import Default
from tworoads.v1 import answer_pb2

from services.gateway.audit import Audit
from services.gateway.forward import PUBLIC
from services.gateway.identity import Identity, Role
from services.gateway.keys import PREFIX, Keys
from services.gateway.quotas import Account, Quotas
from services.gateway.tokens import Tokens
from services.runtime.call import current
from services.runtime.errors import Forbidden, ServiceError, Unauthenticated
from services.runtime.gate import Caller, Entry, Metadata, Peer

AUTHORIZATION = "authorization"
BEARER = re.compile(r"bearer ([!-~]+)", re.IGNORECASE)  # RFC 6750, with one space
MOST_CHARACTERS = 8192
LEAST_BYTES = 100  # that a message of an upload counts as: many small ones are work too
ANSWERS = answer_pb2.DESCRIPTOR.services_by_name["AnswerService"].full_name
ANSWER = f"/{ANSWERS}/Answer"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
ADMIN = ("DeleteCorpus", "DeleteAdapter", "AcceptAdapter", "SetPolicy")


class Identified:
    """Tells callers by `authorization: Bearer KEY_OR_TOKEN`. No other header says who calls."""

    def __init__(
        self, keys: Keys | None, tokens: Tokens | None, quotas: Quotas, audit: Audit
    ) -> None:
        self._keys = keys
        self._tokens = tokens
        self._quotas = quotas
        self._audit = audit

    def enter(self, method: str, metadata: Metadata, peer: Peer) -> Entry:
        """Let a call in; see Gate.enter. Raises Unauthenticated (CREDENTIALS_MISSING,
        CREDENTIALS_INVALID), Forbidden (ROLE_MISSING), Overloaded (QUOTA_REQUESTS, QUOTA_TOKENS,
        QUOTA_STREAMS)."""
        text = _credentials(metadata)
        identity = self._identity(text)
        caller, role = identity.caller, role_for(method)
        account = self._quotas.of(caller)
        account.requests.check()  # first, and not in the audit: else one caller could fill it
        account.requests.use(1)
        try:
            if not identity.may(role):
                raise Forbidden("ROLE_MISSING", f"this needs the role {role}")
            if method == ANSWER:
                account.tokens.check()
            if method in STREAMS:
                account.open_stream()
        except ServiceError as error:
            if role != "reader":
                self._audit.write(caller, current.get(), method, error.code.name, 0.0)
            raise
        # A token is for the beginning of a call alone: it may end before a long upload does.
        again = partial(self._identity, text) if text.startswith(PREFIX) else None
        return _Counted(caller, method, account, again, None if role == "reader" else self._audit)

    def _identity(self, text: str) -> Identity:
        if text.startswith(PREFIX) and self._keys:
            return self._keys.identity(text)
        if not text.startswith(PREFIX) and self._tokens:
            return self._tokens.identity(text)
        raise _neither()


class _Counted(Entry):
    """`again` raises if the caller's key was revoked meanwhile."""

    def __init__(
        self,
        caller: Caller,
        method: str,
        account: Account,
        again: Callable[[], object] | None,
        audit: Audit | None,
    ) -> None:
        super().__init__(caller)
        self._method = method
        self._account = account
        self._again = again
        self._audit = audit
        self._call = current.get()

    def received(self, size: int) -> None:
        if self._method in UPLOADS:
            if self._again:
                self._again()
            self._account.bytes.check()
            self._account.bytes.use(max(size, LEAST_BYTES))

    def spent(self, tokens: int) -> None:
        self._account.tokens.use(tokens)

    def ended(self, code: str, seconds: float) -> None:
        if self._method in STREAMS:
            self._account.close_stream()
        if self._audit:
            self._audit.write(self.caller, self._call, self._method, code, seconds)


def _credentials(metadata: Metadata) -> str:
    given = [value for name, value in metadata if name.lower() == AUTHORIZATION]
    if not given:
        raise Unauthenticated("CREDENTIALS_MISSING", "this server needs a key: none was sent")
    value = given[0]
    if len(given) == 1 and isinstance(value, str) and len(value) <= MOST_CHARACTERS:
        if match := BEARER.fullmatch(value):
            return match[1]
    raise _neither()


def _neither() -> Unauthenticated:
    return Unauthenticated("CREDENTIALS_INVALID", "what was sent is neither a key nor a token")


def role_for(method: str) -> Role:
    """Return the least role that may call a method, such as /tworoads.v1.AnswerService/Answer."""
    return ROLE_FOR.get(method, "admin")


def _public() -> dict[str, Any]:
    """Return the descriptors of all public methods by their path."""
    services = {ANSWERS: ("Answer", "GetServerInfo"), **PUBLIC}
    return {
        f"/{service}/{name}": Default().FindServiceByName(service).methods_by_name[name]
        for service, names in services.items()
        for name in names
    }


def _role(method: str, described: Any) -> Role:
    if described.name in ADMIN:
        return "admin"
    reads = described.GetOptions().idempotency_level == MethodOptions.NO_SIDE_EFFECTS
    return "reader" if reads or method == ANSWER else "writer"


METHODS = _public()
ROLE_FOR = {method: _role(method, described) for method, described in METHODS.items()}
ROLE_FOR[REFLECTION] = "reader"
UPLOADS = {method for method, described in METHODS.items() if described.client_streaming}
STREAMS = {
    REFLECTION,
    *UPLOADS,
    *(method for method, described in METHODS.items() if described.server_streaming),
}
