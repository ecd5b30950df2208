"""What became of the answers whose documents changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.evaluation.comparison import Answer, Question, Scoring
from services.evaluation.failures import RIGHT
from services.evaluation.measures import NAN, Floats, Rows
from services.evaluation.scoring import score

NEW, OLD, NEITHER = range(3)


@dataclass(frozen=True)
class Changed:
    """How one candidate answered after the change, one value a question."""

    kinds: NDArray[np.intp]  # NEW, OLD or NEITHER; -1 without an answer
    ends: Floats  # when the answer was there, in seconds since 1970; NaN without one

    def shares(self, rows: Rows) -> list[Floats]:
        """Return 1 or 0 for each of the kinds, of those of these questions that were answered."""
        kinds = self.kinds[self.asked(rows)]
        return [(kinds == kind).astype(np.float64) for kind in (NEW, OLD, NEITHER)]

    def asked(self, rows: Rows) -> Rows:
        """Return those of these questions that were answered."""
        return rows[self.kinds[rows] >= 0]

    def follows(self, rows: Rows, changed_at: float) -> float | None:
        """Return the seconds from the change to the first answer that is right now."""
        ends = self.ends[rows[self.kinds[rows] == NEW]]
        if not changed_at or not len(ends):
            return None
        return max(0.0, float(ends.min()) - changed_at)


def changed(
    questions: Sequence[Question], answers: Mapping[int, Answer], scoring: Scoring
) -> Changed:
    """Return what the answers of phase "staleness", by row of `questions`, say."""
    kinds = np.full(len(questions), -1, np.intp)
    ends = np.full(len(questions), NAN)
    for row, answer in answers.items():
        if questions[row].stale_answers and not answer.error:
            kinds[row] = judged(scoring, answer.text, questions[row])
            ends[row] = answer.time + answer.total_ms / 1000
    return Changed(kinds, ends)


def judged(scoring: Scoring, text: str, question: Question) -> int:
    """Return whether a text says what is right now, what was right before, or neither.

    A text may be right both ways, as when it quotes the old answer beside the new one or when both
    share words. Then the better score tells, the deciding one first; the new answer, if both are
    equal.
    """
    new, old = (
        _deciding_first(scoring, score(scoring, text, said))
        for said in (question.answers, question.stale_answers)
    )
    if new[0] >= RIGHT and new >= old:
        return NEW
    return OLD if old[0] >= RIGHT else NEITHER


def _deciding_first(scoring: Scoring, scores: tuple[float, float]) -> tuple[float, float]:
    return scores if scoring.strict_decides else (scores[1], scores[0])
