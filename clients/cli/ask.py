"""`tworoads ask`: the answer as it is written, then the quotes that its sentences rest on."""

import sys
from enum import StrEnum
from typing import Annotated, Any

import typer

from clients.cli.output import DEFAULT_CORPUS, Address, Corpus, Json, plain, print_json, run
from clients.client import Client, PathName
from clients.events import Answer, Citation, Text, Unsupported

UNSUPPORTED = "[?]"


class PathChoice(StrEnum):
    auto = "auto"
    base = "base"
    rag = "rag"
    tuned = "tuned"
    hybrid = "hybrid"


def ask(
    question: Annotated[str, typer.Argument(help="The question; - reads it from standard input.")],
    corpus: Corpus = DEFAULT_CORPUS,
    path: Annotated[
        PathChoice, typer.Option(help="The road to the answer; auto follows the corpus's policy.")
    ] = PathChoice.auto,
    adapter: Annotated[str, typer.Option(help="Adapter for tuned and hybrid.")] = "",
    limit: Annotated[
        int, typer.Option(min=1, max=50, help="The most passages to show the model.")
    ] = 3,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to write.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="0 takes the likeliest word; more varies.")
    ] = 0.0,
    seed: Annotated[
        int | None, typer.Option(help="Makes a temperature above 0 repeatable.")
    ] = None,
    allow_degraded: Annotated[
        bool, typer.Option(help="Answer without documents when retrieval is away.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=1, max=300, help="Seconds to wait.")] = 60,
    address: Address = "",
    json: Json = False,
) -> None:
    """Ask a question and get an answer with checked citations.

    Numbers such as [1] follow the sentences that a passage supports; the quotes are listed below.
    [?] follows a sentence that no passage supports.
    """
    asked = sys.stdin.read() if question == "-" else question
    options: dict[str, Any] = {
        "limit": limit,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "allow_degraded": allow_degraded,
        "timeout": timeout,
    }
    if seed is not None:
        options["seed"] = seed
    where = "" if path in (PathChoice.base, PathChoice.tuned) else corpus
    run(_ask(asked, where, path.value, adapter, options, address, json))


async def _ask(
    question: str,
    corpus: str,
    path: PathName,
    adapter: str,
    options: dict[str, Any],
    address: str,
    json: bool,
) -> None:
    answer = Answer()
    printer = Printer()
    async with Client(address or None) as client:
        async for event in client.answer(question, corpus, path, adapter=adapter, **options):
            answer.add(event)
            if json:
                continue
            match event:
                case Text():
                    printer.text(event.text)
                case Citation():
                    printer.mark(event.answer_end, printer.number(event))
                case Unsupported():
                    printer.mark(event.answer_end, UNSUPPORTED)
    if json:
        print_json(answer.to_dict())
    else:
        printer.end(answer)


class Printer:
    """Prints an answer one event late, so that a mark still goes behind its sentence."""

    def __init__(self) -> None:
        self._held = ""
        self._printed = 0  # code points of the answer that stand on the screen
        self._quotes: dict[tuple[str, int, int], tuple[str, Citation]] = {}

    def text(self, text: str) -> None:
        """Print what came before; hold this back."""
        self._flush()
        self._held = text

    def number(self, citation: Citation) -> str:
        """Return the number of a citation's quote, such as "[1]"."""
        key = (citation.document, citation.source_start, citation.source_end)
        label, _ = self._quotes.setdefault(key, (f"[{len(self._quotes) + 1}]", citation))
        return label

    def mark(self, end: int, label: str) -> None:
        """Put a label behind the answer's code point `end`, or as near as is still possible."""
        held = max(0, min(end - self._printed, len(self._held)))
        before, after = self._held[:held], self._held[held:]
        self._print(before)
        print(f" {label}", end="", flush=True)
        self._held = after

    def end(self, answer: Answer) -> None:
        """Print the rest, and the quotes by number."""
        self._flush()
        if answer.finish == "no_evidence":
            print("Nothing in the corpus answers this, so nothing was written.", end="")
        print()
        if answer.finish == "length":
            print("\nThe answer was cut: allow more with --max-tokens.")
        for label, citation in self._quotes.values():
            span = f"{citation.source_start}-{citation.source_end}"
            quote = " ".join(plain(citation.quote).split())
            print(f'\n{label} "{quote}"\n    {plain(citation.document)}, characters {span}')
        if answer.unsupported:
            print(f"\n{UNSUPPORTED} no passage supports this sentence")
        if answer.degraded:
            print(f"\nLeft out because a service is away: {', '.join(answer.degraded)}")

    def _flush(self) -> None:
        self._print(self._held)
        self._held = ""

    def _print(self, text: str) -> None:
        print(plain(text), end="", flush=True)
        self._printed += len(text)
