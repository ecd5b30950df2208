"""`tworoads ask`: the answer as it is written, then the quotes that its sentences rest on."""

import re
import sys
from typing import Annotated, Any

import typer

from clients.cli.output import DEFAULT_CORPUS, Address, Corpus, Json, line, plain, print_json, run
from clients.client import Client, PathName
from clients.events import Answer, Citation, Started, Text, Unsupported
from clients.local import LocalError

UNSUPPORTED = "[?]"
WARNINGS = {
    "ADAPTER_WITHOUT_CONTEXT": "this adapter never saw passages while it was trained and may read"
    " them badly; train one with `tworoads tune --corpus`, or ask it with --path tuned.",
    "ADAPTER_NEEDS_CONTEXT": "this adapter was always shown passages while it was trained and may"
    " answer badly without; ask it with --path hybrid.",
}

# Where a sentence may end: a stop, a line break, or white space that is the last so far.
_END = r"(?:[.!?…。！？｡]|\s*\n|\s+\Z)"
# An end with at most one word behind it: the gateway may still be waiting to know.
_UNSETTLED = re.compile(rf"{_END}\S*\s*\S*\s*\Z")


def ask(
    question: Annotated[str, typer.Argument(help="The question; - reads it from standard input.")],
    corpus: Corpus = DEFAULT_CORPUS,
    path: Annotated[
        PathName, typer.Option(help="The road to the answer; auto follows the corpus's policy.")
    ] = "auto",
    adapter: Annotated[
        str,
        typer.Option(
            metavar="NAME[@HASH]", help="Adapter for tuned and hybrid; NAME is its newest version."
        ),
    ] = "",
    limit: Annotated[
        int, typer.Option(min=1, max=50, help="The most passages to show the model.")
    ] = 3,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The most tokens to write.",
            show_default="256, or less if the context ends before",
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="0 takes the likeliest word; more varies.")
    ] = 0.0,
    seed: Annotated[
        int | None, typer.Option(help="Makes a temperature above 0 repeatable.")
    ] = None,
    allow_degraded: Annotated[
        bool,
        typer.Option(
            "--allow-degraded", help="Answer even when documents cannot be searched, and say so."
        ),
    ] = False,
    timeout: Annotated[float, typer.Option(min=1, max=300, help="Seconds to wait.")] = 60,
    address: Address = "",
    json: Json = False,
) -> None:
    """Ask a question and get an answer with checked citations.

    Numbers such as [1] follow the sentences that a passage supports; the quotes are listed below.
    [?] follows a sentence that no passage supports.
    """
    asked = _standard_input() if question == "-" else question
    options: dict[str, Any] = {
        "corpus": "" if path in ("base", "tuned") else corpus,
        "path": path,
        "adapter": adapter,
        "limit": limit,
        "temperature": temperature,
        "allow_degraded": allow_degraded,
        "timeout": timeout,
    }
    if seed is not None:
        options["seed"] = seed
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    if json:
        answer = run(address, lambda client: client.ask(asked, **options))
        print_json(answer.to_dict())
    else:
        run(address, lambda client: _ask(client, asked, options))


async def _ask(client: Client, question: str, options: dict[str, Any]) -> None:
    answer = Answer()
    printer = Printer()
    try:
        async for event in client.answer(question, **options):
            answer.add(event)
            match event:
                case Started():
                    _introduce(event)
                case Text():
                    printer.text(event.text)
                case Citation():
                    printer.mark(event.answer_end, printer.number(event))
                case Unsupported():
                    printer.mark(event.answer_end, UNSUPPORTED)
    finally:
        printer.end()
    printer.notes(answer)


def _introduce(started: Started) -> None:
    """Say which adapter answers, apart from the answer, and what to know of it."""
    if started.adapter:
        print(line(f"Adapter: {started.adapter}"), file=sys.stderr)
    for warning in started.warnings:
        print(f"Warning: {WARNINGS.get(warning, line(warning))}", file=sys.stderr)


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise LocalError("standard input is not UTF-8 text: convert it first") from None


class Printer:
    """Prints an answer as it comes, but holds back what stands behind the end of a sentence until
    the gateway has had its say on it, so that a mark goes where it belongs."""

    def __init__(self) -> None:
        self._held = ""
        self._printed = 0  # code points of the answer that stand on the screen
        self._quotes: dict[tuple[str, int, int], tuple[str, Citation]] = {}

    def text(self, text: str) -> None:
        """Take the next text. All verdicts that the text before allows have come by now."""
        unsettled = _UNSETTLED.search(self._held)
        self._print(unsettled.start() if unsettled else len(self._held))
        self._held += text
        end = re.search(_END, self._held)
        self._print(end.start() if end else len(self._held))

    def number(self, citation: Citation) -> str:
        """Return the number of a citation's quote, such as "[1]"."""
        key = (citation.document, citation.source_start, citation.source_end)
        label, _ = self._quotes.setdefault(key, (f"[{len(self._quotes) + 1}]", citation))
        return label

    def mark(self, end: int, label: str) -> None:
        """Put a label behind the answer's code point `end`, or as near as is still possible."""
        self._print(max(0, min(end - self._printed, len(self._held))))
        print(f" {label}", end="", flush=True)

    def end(self) -> None:
        """Print the rest of the text and end its line."""
        self._print(len(self._held))
        if self._printed:
            print()

    def notes(self, answer: Answer) -> None:
        """Print the quotes by number, and what else there is to know of an answer."""
        if answer.finish == "no_evidence":
            print("Nothing in the corpus answers this, so nothing was written.")
        if answer.finish == "length":
            print("\nThe answer was cut: allow more with --max-tokens.")
        for label, citation in self._quotes.values():
            span = f"characters {citation.source_start}-{citation.source_end}"
            print(f'\n{label} "{line(citation.quote)}"\n    {line(citation.document)}, {span}')
        if answer.unsupported:
            print(f"\n{UNSUPPORTED} no passage supports this sentence")
        if "TUNING" in answer.degraded:
            print("\nThe tuning service is away: there may be a newer version of the adapter.")
        if left_out := [part for part in answer.degraded if part != "TUNING"]:
            print(f"\nLeft out because a service is away: {', '.join(left_out)}")

    def _print(self, count: int) -> None:
        text, self._held = self._held[:count], self._held[count:]
        print(plain(text), end="", flush=True)
        self._printed += count
