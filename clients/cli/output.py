"""How commands call the gateway and print: plain text for people and pipes, JSON for programs."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import datetime
from typing import Annotated, Any, TypeVar

import grpc
import typer

from clients.client import Client, TworoadsError
from clients.files import FileError
from clients.local import LocalError
from services.runtime import tracing

# C0 without tab and newline, DEL, C1, line separators, overrides of the writing direction, and
# surrogates, which no encoding takes.
CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# What to do about an error whose message does not say it, by reason or else by code.
ADVICE = {
    "CORPUS_NOT_FOUND": "make it with `tworoads ingest FOLDER --corpus NAME`,"
    " or see which there are with `tworoads documents`",
    "CORPUS_MISSING": "name it with --corpus",
    "ADAPTER_MISSING": "name it with --adapter",
    "ADAPTER_NOT_FOUND": "see which there are with `tworoads adapters`",
    "ADAPTER_VERIFYING": "wait until it is measured: `tworoads adapters` says",
    "ADAPTER_NOT_ACCEPTED": "see what was measured with `tworoads adapters show NAME@HASH`,"
    " and let it answer all the same with `tworoads adapters accept NAME@HASH`",
    "ADAPTER_INCOMPATIBLE": "train it again, for the model that runs now, with `tworoads tune`",
    "COMPARISON_NOT_FOUND": "see which there are with `tworoads comparisons`",
    "COMPARISON_NOT_FINISHED": "see how far it is with `tworoads comparisons watch N`",
    "CANDIDATE_NOT_FOUND": "see which there are with `tworoads comparisons show N`",
    "VERDICT_OPEN": "ask more questions, or set a path yourself with `tworoads policies set`",
    "POLICY_IMPOSSIBLE": "or set another path with `tworoads policies set`",
    "CORPUS_EMPTY": "fill it with `tworoads ingest FOLDER --corpus NAME`",
    "QUESTIONS_EMPTY": 'write lines of {"question": ..., "answers": [...]}',
    "TOO_MANY_CANDIDATES": "name fewer with --paths or --adapter",
    "JUDGE_MISSING": "leave out --judge, or set up a judge where the stack runs",
    "GATEWAY_UNAVAILABLE": "see `tworoads status`",
    "JOB_NOT_FOUND": "see which there are with `tworoads jobs`",
    "EXAMPLES_INVALID": "mend these lines, then run this again",
    "QUESTIONS_INVALID": "mend these lines, then run this again",
    "TOO_FEW_EXAMPLES": "add some; a few dozen teach a form of answers",
    "QUANTIZATION_NEEDS_GPU": "leave out --quantized",
    "QUANTIZATION_UNAVAILABLE": "leave out --quantized",
    "QUESTION_EMPTY": "say what you want to know",
    "QUERY_EMPTY": "say what to find",
    "STORE_FULL": "free some space, then run this again",
    "SERVER_UNAVAILABLE": "",
    "CREDENTIALS_MISSING": "name the file that holds your key with TWOROADS_KEY_FILE",
    "CREDENTIALS_INVALID": "it may have ended or been revoked: ask the operator for a new one",
    "ROLE_MISSING": "ask the operator for a key with this role",
    "QUOTA_REQUESTS": "or ask the operator for more",
    "QUOTA_TOKENS": "or ask the operator for more",
    "QUOTA_STREAMS": "or ask the operator for more",
    "QUOTA_BYTES": "then send the rest: what is indexed already stays",
    grpc.StatusCode.DEADLINE_EXCEEDED: "try again, or let `ask` wait longer with --timeout",
    grpc.StatusCode.UNAVAILABLE: "see `tworoads status`",
    grpc.StatusCode.INTERNAL: "see `tworoads logs`",
}
T = TypeVar("T")

Corpus = Annotated[
    str,
    typer.Option("--corpus", "-c", envvar="TWOROADS_CORPUS", help="Name of the corpus."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Address = Annotated[
    str,
    typer.Option(
        envvar="TWOROADS_ADDRESS",
        help="HOST:PORT of the gateway. TWOROADS_KEY_FILE names the file with your key,"
        " TWOROADS_TLS=1 says that it has a certificate, TWOROADS_CA=FILE who signed that.",
        show_default="this machine's",
    ),
]
DEFAULT_CORPUS = "documents"


def run(address: str, work: Callable[[Client], Awaitable[T]]) -> T:
    """Do a command's work with a client; what goes wrong becomes a LocalError of one sentence."""
    try:
        with tracing.exporting("client"):
            return asyncio.run(_with_client(address, work))
    except TworoadsError as error:
        advice = ADVICE.get(error.reason, ADVICE.get(error.code, ""))
        raise LocalError(line(f"{error}; {advice}" if advice else str(error))) from error
    except (FileError, tracing.NotInstalled) as error:
        raise LocalError(line(str(error))) from error


def plain(text: str) -> str:
    """Return text without control characters, which a terminal might obey."""
    return CONTROL.sub("", text)


def line(text: str) -> str:
    """Return plain text on one line."""
    return " ".join(plain(text).split())


def print_json(value: Any, indent: int | None = 2) -> None:
    """Print a value, which may hold dataclasses and times, as JSON, on one line without `indent`,
    with what a terminal might obey as escapes."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=_encodable)
    print(CONTROL.sub(lambda char: f"\\u{ord(char[0]):04x}", text))


def duration(seconds: float) -> str:
    """Return a time span in words, such as "3 min 12 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return rows as lines in columns, each as wide as its widest cell."""
    lines = [list(header), *([line(cell) for cell in row] for row in rows)]
    widths = [max(len(cells[i]) for cells in lines) for i in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in lines
    ]


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows in columns, each as wide as its widest cell."""
    print("\n".join(table(header, rows)))


def _encodable(value: Any) -> Any:
    return value.isoformat(timespec="seconds") if isinstance(value, datetime) else vars(value)


async def _with_client(address: str, work: Callable[[Client], Awaitable[T]]) -> T:
    async with Client(address or None) as client:
        return await work(client)
