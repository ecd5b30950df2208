"""What a question set shares with the examples: a score on what was trained on proves nothing."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from services.questions import fields
from services.questions.fields import Example, Question
from services.questions.lines import CheckedFile, Finding
from services.questions.normalising import normalised
from services.runtime.errors import InvalidInput

MOST_TEXT = 64 * 1024 * 1024  # code points of all questions
MOST_NAMED = 1000
NEAR = 0.8  # Jaccard similarity of the sets of words
MOST_COMPARED = 200  # examples that one question is compared with, so that no set takes hours


@dataclass(frozen=True)
class Overlap:
    """What a question set shares with the examples, as in the message of this name."""

    questions: int
    exact: int
    near: int
    shared_document: int
    lines: tuple[int, ...]


class Questions(CheckedFile):
    """A question set, to be compared with examples. Its answers are checked and not kept."""

    def __init__(self) -> None:
        super().__init__("questions", "QUESTIONS_INVALID", MOST_TEXT)
        self._questions: list[Question] = []

    def close(self) -> list[Finding]:
        """Check the last line, and return what was found last. Raises InvalidInput
        (QUESTIONS_INVALID) for a file without lines."""
        findings = super().close()
        if not self._questions and not self.errors:
            raise InvalidInput("QUESTIONS_INVALID", "the question set has no question")
        return findings

    def use(self, line: int, value: dict[str, Any]) -> int:
        question = fields.question(line, value)
        self._questions.append(question)
        return len(question.question) + sum(map(len, question.relevant))

    def overlap(self, examples: Sequence[Example]) -> Overlap:
        """Return what the questions share with the examples. Blocks: not for the event loop."""
        trained = Trained(examples)
        found = [(question.line, trained.shares(question)) for question in self._questions]
        counts = Counter(how for _, how in found)
        lines = [line for line, how in found if how]
        return Overlap(
            questions=len(found),
            exact=counts["exact"],
            near=counts["near"],
            shared_document=counts["shared_document"],
            lines=tuple(lines[:MOST_NAMED]),
        )


class Trained:
    """Finds what a question shares with examples.

    Words are numbered by rarity. Two sets with a Jaccard similarity of at least t have one of
    their |x| - ceil(t |x|) + 1 rarest words in common (Bayardo, Ma and Srikant, WWW 2007), so only
    those are indexed.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self._documents = {id for example in examples for id in example.relevant}
        self._questions = {normalised(example.question) for example in examples}
        often = Counter(word for question in self._questions for word in set(question.split()))
        by_rarity = sorted(often, key=lambda word: (often[word], word))
        self._numbers = {word: number for number, word in enumerate(by_rarity)}
        self._sets = [self._words(question) for question in sorted(self._questions)]
        self._index: dict[int, list[int]] = defaultdict(list)
        for position, words in enumerate(self._sets):
            for word in words[: _rarest(len(words))]:
                self._index[word].append(position)

    def shares(self, question: Question) -> str:
        """Return what the question shares with an example: exact, near, shared_document, or
        nothing."""
        text = normalised(question.question)
        if text in self._questions:
            return "exact"
        if self._near(text):
            return "near"
        return "" if self._documents.isdisjoint(question.relevant) else "shared_document"

    def _near(self, text: str) -> bool:
        words = self._words(text)
        unknown = len(set(text.split())) - len(words)  # rarer than all others
        size = len(words) + unknown
        own = set(words)
        for position in self._candidates(words[: max(0, _rarest(size) - unknown)]):
            shared = len(own.intersection(self._sets[position]))
            if shared >= NEAR * (size + len(self._sets[position]) - shared):
                return True
        return False

    def _candidates(self, words: Sequence[int]) -> Iterator[int]:
        seen: set[int] = set()
        for word in words:
            for position in self._index.get(word, ()):
                if len(seen) == MOST_COMPARED:
                    return
                if position not in seen:
                    seen.add(position)
                    yield position

    def _words(self, text: str) -> tuple[int, ...]:
        """Return the numbers of the known words, the rarest first."""
        numbers = map(self._numbers.get, set(text.split()))
        return tuple(sorted(number for number in numbers if number is not None))


def _rarest(size: int) -> int:
    return size - math.ceil(NEAR * size) + 1
