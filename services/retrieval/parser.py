"""Parses documents in child processes, which are killed and replaced when one misbehaves."""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import deque
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType
from typing import Self

from services.retrieval.parser_child import LENGTH, MAX_ANSWER_BYTES, READY
from services.retrieval.parsing import DEFAULT_LIMITS, Limits, Parsed, Section
from services.runtime.errors import InvalidInput, Unavailable

_START_SECONDS = 60.0
_PIPE_BYTES = 1 << 20
_INLINE_BYTES = 200_000  # an answer above it is decoded beside the event loop
_PASSED_ON = ("LD_LIBRARY_PATH", "LANG", "LC_ALL")


class Parser:
    """Use as `async with Parser() as parser`, then `await parser.parse(data, media_type)`.

    processes: documents parsed at a time. seconds: wall time for one. memory_mb: address space of a
    process, libraries included (MiB). module: the module whose `parse` the processes call.
    """

    def __init__(
        self,
        processes: int = 1,
        seconds: float = 20.0,
        memory_mb: int = 1024,
        limits: Limits = DEFAULT_LIMITS,
        module: str = "services.retrieval.parsing",
    ) -> None:
        self.processes = processes
        self._limits = limits
        self._slots = asyncio.Semaphore(processes)  # wakes callers in the order they came
        arguments = (module, str(seconds), str(memory_mb), json.dumps(asdict(limits)))
        self._children = [_Child(arguments, seconds, limits) for _ in range(processes)]
        self._idle = deque(self._children)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for child in self._children:
            await child.close()
        for _ in self._children:  # callers in work or waiting get PARSER_CLOSED and leave
            await self._slots.acquire()

    async def parse(self, data: bytes, media_type: str) -> Parsed:
        """Reads a document; callers are served in order, and one that is cancelled frees its place.

        Raises InvalidInput with the reasons of `parsing.parse`, PARSE_TIMEOUT, PARSE_MEMORY or
        PARSE_CRASHED; Unavailable PARSER_NOT_STARTED or PARSER_CLOSED.
        """
        if len(data) > self._limits.input_bytes:
            raise InvalidInput(
                "TOO_LARGE", f"the document has over {self._limits.input_bytes} bytes"
            )
        async with self._slots:
            child = self._idle.popleft()
            try:
                return await child.parse(data, media_type)
            finally:
                self._idle.append(child)


class _Child:
    """A process that lives until a document takes it down; the next document starts another."""

    def __init__(self, arguments: tuple[str, ...], seconds: float, limits: Limits) -> None:
        self._arguments = arguments
        self._seconds = seconds
        self._text_bytes = 4 * limits.characters
        self._process: Process | None = None
        self._closed = False

    async def parse(self, data: bytes, media_type: str) -> Parsed:
        process = await self._running()
        try:
            async with asyncio.timeout(self._seconds):
                await _write_frames(process, media_type.encode(errors="replace"), data)
                answer = await _read_frame(process, MAX_ANSWER_BYTES)
                text = await _read_frame(process, self._text_bytes)
        except TimeoutError:
            await self.stop()
            raise _timeout() from None
        except (EOFError, OSError, ValueError):
            status = await self.stop()
            if self._closed:
                raise _closed() from None
            if status == -signal.SIGXCPU:
                raise _timeout() from None
            raise InvalidInput("PARSE_CRASHED", "the document breaks its parser") from None
        except BaseException:  # the caller has gone: nobody waits for the answer
            await self.stop()
            raise
        if len(answer) + len(text) > _INLINE_BYTES:
            result = await asyncio.to_thread(_decode, answer, text)
        else:
            result = _decode(answer, text)
        if isinstance(result, Parsed):
            return result
        if result.reason == "PARSE_MEMORY":
            await self.stop()  # what it allocated may not all come back
        raise result

    async def close(self) -> None:
        self._closed = True
        await self.stop()

    async def stop(self) -> int | None:
        """Kills the process, waits until it is gone and returns its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        with suppress(ProcessLookupError):
            process.kill()
        status = await process.wait()
        await _drop_pipes(process)
        return status

    async def _running(self) -> Process:
        if self._closed:
            raise _closed()
        if self._process is not None and _lives(self._process):
            return self._process
        await self.stop()
        # It finds the modules that the parent finds, but no secret in its environment.
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "services.retrieval.parser_child"),
                *self._arguments,
                stdin=PIPE,
                stdout=PIPE,
                stderr=DEVNULL,
                env=environment,
                limit=_PIPE_BYTES,
                start_new_session=True,  # Ctrl-C in a terminal is the parent's business
            )
            async with asyncio.timeout(_START_SECONDS):
                await _read_frame(self._process, len(READY))
            if self._closed:
                raise EOFError
        except (EOFError, OSError, ValueError, TimeoutError):
            await self.stop()
            if self._closed:
                raise _closed() from None
            raise Unavailable("PARSER_NOT_STARTED", "the document parser does not start") from None
        except BaseException:
            await self.stop()
            raise
        return self._process


def _lives(process: Process) -> bool:
    """Asked of the kernel: the event loop hears of an end only later."""
    if process.returncode is not None:
        return False
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def _closed() -> Unavailable:
    return Unavailable("PARSER_CLOSED", "the document parser is shutting down")


def _timeout() -> InvalidInput:
    return InvalidInput("PARSE_TIMEOUT", "the document takes too long to read")


async def _drop_pipes(process: Process) -> None:
    """Lets the event loop see both ends closed: it may itself be about to close."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    with suppress(OSError):
        await process.stdin.wait_closed()
    with suppress(OSError):
        await process.stdout.read()


async def _write_frames(process: Process, *frames: bytes) -> None:
    assert process.stdin is not None
    for frame in frames:
        process.stdin.write(LENGTH.pack(len(frame)))
        process.stdin.write(frame)
    await process.stdin.drain()


async def _read_frame(process: Process, max_bytes: int) -> bytes:
    assert process.stdout is not None
    (length,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
    if length > max_bytes:
        raise ValueError("the frame is too long")
    return await process.stdout.readexactly(length)


def _decode(answer: bytes, text: bytes) -> Parsed | InvalidInput:
    fields = json.loads(answer)
    if "reason" in fields:
        return InvalidInput(fields["reason"], fields["message"])
    sections = tuple(
        Section(start, end, tuple(path), page) for start, end, path, page in fields["sections"]
    )
    return Parsed(text.decode(), fields["title"], sections)
