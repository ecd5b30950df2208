"""How the commands print: plain text for people and pipes, JSON for programs."""

import asyncio
import json
import re
from collections.abc import Coroutine, Iterable, Sequence
from typing import Annotated, Any, TypeVar

import typer

from clients.client import TworoadsError
from clients.files import FileError
from clients.local import LocalError

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
T = TypeVar("T")

Corpus = Annotated[
    str,
    typer.Option("--corpus", "-c", envvar="TWOROADS_CORPUS", help="Name of the corpus."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Address = Annotated[
    str,
    typer.Option(
        envvar="TWOROADS_ADDRESS", help="HOST:PORT of the gateway.", show_default="this machine's"
    ),
]
DEFAULT_CORPUS = "documents"


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's work; what goes wrong becomes one sentence and exit code 1."""
    try:
        return asyncio.run(work)
    except (TworoadsError, FileError) as error:
        raise LocalError(plain(str(error))) from error


def plain(text: str) -> str:
    """Return text without control characters, which a terminal might obey."""
    return CONTROL.sub("", text)


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    print(json.dumps(value, ensure_ascii=False, indent=2))


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows in columns, each as wide as its widest cell."""
    lines = [list(header), *([plain(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())
