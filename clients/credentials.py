"""Who a client says it is, and how it knows the server: arguments first, else the environment."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from clients.errors import TworoadsError
from services.runtime.address import is_loopback

FIT_FOR_A_HEADER = re.compile(r"[!-~]+")


@dataclass(frozen=True)
class Credentials:
    """A key or token, empty for none, and how the server is known: by TLS with the authorities in
    the file `ca`, by default those of the system, or not at all."""

    key: str = field(default="", repr=False)
    ca: Path | None = None
    tls: bool = False


def credentials(
    address: str, key: str = "", ca: str | os.PathLike[str] | None = None, tls: bool = False
) -> Credentials:
    """Return what to call the server at `address` with.

    What is not given is taken from TWOROADS_KEY_FILE (a file), TWOROADS_KEY, TWOROADS_CA and
    TWOROADS_TLS=1; an authority means TLS. Raises TworoadsError for files that cannot be read, for
    what cannot be a key, and for a key that would go over a network in the clear, unless
    TWOROADS_INSECURE=1.
    """
    key = key.strip() or _key()
    if key and not FIT_FOR_A_HEADER.fullmatch(key):
        raise _refused("KEY_INVALID", "this is no key: it has spaces or characters of no key")
    found = ca or os.environ.get("TWOROADS_CA")
    authority = Path(found) if found else None
    if authority and not os.access(authority, os.R_OK):
        raise _refused("CA_UNREADABLE", f"the certificates in {authority} cannot be read")
    tls = tls or authority is not None or os.environ.get("TWOROADS_TLS") == "1"
    safe = tls or is_loopback(address) or os.environ.get("TWOROADS_INSECURE") == "1"
    if key and not safe:
        message = (
            f"the key would go to {address} for all to read: use TLS (TWOROADS_TLS=1, or"
            " TWOROADS_CA=FILE for an authority of your own), or TWOROADS_INSECURE=1 if nobody"
            " else can listen"
        )
        raise _refused("KEY_IN_THE_CLEAR", message)
    return Credentials(key, authority, tls)


def _key() -> str:
    file = os.environ.get("TWOROADS_KEY_FILE")
    if not file:
        return os.environ.get("TWOROADS_KEY", "").strip()
    try:
        return Path(file).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise _refused("KEY_FILE_UNREADABLE", f"the key file {file} cannot be read") from error


def _refused(reason: str, message: str) -> TworoadsError:
    return TworoadsError(grpc.StatusCode.UNAUTHENTICATED, reason, message)
