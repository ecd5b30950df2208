"""Why wrong answers are wrong: each is held against the one with the relevant documents given."""

from collections.abc import Sequence

from services.evaluation import json_score
from services.evaluation.comparison import Answer, Candidate, Phase, Plan, Question
from services.evaluation.outcome import FailureKind
from services.evaluation.scoring import label_of

RIGHT = 0.5  # a score from here on is right


def right_answers(question: Question, phase: Phase, changing: bool) -> tuple[str, ...]:
    """Return what is right in a phase: `stale_answers`, if there are any, until the documents
    change; `changing` says whether they do in this comparison."""
    before = changing and phase in ("answers", "oracle")
    return question.stale_answers if before and question.stale_answers else question.answers


def kinds(
    plan: Plan, questions: Sequence[Question], answers: Sequence[Answer]
) -> dict[int, FailureKind]:
    """Return why each wrong answer of phase "answers" is wrong, by Answer.sequence. What failed or
    is not scored is not among them."""
    candidates = {candidate.id: candidate for candidate in plan.candidates}
    unscored = set(plan.unscored)
    relevant = {question.line: frozenset(question.relevant) for question in questions}
    form = _Form(plan, questions)
    oracles = plan.oracles()
    given = {
        (answer.candidate, answer.line): answer
        for answer in answers
        if answer.phase == "oracle" and form.right(answer) is not None
    }
    return {
        answer.sequence: _kind(
            candidates[answer.candidate],
            answer,
            given.get((oracles.get(answer.candidate, ""), answer.line)),
            relevant[answer.line],
            form,
        )
        for answer in answers
        if answer.phase == "answers"
        and answer.line in relevant
        and answer.line not in unscored
        and form.right(answer) is False
    }


class _Form:
    """Tells whether answers are right, and whether they have the form that was asked for."""

    def __init__(self, plan: Plan, questions: Sequence[Question]) -> None:
        self._scoring = plan.scoring
        self._labels = {
            label_of(label)
            for question in questions
            for label in (*question.answers, *question.stale_answers)
        }

    def right(self, answer: Answer) -> bool | None:
        """Return whether the answer is right; None if it is not scored."""
        strict_decides = self._scoring.strict_decides
        score = answer.strict if strict_decides else answer.format_blind
        return None if answer.error or score is None else score >= RIGHT

    def wrong(self, answer: Answer) -> bool:
        """Return whether a wrong answer has a wrong form."""
        if self._scoring.strict == "label" and label_of(answer.text) not in self._labels:
            return True
        if self._scoring.strict == "json" and json_score.parse(answer.text) is None:
            return True
        return self._scoring.strict_decides and (answer.format_blind or 0.0) >= RIGHT


def _kind(
    candidate: Candidate,
    answer: Answer,
    oracle: Answer | None,
    relevant: frozenset[str],
    form: _Form,
) -> FailureKind:
    missed = relevant.isdisjoint(answer.documents)
    if oracle is None:
        if form.wrong(answer):
            return "behaviour_gap"
        if not (candidate.searches and relevant):
            return "unspecified"
        return "retrieval_miss" if missed else "reading_failure"
    if form.right(oracle):
        if not candidate.searches:
            return "knowledge_gap"
        return "retrieval_miss" if missed else "reading_failure"
    return "behaviour_gap" if form.wrong(oracle) else "reading_failure"
