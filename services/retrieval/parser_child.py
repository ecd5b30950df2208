"""The process that parses: `python -m` this module, with MODULE SECONDS MEMORY_MB LIMITS.

It reads two frames (media type, document) from standard input and writes two (result or error as
JSON, text) to standard output, until the input ends. A frame is its length, 8 bytes big-endian, and
its bytes. JSON, not pickle: a document that takes this process over must not get into the parent.
"""

import json
import math
import os
import resource
import struct
import sys
from importlib import import_module
from typing import BinaryIO

from services.retrieval.parsing import Limits
from services.runtime.child import die_with_parent
from services.runtime.errors import InvalidInput

LENGTH = struct.Struct("!Q")
READY = b"ready"
MAX_ANSWER_BYTES = 32 << 20  # of the JSON: enough for about a million sections
_MEMORY = {"reason": "PARSE_MEMORY", "message": "the document takes too much memory to read"}
_SECTIONS = {"reason": "TOO_LARGE", "message": "the document has too many sections"}


def main(module: str, seconds: float, memory_mb: int, limits: Limits) -> None:
    # Even if the parent is killed while a library loops; else the end of the input is enough.
    die_with_parent(os.getppid())
    # What a library prints must not get between the frames.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    parse = import_module(module).parse
    _write(answers, READY)
    while (media_type := _read(sys.stdin.buffer)) is not None:
        data = _read(sys.stdin.buffer)
        if data is None:
            return
        _limit_cpu(seconds)
        text = b""
        try:
            parsed = parse(data, media_type.decode(), limits)
            sections = [(s.start, s.end, s.heading_path, s.page) for s in parsed.sections]
            answer = json.dumps({"title": parsed.title, "sections": sections}).encode()
            text = parsed.text.encode()
            if len(answer) > MAX_ANSWER_BYTES:
                answer, text = json.dumps(_SECTIONS).encode(), b""
        except InvalidInput as error:
            answer = json.dumps({"reason": error.reason, "message": str(error)}).encode()
        except MemoryError:
            answer, text = json.dumps(_MEMORY).encode(), b""
        _write(answers, answer, text)


def _limit_cpu(seconds: float) -> None:
    """The limit counts from the start of the process: it moves on with each document."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def _read(stream: BinaryIO) -> bytes | None:
    header = stream.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(header)
    data = stream.read(length)
    return data if len(data) == length else None


def _write(stream: BinaryIO, *frames: bytes) -> None:
    for frame in frames:
        stream.write(LENGTH.pack(len(frame)))
        stream.write(frame)
    stream.flush()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), Limits(**json.loads(sys.argv[4])))
