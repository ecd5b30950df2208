"""Streams of requests that carry files."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

from clients.files import FileError

CHUNK = 512 * 1024  # bytes; the services take up to 1 MiB

Source = str | Path | bytes | Iterable[bytes]
"""A file, what it holds, or that in pieces."""

T = TypeVar("T")


def can_be_read_again(source: Source) -> bool:
    """Tell whether a source yields the same when it is read once more."""
    return isinstance(source, str | Path | bytes) or iter(source) is not source


async def chunks(source: Source) -> AsyncIterator[bytes]:
    """Yield what a source holds in pieces of at most CHUNK bytes. Raises FileError."""
    if isinstance(source, str | Path):
        try:
            with await asyncio.to_thread(open, source, "rb") as file:
                while piece := await asyncio.to_thread(file.read, CHUNK):
                    yield piece
        except OSError as error:
            name = os.fspath(source)
            raise FileError(f"cannot read {name}: {error.strerror}") from error
        return
    pieces = iter([source] if isinstance(source, bytes) else source)
    while (part := await asyncio.to_thread(_next, pieces)) is not None:
        for start in range(0, len(part), CHUNK):
            yield part[start : start + CHUNK]


def _next(pieces: Iterator[bytes]) -> bytes | None:
    return next(pieces, None)


class Upload(Generic[T]):
    """Requests to stream, and the error that ended them: gRPC would cancel the call and not say."""

    def __init__(self, requests: AsyncIterator[T]) -> None:
        self._requests = requests
        self._error: Exception | None = None

    async def requests(self) -> AsyncIterator[T]:
        """Yield the requests; remember what they raise."""
        try:
            async for request in self._requests:
                yield request
        except Exception as error:
            self._error = error
            raise

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Raise what the requests raised in place of the cancellation that came of it."""
        try:
            yield
        except asyncio.CancelledError:
            if self._error:
                raise self._error from None
            raise
