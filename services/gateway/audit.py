"""Who changed what and when: a line of JSON for each write."""

import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path

from services.runtime.call import Call
from services.runtime.gate import Caller

log = logging.getLogger(__name__)
lines = logging.getLogger("audit")
lines.setLevel(logging.INFO)  # whatever the level of the log is


class Audit:
    """Appends to a file, which may be moved away at any time; without one, to the logger `audit`.

    What cannot be written to the file, such as when the disk is full, goes to the error log: no
    call fails of it. Raises OSError if the file cannot be opened at first.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        if path:
            os.close(_opened(path))

    def write(self, caller: Caller, call: Call, method: str, code: str, seconds: float) -> None:
        """Note a call that has ended with the status `code` after so many seconds."""
        line = json.dumps(
            {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "request": call.request_id,
                "peer": call.peer,
                "tenant": caller.tenant,
                "principal": caller.principal,
                "method": method,
                "code": code,
                "seconds": round(seconds, 3),
            }
        )
        if self._path is None:
            lines.info(line)
            return
        try:
            _append(self._path, line.encode() + b"\n")
        except OSError as error:
            log.error("%s cannot be written: %s; it lacks %s", self._path, error, line)


def _append(path: Path, line: bytes) -> None:
    file = _opened(path)
    try:
        written = os.write(file, line)  # at once, so that lines of several writers never mix
        if written < len(line):
            os.ftruncate(file, os.fstat(file).st_size - written)
            raise OSError("the disk is full")
    finally:
        os.close(file)


def _opened(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
