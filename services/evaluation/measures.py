"""What was measured, as arrays of one value a question."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from services.evaluation.comparison import Answer, Candidate, Plan
from services.evaluation.failures import RIGHT
from services.evaluation.outcome import FailureKind, FailureShare, Latency

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Rows = NDArray[np.intp]

MOST_FAILED = 0.2  # of the questions; a candidate that failed on more is not compared
KINDS: tuple[FailureKind, ...] = (
    "knowledge_gap",
    "retrieval_miss",
    "reading_failure",
    "behaviour_gap",
    "unspecified",
)
MOST_EXAMPLES = 5  # of one kind
NAN = float("nan")


@dataclass(frozen=True)
class Scored:
    """The scores of one set of answers. `answered` is false, and the scores are NaN, where there is
    no answer or it failed."""

    answered: Bools
    strict: Floats
    format_blind: Floats
    judge: Floats

    def decides(self, plan: Plan) -> Floats:
        """Return the score that decides what is right."""
        return self.strict if plan.scoring.strict_decides else self.format_blind

    def replaced(self, rows: Bools, other: Self) -> Self:
        """Return the same with the scores of these rows taken from `other`."""
        return type(self)(
            answered=np.where(rows, other.answered, self.answered),
            strict=np.where(rows, other.strict, self.strict),
            format_blind=np.where(rows, other.format_blind, self.format_blind),
            judge=np.where(rows, other.judge, self.judge),
        )


@dataclass(frozen=True)
class Measures:
    """What was measured of one candidate in phase "answers". Numbers are NaN where there is no
    answer or it failed; only `busy` counts failed answers too, which took their time."""

    candidate: Candidate
    scored: Scored
    failed: Bools
    errors: Mapping[int, str]  # by row
    total_ms: Floats
    first_text_ms: Floats
    cold: Bools
    busy: Floats  # seconds, each answer's share of those in which any was on its way
    input_tokens: Floats
    output_tokens: Floats
    degraded: Bools
    no_evidence: Bools
    supported: NDArray[np.intp]  # sentences
    unsupported: NDArray[np.intp]
    sequence: NDArray[np.int64]
    kind: NDArray[np.intp]  # of KINDS, -1 if the answer is not wrong

    def not_compared(self, rows: Rows) -> bool:
        """Return whether it failed on too many of these questions to be compared."""
        answered = int(self.scored.answered[rows].sum())
        failed = int(self.failed[rows].sum())
        return not answered or failed / (answered + failed) > MOST_FAILED

    def right(self, plan: Plan, rows: Rows) -> int:
        """Return how many of these questions it answered correctly."""
        return int((self.scored.decides(plan)[rows] >= RIGHT).sum())

    def errors_by_reason(self, rows: Rows) -> dict[str, int]:
        """Return how many of these questions it failed on, the most frequent reason first."""
        counts = Counter(self.errors[row] for row in rows[self.failed[rows]].tolist())
        return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))

    def latency(self, answered: Rows, concurrency: int) -> Latency | None:
        """Return how long the answers to these questions took; None if there are none."""
        if not len(answered):
            return None
        first_text = np.percentile(self.first_text_ms[answered], (50, 95)).tolist()
        total = np.percentile(self.total_ms[answered], (50, 95)).tolist()
        return Latency(len(answered), concurrency, *first_text, *total)

    def failures(self, rows: Rows) -> tuple[FailureShare, ...]:
        """Return the wrong answers to these questions by kind, the earliest as examples."""
        shares = []
        for number, kind in enumerate(KINDS):
            wrong = np.sort(self.sequence[rows[self.kind[rows] == number]])
            if len(wrong):
                examples = tuple(wrong[:MOST_EXAMPLES].tolist())
                shares.append(FailureShare(kind, len(wrong), examples))
        return tuple(shares)


def scored(answers: Mapping[int, Answer], size: int) -> Scored:
    """Return the scores of answers by row, of `size` rows."""
    fine = {row: answer for row, answer in answers.items() if not answer.error}
    return Scored(
        answered=_flags(fine, size),
        strict=_floats(((row, answer.strict) for row, answer in fine.items()), size),
        format_blind=_floats(((row, answer.format_blind) for row, answer in fine.items()), size),
        judge=_floats(((row, answer.judge) for row, answer in fine.items()), size),
    )


def measures(
    candidate: Candidate,
    answers: Mapping[int, Answer],
    kinds: Mapping[int, FailureKind],
    size: int,
    concurrency: int,
) -> Measures:
    """Return what the answers of one candidate by row come to. `kinds` has the kinds of the wrong
    ones by sequence. The first `concurrency` answers are the cold ones."""
    fine = {row: answer for row, answer in answers.items() if not answer.error}
    by_time = sorted(answers, key=lambda row: (answers[row].time, answers[row].sequence))
    first_text = ((row, _first_text(answer)) for row, answer in fine.items())
    number = {kind: index for index, kind in enumerate(KINDS)}
    wrong = {
        row: number[kinds[answer.sequence]]
        for row, answer in fine.items()
        if answer.sequence in kinds
    }
    return Measures(
        candidate=candidate,
        scored=scored(answers, size),
        failed=_flags((row for row in answers if row not in fine), size),
        errors={row: answer.error for row, answer in answers.items() if answer.error},
        total_ms=_floats(((row, answer.total_ms) for row, answer in fine.items()), size),
        first_text_ms=_floats(first_text, size),
        cold=_flags(by_time[:concurrency], size),
        busy=_busy(answers, by_time, size),
        input_tokens=_floats(((row, answer.input_tokens) for row, answer in fine.items()), size),
        output_tokens=_floats(((row, answer.output_tokens) for row, answer in fine.items()), size),
        degraded=_flags((row for row, answer in fine.items() if answer.degraded), size),
        no_evidence=_flags((row for row, answer in fine.items() if answer.no_evidence), size),
        supported=_counts({row: len(answer.quotes) for row, answer in fine.items()}, size),
        unsupported=_counts({row: answer.unsupported for row, answer in fine.items()}, size),
        sequence=_counts({row: answer.sequence for row, answer in answers.items()}, size),
        kind=_counts(wrong, size, -1),
    )


def busy_seconds(starts: Floats, ends: Floats) -> float:
    """Return the length of the union of spans that are sorted by their starts."""
    if not len(starts):
        return 0.0
    before = np.concatenate(([-np.inf], np.maximum.accumulate(ends)[:-1]))
    return float(np.maximum(0.0, ends - np.maximum(starts, before)).sum())


def _busy(answers: Mapping[int, Answer], by_time: Sequence[int], size: int) -> Floats:
    """Share out the seconds in which any answer was on its way, by how long each took: so that the
    shares of some questions add up to what these cost."""
    starts = np.array([answers[row].time for row in by_time], np.float64)
    took = np.array([answers[row].total_ms for row in by_time], np.float64) / 1000
    shares = np.zeros(size)
    if took.sum():
        shares[by_time] = took * (busy_seconds(starts, starts + took) / took.sum())
    return shares


def _first_text(answer: Answer) -> float:
    """Without any text its end is what the caller waited for."""
    return answer.total_ms if answer.first_text_ms is None else answer.first_text_ms


def _floats(values: Iterable[tuple[int, float | None]], size: int) -> Floats:
    known = [(row, value) for row, value in values if value is not None]
    array = np.full(size, NAN)
    array[[row for row, _ in known]] = [value for _, value in known]
    return array


def _flags(rows: Iterable[int], size: int) -> Bools:
    array = np.zeros(size, np.bool_)
    array[list(rows)] = True
    return array


def _counts(values: Mapping[int, int], size: int, otherwise: int = 0) -> NDArray[np.intp]:
    array = np.full(size, otherwise, np.intp)
    array[list(values)] = list(values.values())
    return array
