"""An uploaded JSON Lines file: cut into lines and checked while it streams."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from services.runtime.errors import InvalidInput

MOST_LINE = 1024 * 1024  # bytes
MOST_LINES = 100_000
MOST_FINDINGS = 1000  # of each reason
BOM = b"\xef\xbb\xbf"

File = Literal["examples", "questions"]
Severity = Literal["error", "left_out", "warning"]


@dataclass(frozen=True)
class Finding:
    """Something about one line, counted from 1, as in DataFinding of the protos."""

    file: File
    line: int
    severity: Severity
    reason: str
    message: str
    other_line: int = 0


class BadLine(ValueError):
    """The line cannot be used. The message never repeats what is in it, which may be a secret."""

    def __init__(self, reason: str, message: str, other_line: int = 0) -> None:
        super().__init__(message)
        self.reason = reason
        self.other_line = other_line


class Lines:
    """Cuts chunks of any size into lines. `count` is how many have ended."""

    def __init__(self) -> None:
        self.count = 0
        self._line = bytearray()
        self._too_long = False

    def feed(self, chunk: bytes) -> Iterator[bytes | None]:
        """Yield the lines that end in `chunk`: as sent, without the line feed. None stands for one
        of more than 1 MiB, which is not kept."""
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            self._add(chunk, start, end)
            yield self._take()
            start = end + 1
        self._add(chunk, start, len(chunk))

    def close(self) -> Iterator[bytes | None]:
        """Yield the last line, if no line feed ended it."""
        if self._line or self._too_long:
            yield self._take()

    def _add(self, chunk: bytes, start: int, end: int) -> None:
        self._too_long = self._too_long or len(self._line) + end - start > MOST_LINE
        if not self._too_long:
            self._line += memoryview(chunk)[start:end]

    def _take(self) -> bytes | None:
        line = None if self._too_long else bytes(self._line)
        self._line.clear()
        self._too_long = False
        self.count += 1
        return line.removeprefix(BOM) if line and self.count == 1 else line


class Findings:
    """Collects what is found about a file: of each reason the first 1,000, and at the end one more
    that counts the others, so that a broken file stays cheap."""

    def __init__(self, file: File) -> None:
        self.counts: Counter[str] = Counter()  # lines by reason
        self.errors = 0
        self._file = file
        self._new: list[Finding] = []
        self._first_of_rest: dict[str, Finding] = {}

    def add(
        self, line: int, severity: Severity, reason: str, message: str, other_line: int = 0
    ) -> None:
        self.counts[reason] += 1
        self.errors += severity == "error"
        if self.counts[reason] > MOST_FINDINGS and reason in self._first_of_rest:
            return
        finding = Finding(self._file, line, severity, reason, message, other_line)
        if self.counts[reason] > MOST_FINDINGS:
            self._first_of_rest[reason] = finding
        else:
            self._new.append(finding)

    def take(self) -> list[Finding]:
        """Return what was found since the call before."""
        found, self._new = self._new, []
        return found

    def close(self) -> list[Finding]:
        """Return the last ones."""
        for reason, first in self._first_of_rest.items():
            others = self.counts[reason] - MOST_FINDINGS
            message = f"{others} more lines of this kind, this is the first: {first.message}"
            self._new.append(replace(first, message=message))
        self._first_of_rest.clear()
        return self.take()


class CheckedFile(ABC):
    """A file that is fed as it arrives, in chunks of any size. `received` counts the lines that
    arrived whole, `checked` those that were checked."""

    def __init__(self, file: File, too_many: str, most_text: int) -> None:
        """`too_many` is the reason to refuse more than 100,000 lines, or more than `most_text` code
        points in those that are kept."""
        self.received = 0
        self.checked = 0
        self.findings = Findings(file)
        self._too_many = too_many
        self._room = most_text
        self._lines = Lines()
        self._hash = hashlib.sha256()

    @property
    def errors(self) -> int:
        """How many lines are errors: with one, the file is refused."""
        return self.findings.errors

    @property
    def hash(self) -> str:
        """SHA-256 of what was fed, in lower-case hexadecimal."""
        return self._hash.hexdigest()

    def feed(self, chunk: bytes) -> list[Finding]:
        """Check the lines that end in `chunk`, and return what was found. Raises InvalidInput
        (TOO_MANY_EXAMPLES, QUESTIONS_INVALID). Blocks: not for the event loop."""
        self._hash.update(chunk)
        self.received += chunk.count(b"\n")
        for line in self._lines.feed(chunk):
            self._check(line)
        return self.findings.take()

    def close(self) -> list[Finding]:
        """Check the last line, and return what was found last."""
        for line in self._lines.close():
            self.received += 1
            self._check(line)
        return self.findings.close()

    @abstractmethod
    def use(self, line: int, value: dict[str, Any]) -> int:
        """Take what a line holds, and return how many code points are kept of it. Raises
        BadLine."""

    def _check(self, line: bytes | None) -> None:
        number = self._lines.count
        if number > MOST_LINES:
            raise InvalidInput(self._too_many, f"at most {MOST_LINES} lines are taken")
        try:
            if line is None:
                raise BadLine("LINE_TOO_LONG", f"the line has more than {MOST_LINE} bytes")
            if line.strip():
                self._room -= self.use(number, parse(line))
        except BadLine as error:
            self.findings.add(number, "error", error.reason, str(error), error.other_line)
        if self._room < 0:
            raise InvalidInput(self._too_many, "all lines together have too much text")
        self.checked = number


def parse(line: bytes) -> dict[str, Any]:
    """Return the object that a line holds. Raises BadLine (NOT_UTF8, NOT_JSON)."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise BadLine("NOT_UTF8", f"byte {error.start + 1} of the line is not UTF-8") from None
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise BadLine("NOT_JSON", f"not JSON at column {error.colno}: {error.msg}") from None
    except ValueError:
        raise BadLine("NOT_JSON", "not JSON: NaN and Infinity are no numbers") from None
    except RecursionError:
        raise BadLine("NOT_JSON", "nested too deeply") from None
    if not isinstance(value, dict):
        raise BadLine("NOT_JSON", "the line is JSON, but not an object")
    return value


def _some_number(digits: str) -> int:
    return 1  # no field is a number; and one of very many digits costs time to convert


def _no_number(name: str) -> None:
    raise ValueError(name)


DECODER = json.JSONDecoder(
    parse_int=_some_number, parse_float=_some_number, parse_constant=_no_number
)
