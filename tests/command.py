"""The command line as a user types it."""

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass

import pytest

from clients.cli.app import main
from tests.small_stack import SmallStack


@dataclass
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@contextmanager
def in_a_thread(stack: AbstractAsyncContextManager[SmallStack]) -> Iterator[SmallStack]:
    """Run a stack in a thread: a command runs an event loop of its own."""
    started = threading.Event()
    found: list[SmallStack] = []
    ends: list[Callable[[], object]] = []

    async def serve() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        async with stack as running:
            found.append(running)
            ends.append(lambda: loop.call_soon_threadsafe(stop.set))
            started.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=[serve()])
    thread.start()
    assert started.wait(60)
    yield found[0]
    ends[0]()
    thread.join()


def typed(
    words: Sequence[object],
    stdin: bytes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Ran:
    """Run a command in this process; `stdin` is what is piped into it."""
    read, write = os.pipe()
    with open(write, "wb") as pipe:
        pipe.write(stdin)
    with open(read) as piped:
        monkeypatch.setattr(sys, "argv", ["tworoads", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", piped)
        with pytest.raises(SystemExit) as end:
            main()
            sys.exit(0)
    out, err = capsys.readouterr()
    return Ran(end.value.code or 0, out, err)


def tworoads(address: str, *words: str, **options) -> subprocess.Popen[str]:
    """Start a command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "clients.cli", *words],
        env={**os.environ, "TWOROADS_ADDRESS": address, "TERM": "xterm-256color"},
        text=True,
        # A test run in the background ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options,
    )


def on_a_terminal(address: str, *words: str) -> tuple[str, str]:
    """Run a command whose standard error is a terminal; return its output and what was shown."""
    screen, terminal = pty.openpty()
    with tworoads(address, *words, stderr=terminal) as process:
        os.close(terminal)
        shown = b""
        while piece := _read(screen):
            shown += piece
        out = process.stdout.read()
    os.close(screen)
    return out, shown.decode()


def _read(screen: int) -> bytes:
    try:
        return os.read(screen, 65536)
    except OSError:  # the terminal has no one left who writes
        return b""
