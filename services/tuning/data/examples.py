"""The examples of an upload: checked line by line while they arrive, then split and reported."""

from array import array
from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from services.prompts.rendering import PromptTooLong, Renderer
from services.prompts.words import conversation, stops
from services.questions import fields
from services.questions.fields import Example
from services.questions.lines import BadLine, CheckedFile, Finding, Lines
from services.questions.normalising import digest, spaced
from services.questions.overlap import Questions
from services.runtime.errors import InvalidInput
from services.tuning.data.secret_like import looks_like
from services.tuning.data.splitting import held_out
from services.tuning.job import DataReport

__all__ = [
    "Example",
    "Examples",
    "Finding",
    "Questions",
    "held_out",
    "read",
    "report",
    "trained_lines",
]

FEWEST = 8
MOST_TEXT = 256 * 1024 * 1024  # code points of all examples
READ = 1024 * 1024  # bytes


class Examples(CheckedFile):
    """The examples to train on. `examples` are those that are used, `tokens` and `answer_tokens`
    what they have, without passages."""

    def __init__(self, renderer: Renderer, context_length: int, version: str) -> None:
        super().__init__("examples", "TOO_MANY_EXAMPLES", MOST_TEXT)
        self.examples: list[Example] = []
        self.tokens = 0
        self.answer_tokens = array("I")
        self._renderer = renderer
        self._version = version
        # Each example must fit in the form that is shown passages too, which has more words.
        plain = renderer.render(conversation("?", None, version=version), context_length)
        shown = renderer.render(conversation("?", [], version=version), context_length)
        longer = len(shown.token_ids) - len(plain.token_ids)
        self._context_length = context_length - max(0, longer)
        self._stops = stops(version)
        # Of each question the first answer and its line, and the lines by question and answer:
        # white space aside, and in `_alike` case and punctuation too.
        self._asked: dict[bytes, tuple[bytes, int]] = {}
        self._alike: dict[bytes, tuple[bytes, int]] = {}
        self._said: dict[bytes, int] = {}

    def close(self) -> list[Finding]:
        """Check the last line, and return what was found last. Raises InvalidInput (EXAMPLES_EMPTY,
        TOO_FEW_EXAMPLES), unless a line is an error, which is worse."""
        findings = super().close()
        if self.errors or len(self.examples) >= FEWEST:
            return findings
        counts = self.findings.counts
        duplicates, too_long = counts["DUPLICATE"], counts["CONTEXT_TOO_LONG"]
        if not (self.examples or duplicates or too_long):
            raise InvalidInput("EXAMPLES_EMPTY", "there is no example")
        raise InvalidInput(
            "TOO_FEW_EXAMPLES",
            f"{len(self.examples)} examples can be used and at least {FEWEST} are needed; "
            f"{duplicates} duplicates and {too_long} that are too long were left out",
        )

    def use(self, line: int, value: dict[str, Any]) -> int:
        example, system = fields.example(line, value)
        turns = list(chain.from_iterable(example.history))
        asking = [example.question, example.corpus, *turns]
        asked, alike = digest(*asking, form=spaced), digest(*asking)
        whole, answer = digest(*asking, example.answer, form=spaced), digest(example.answer)
        if other := self._said.get(whole, 0):
            self.findings.add(line, "left_out", "DUPLICATE", f"line {other} says the same", other)
            return 0
        earlier, other = self._asked.get(asked, (answer, 0))
        if earlier != answer:
            raise BadLine(
                "CONTRADICTION", f"line {other} asks the same and has another answer", other
            )
        messages = conversation(example.question, None, example.history, version=self._version)
        try:
            prompt, said = self._renderer.exchange(messages, example.answer, self._context_length)
        except PromptTooLong as error:
            self.findings.add(line, "left_out", "CONTEXT_TOO_LONG", f"too long: {error}")
            return 0
        earlier, near = self._alike.get(alike, (answer, 0))
        if other or earlier != answer:
            message = f"line {other or near} asks the same or almost, and has another answer"
            self.findings.add(line, "warning", "NEAR_CONTRADICTION", message, other or near)
        if any(stop in example.answer for stop in self._stops):
            message = (
                "the answer has a text at which answers are cut off, such as the next question"
            )
            self.findings.add(line, "warning", "STOP_INSIDE", message)
        self._asked.setdefault(asked, (answer, line))
        self._alike.setdefault(alike, (answer, line))
        self._said[whole] = line
        self.tokens += len(prompt.token_ids) + len(said)
        self.answer_tokens.append(len(said))
        self.examples.append(example)
        texts = [*turns, example.question, example.answer]
        if system:
            message = "the system message is left out: the words of the prompt version stand there"
            self.findings.add(line, "warning", "SYSTEM_LEFT_OUT", message)
        if kind := next(filter(None, map(looks_like, texts)), ""):
            self.findings.add(line, "warning", "SECRET_LIKE", f"something looks like {kind}")
        return sum(map(len, chain(texts, example.relevant)))


def report(
    examples: Examples, questions: Questions | None, held_out: Collection[int]
) -> DataReport:
    """Return what the examples are like. Blocks: not for the event loop."""
    lengths = sorted(examples.answer_tokens)
    counts = examples.findings.counts
    return DataReport(
        lines=examples.received,
        examples=len(examples.examples),
        held_out=len(held_out),
        tokens=examples.tokens,
        answer_tokens=sum(lengths),
        answer_tokens_min=lengths[0],
        answer_tokens_p50=_percentile(lengths, 50),
        answer_tokens_p95=_percentile(lengths, 95),
        answer_tokens_max=lengths[-1],
        duplicates=counts["DUPLICATE"],
        too_long=counts["CONTEXT_TOO_LONG"],
        secret_like=counts["SECRET_LIKE"],
        hash=examples.hash,
        overlap=questions.overlap(examples.examples) if questions else None,
    )


def read(path: Path, renderer: Renderer, context_length: int, version: str) -> Examples:
    """Return the examples of a file that was checked before. Blocks."""
    examples = Examples(renderer, context_length, version)
    for chunk in _chunks(path):
        examples.feed(chunk)
    examples.close()
    return examples


def trained_lines(
    raw: Path, examples: Sequence[Example], held_out: Collection[int]
) -> Iterator[bytes]:
    """Yield the lines of `raw` that were trained on, as sent, each with its line feed. Blocks."""
    wanted = {example.line for index, example in enumerate(examples) if index not in held_out}
    lines = Lines()
    for line in chain(chain.from_iterable(map(lines.feed, _chunks(raw))), lines.close()):
        if line is not None and lines.count in wanted:
            yield line + b"\n"


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(READ):
            yield chunk


def _percentile(ordered: Sequence[int], percent: int) -> int:
    """Return the value that `percent` of all do not exceed (nearest rank)."""
    return ordered[-(-len(ordered) * percent // 100) - 1]
