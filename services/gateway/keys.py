"""API keys: the file that holds them, and whom a key stands for.

A key is `trk_ID_SECRET`. The file has a hash of the secret, so that who reads it gets no key.
"""

import fcntl
import hashlib
import hmac
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AwareDatetime, ConfigDict, Field, TypeAdapter, ValidationError

from services.gateway.identity import PRINCIPAL_PATTERN, TENANT_PATTERN, Identity, Role
from services.gateway.reloading import Reloading
from services.runtime.errors import Unauthenticated
from services.runtime.gate import Caller

PREFIX = "trk_"
SECRET_BYTES = 32
NO_HASH = "0" * 64


@dataclass(frozen=True)
class Key:
    """One key as the file has it. Several keys of a principal are valid side by side: a new one is
    given out before the old one is revoked. `hash` is in lower-case hex."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    id: Annotated[str, Field(pattern="^[A-Za-z0-9]{1,32}$")]
    hash: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    tenant: Annotated[str, Field(pattern=f"^{TENANT_PATTERN}$")]
    principal: Annotated[str, Field(pattern=f"^{PRINCIPAL_PATTERN}$")]
    role: Role
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None

    def valid(self, now: datetime) -> bool:
        return self.revoked is None and (self.expires is None or now < self.expires)


KEYS = TypeAdapter(list[Key], config=ConfigDict(hide_input_in_errors=True))


class Keys:
    """The keys of a file, which is read again when it changes.

    Raises ValueError for a file that is not in order or that others may write, OSError for one that
    cannot be read.
    """

    def __init__(self, path: Path) -> None:
        found = path.lstat()
        # What a Secret volume shows is a symbolic link, and read-only whatever its mode says.
        if stat.S_ISREG(found.st_mode) and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ValueError(f"{path} may be written by others: chmod 600 it")
        self._file: Reloading[Mapping[str, Key]] = Reloading(path, _parse)

    def identity(self, text: str) -> Identity:
        """Return whom a key stands for. Raises Unauthenticated (CREDENTIALS_INVALID)."""
        id, _, secret = text.removeprefix(PREFIX).partition("_")
        key = self._file.current().get(id)
        # The same work whether there is such a key or not: time says nothing about it.
        same = hmac.compare_digest(_hash(secret), key.hash if key else NO_HASH)
        if key is None or not same or not key.valid(datetime.now(UTC)):
            raise Unauthenticated("CREDENTIALS_INVALID", "the key is not valid")
        return Identity(Caller(key.tenant, key.principal), key.role)


def read(path: Path) -> list[Key]:
    """Return the keys of a file. Raises ValueError and OSError."""
    return list(_parse(path.read_bytes()).values())


def add(
    path: Path, tenant: str, principal: str, role: Role, expires: datetime | None = None
) -> tuple[Key, str]:
    """Put a new key into a file, which is made if need be; return it, and its text, which nobody
    can tell again. Raises ValueError and OSError."""
    Identity(Caller(tenant, principal), role)
    with _owned(path) as keys:
        id = secrets.token_hex(4)
        while id in keys:
            id = secrets.token_hex(4)
        secret = secrets.token_urlsafe(SECRET_BYTES)
        key = Key(id, _hash(secret), tenant, principal, role, _now(), expires)
        keys[id] = key
    return key, f"{PREFIX}{id}_{secret}"


def revoke(path: Path, id: str) -> Key:
    """Make a key of a file invalid. Raises KeyError if there is none, ValueError and OSError."""
    with _owned(path) as keys:
        if keys[id].revoked is None:
            keys[id] = replace(keys[id], revoked=_now())
        return keys[id]


def _hash(secret: str) -> str:
    # A fast hash: a secret of 256 random bits cannot be guessed, unlike a password.
    return hashlib.sha256(secret.encode()).hexdigest()


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _parse(content: bytes) -> dict[str, Key]:
    try:
        keys = KEYS.validate_json(content)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"the keys are not in order: {where} {first['msg']}") from None
    by_id = {key.id: key for key in keys}
    if len(by_id) < len(keys):
        raise ValueError("the keys are not in order: two have the same id")
    return by_id


@contextmanager
def _owned(path: Path) -> Iterator[dict[str, Key]]:
    """Let the block change the keys, while no other process does, and write them all at once."""
    path = path.resolve()  # what a link leads to is replaced, not the link
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        keys = _parse(path.read_bytes()) if path.exists() else {}
        yield keys
        content = KEYS.dump_json(list(keys.values()), indent=1, exclude_none=True)
        # A new file only its owner may read and write: mkstemp sees to that.
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                if path.exists():  # it stays with those who could read it
                    before = path.stat()
                    os.fchown(descriptor, before.st_uid, before.st_gid)
                    os.fchmod(descriptor, stat.S_IMODE(before.st_mode))
                file.write(content + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
        os.fsync(folder)
    finally:
        os.close(folder)
