"""Files to send, and what their check found, in words."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clients.cli.output import line
from clients.jobs import DataReport, Finding
from clients.local import LocalError

SHOWN = 20  # line numbers of questions

WORDS = {"error": "", "left_out": "left out: ", "warning": "warning: "}


@contextmanager
def read_again(file: Path) -> Iterator[Path]:
    """Yield a file that can be sent twice: standard input, -, is copied into one."""
    if file != Path("-"):
        yield file
        return
    with tempfile.NamedTemporaryFile() as copy:
        try:
            shutil.copyfileobj(sys.stdin.buffer, copy)
            copy.flush()
        except OSError as error:
            raise LocalError(f"cannot take standard input: {error.strerror}") from error
        yield Path(copy.name)


def finding(found: Finding, main: str = "examples") -> str:
    """Return one line for one finding; lines of the `main` file go without its name."""
    file = "" if found.file == main else f"{found.file}, "
    words = WORDS.get(found.severity, "")
    return line(f"{file}line {found.line}: {words}{found.message} ({found.reason})")


def report(data: DataReport) -> list[str]:
    """Return in lines what the examples are like."""
    lines = [
        f"{data.examples:,} examples, {data.held_out:,} of them held out; {data.tokens:,} tokens,"
        f" {data.answer_tokens:,} of them in answers.",
        f"Answers have {data.answer_tokens_min:,} to {data.answer_tokens_max:,} tokens, half of"
        f" them at most {data.answer_tokens_p50:,}, 95 % at most {data.answer_tokens_p95:,}.",
    ]
    if data.duplicates or data.too_long:
        lines.append(
            f"Left out: {data.duplicates:,} that repeat an earlier line,"
            f" {data.too_long:,} too long for the context."
        )
    if data.secret_like:
        lines.append(f"Lines that seem to hold a secret: {data.secret_like:,}.")
    if overlap := data.overlap:
        lines.append(
            f"Of {overlap.questions:,} questions, {overlap.exact:,} are examples too,"
            f" {overlap.near:,} almost, {overlap.shared_document:,} share a document with one."
        )
        if overlap.lines:
            shown = ", ".join(map(str, overlap.lines[:SHOWN]))
            more = f" and {len(overlap.lines) - SHOWN:,} more" if len(overlap.lines) > SHOWN else ""
            lines.append(f"Their lines: {shown}{more}.")
    return lines
