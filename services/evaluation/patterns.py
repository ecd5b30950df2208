"""Regular expressions that callers send: one that takes for ever must not stop the service."""

import re
from collections.abc import Sequence
from functools import lru_cache
from re import _parser  # type: ignore[attr-defined]
from time import monotonic
from typing import Any

import regex

from services.evaluation.comparison import Question
from services.questions.lines import Finding, Findings

MOST_PATTERN = 1000  # code points
MOST_STEPS = 2000  # of a pattern once its repetitions are written out
MOST_TEXT = 65_536  # code points of an answer that are looked at
SECONDS = 0.2  # for all patterns of one answer
CHECK_SECONDS = 30.0  # for reading all patterns of a file
# In `regex` a brace with a letter allows for mistakes (a{e}), in `re` it is a brace.
BRACE = re.compile(r"(?<!\\)(?<!\\N)\{(?!\d*,?\d*\})")
REPEATS = (_parser.MAX_REPEAT, _parser.MIN_REPEAT, _parser.POSSESSIVE_REPEAT)


def check_patterns(questions: Sequence[Question]) -> list[Finding]:
    """Return an error (FIELD_INVALID) for each question with an answer that is no regular
    expression of Python's `re` of at most 1,000 characters and 2,000 steps, and for the one at
    which reading all of them has taken too long. Blocks."""
    findings = Findings("questions")
    end = monotonic() + CHECK_SECONDS
    for question in questions:
        answers = (*question.answers, *question.stale_answers)
        if monotonic() > end:
            message = f"reading the regular expressions takes more than {CHECK_SECONDS:.0f} s"
            findings.add(question.line, "error", "FIELD_INVALID", message)
            break
        if any(compiled(answer) is None for answer in answers):
            message = (
                f"an answer is no regular expression of at most {MOST_PATTERN} characters, or its"
                f" repetitions come to more than {MOST_STEPS} steps"
            )
            findings.add(question.line, "error", "FIELD_INVALID", message)
    return [*findings.take(), *findings.close()]


def matches(text: str, patterns: Sequence[str], whole: bool) -> bool:
    """Return whether any pattern matches the whole text, or a part of it. Takes 0.2 s at most: a
    pattern that has not matched by then does not match."""
    text = text.strip()
    if whole and len(text) > MOST_TEXT:
        return False
    end = monotonic() + SECONDS
    for pattern in patterns:
        if (form := compiled(pattern)) is None:
            continue
        left = end - monotonic()
        if left <= 0:
            break
        match = form.fullmatch if whole else form.search
        try:
            # Without the lock of the interpreter, so that other threads go on.
            if match(text[:MOST_TEXT], timeout=left, concurrent=True):
                return True
        except (TimeoutError, MemoryError):
            continue
    return False


@lru_cache(maxsize=256)  # a pattern may take a megabyte
def compiled(pattern: str) -> Any | None:
    """Return the pattern of the `regex` package, which can be stopped; None if it is none. What
    `re` does not know, such as recursion, is refused."""
    if len(pattern) > MOST_PATTERN:
        return None
    try:
        re.compile(pattern)
        if _steps(_parser.parse(pattern)) > MOST_STEPS:
            return None
        return regex.compile(BRACE.sub(r"\{", pattern), cache_pattern=False)
    except (re.error, regex.error, ValueError, OverflowError, RecursionError, MemoryError):
        return None


def _steps(part: Any) -> int:
    """Return how large `regex` makes a part of what `re` has parsed: it writes out what must come
    at least so often, and the rest once more, so that nested repetitions multiply."""
    if isinstance(part, tuple) and any(part[:1] and part[0] is kind for kind in REPEATS):
        least, _, inner = part[1]
        return (least + 1 if least else 1) * max(1, _steps(inner))
    if isinstance(part, list | _parser.SubPattern):
        return sum(_steps(part[at]) for at in range(len(part)))
    return max(1, sum(map(_steps, part))) if isinstance(part, tuple) else 0
