"""Chooses the questions that tell most about how candidates differ."""

from collections.abc import Sequence
from dataclasses import dataclass

from services.evaluation.comparison import Answer, Plan, Question

MOST = 10


@dataclass(frozen=True)
class Example:
    """One question and what each candidate answered; `why` says why it is shown."""

    why: str
    question: Question
    answers: tuple[tuple[Answer, bool], ...]


def right(plan: Plan, answer: Answer) -> bool:
    """Return whether the score that decides calls the answer right."""
    score = answer.strict if plan.scoring.strict_decides else answer.format_blind
    return score is not None and score >= 0.5


def telling(
    plan: Plan, questions: Sequence[Question], answers: Sequence[Answer], chosen: str
) -> list[Example]:
    """Return at most 10 examples: in turn those that only the chosen candidate got right, those
    that it got wrong and a rival right, other differences, and those that all got wrong."""
    by_line: dict[int, list[Answer]] = {}
    for answer in answers:
        if answer.phase == "answers":
            by_line.setdefault(answer.line, []).append(answer)
    groups: dict[str, list[Example]] = {}
    for question in questions:
        found = by_line.get(question.line, [])
        pairs = tuple((answer, right(plan, answer)) for answer in found)
        if why := _why([(a.candidate, ok) for a, ok in pairs if not a.error], chosen):
            groups.setdefault(why, []).append(Example(why, question, pairs))
    order = [groups[why] for why in WHY if why in groups]
    taken: list[Example] = []
    for turn in range(MOST):
        taken += [group[turn] for group in order if turn < len(group)]
    return taken[:MOST]


WHY = (
    "Only the chosen candidate is right",
    "A rival is right, the chosen candidate is not",
    "The candidates differ",
    "All are wrong",
)


def _why(found: list[tuple[str, bool]], chosen: str) -> str:
    winners = [candidate for candidate, ok in found if ok]
    if not found or len(winners) == len(found) > 0:
        return ""
    if not winners:
        return WHY[3]
    if winners == [chosen]:
        return WHY[0]
    return WHY[1] if chosen and chosen not in winners else WHY[2]
