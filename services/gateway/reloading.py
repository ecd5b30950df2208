"""A file that is read again when it changes."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")
Signature = tuple[int, int, int, int]

SECONDS = 1.0  # at least, between two looks at the file

log = logging.getLogger(__name__)


class Reloading(Generic[T]):
    """What `parse` makes of a file now. Once it was good, a bad file is logged and changes nothing.

    `parse` raises ValueError for bad content. Raises the same, or OSError, at first.
    """

    def __init__(self, path: Path, parse: Callable[[bytes], T]) -> None:
        self._path = path
        self._parse = parse
        self._signature: Signature | None
        self._value, self._signature = self._read()
        self._looked = time.monotonic()

    def current(self) -> T:
        """Return the content. Looks at the file, which blocks for some microseconds."""
        now = time.monotonic()
        if now - self._looked >= SECONDS:
            self._looked = now
            self._look()
        return self._value

    def _look(self) -> None:
        signature: Signature | None = None
        try:
            signature = _signature(os.stat(self._path))
            if signature != self._signature:
                self._value, signature = self._read()
                log.info("read %s again", self._path)
        except (OSError, ValueError) as error:
            if signature != self._signature:  # said once, not every second
                log.error("%s cannot be used, what it said before holds: %s", self._path, error)
        self._signature = signature

    def _read(self) -> tuple[T, Signature]:
        with self._path.open("rb") as file:
            signature = _signature(os.fstat(file.fileno()))
            return self._parse(file.read()), signature


def _signature(stat: os.stat_result) -> Signature:
    """Return what differs after a write, and after Kubernetes has swapped the symbolic link that
    leads to a Secret."""
    return stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_dev
