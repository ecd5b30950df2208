"""Writes files so that they are there after a crash, and says when the disk is full."""

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from services.runtime.errors import Overloaded

BLOCK = 1024 * 1024
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class File:
    """One file of an adapter: bytes, and SHA-256 in lower-case hex."""

    name: str
    size: int
    sha256: str


@contextmanager
def space() -> Iterator[None]:
    """Turn a full disk into Overloaded (STORE_FULL)."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise Overloaded("STORE_FULL", "the disk is full") from error
        raise


def write(path: Path, blocks: Iterable[bytes]) -> File:
    """Write a file that nobody may change afterwards. It lasts once `sync` was called for its
    folder."""
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for block in blocks:
            digest.update(block)
            file.write(block)
        os.fchmod(file.fileno(), 0o444)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return File(path.name, size, digest.hexdigest())


def put(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, in place of one that may be there. Raises
    OSError."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def read(path: Path) -> Iterator[bytes]:
    """Return a file's content in blocks."""
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def sync(folder: Path) -> None:
    """Make what was created in, moved to or removed from a folder last."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def size(folder: Path) -> int:
    """Return the bytes of all files in a folder, as far as they are still there."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total
