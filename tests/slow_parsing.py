"""What a parser's child process may do: the document says it."""

import ctypes
import os
import signal
from pathlib import Path

from services.retrieval.parsing import Limits, Parsed, Section


def parse(data: bytes, media_type: str, limits: Limits) -> Parsed:
    command, _, argument = data.decode().partition(" ")
    match command:
        case "hang":
            while True:
                pass
        case "tell":  # its process id through a FIFO, then hang
            Path(argument).write_text(str(os.getpid()))
            signal.pause()
        case "hog":
            held = []
            while True:
                held.append(bytearray(10_000_000))
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            ctypes.string_at(0)
        case "exit":
            os._exit(0)
        case "lie":  # a frame that would be larger than the parent's memory
            os.write(3, b"\xff" * 8)
            signal.pause()
        case "print":
            print("a library says something", flush=True)
            os.write(1, b"so does a C library")
        case "pid":
            return told(str(os.getpid()))
        case "environment":
            return told(os.environ.get(argument, "unset"))
        case "files":
            return told(" ".join(sorted(map(os.readlink, _open_files()))))
    return told(data.decode())


def _open_files() -> list[str]:
    paths = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return [path for path in paths if os.path.lexists(path)]


def told(text: str) -> Parsed:
    return Parsed(text, "title", (Section(0, len(text), ("a", "b"), 3),))
