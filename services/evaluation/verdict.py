"""The rule that says which candidate to take.

1. What failed is left out, and what breaks a constraint.
2. Of those left, each pair is one of: better (the interval of the difference is above zero, and the
   answers that only one got right say so too, after Holm's correction), not worse (with 95 % the
   difference is above minus the margin), or unclear.
3. The cheapest that is not worse than any other is taken, if each cheaper one is clearly worse.
   Otherwise, or with fewer than 30 questions or 5 clusters, there is not enough evidence.

That a candidate must be not worse than *each* other, not only than the one with the highest score,
is what keeps the wrong road from being named: the highest score may be luck.

Types of question are decided in the same way, each on its own; where all questions together are
undecided, each type may still have its road.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from services.evaluation.comparison import Plan
from services.evaluation.outcome import Reason, TypeVerdict, Verdict
from services.evaluation.part import Part, Scoreboard, listed, percent, points
from services.evaluation.reasons import reasons_for
from services.evaluation.remarks import unknown, would_change

__all__ = ["FEWEST", "Part", "decide", "each_its_own"]

FEWEST = 30  # questions
GAPS = ("knowledge_gap", "behaviour_gap", "facts_change")
FEWEST_CLUSTERS = 5  # of them; below 40 the verdict says that intervals are unreliable


@dataclass(frozen=True)
class Choice:
    """What the rule takes; `candidate` is empty if that takes `questions_needed` more questions."""

    candidate: str = ""
    questions_needed: int = 0
    unclear: tuple[tuple[str, str], ...] = ()
    contenders: tuple[str, ...] = ()  # between which it is, the cheapest first, if others are worse


def decide(plan: Plan, part: Part, types: Mapping[str, Part], whole: Part | None = None) -> Verdict:
    """Return the verdict on the questions of `part`, and on each type where that is another one.

    `whole` is what was measured on all questions, if `part` has only those that may decide.
    """
    board = Scoreboard(plan, part)
    told = Scoreboard(plan, whole) if whole else board
    compared = [
        candidate.id
        for candidate in plan.candidates
        if (result := board.results.get(candidate.id))
        and not result.failed
        and board.score(candidate.id)
    ]
    broken = {candidate: _broken(board, candidate) for candidate in compared}
    left = [candidate for candidate in compared if not broken[candidate]]
    if not left and (part.questions or not part.trained):
        return _none_left(board, broken, unknown(board, told, ""))
    choice = _choose(board, left) if left else Choice("", FEWEST)
    by_type = _by_type(plan, types, left, choice.candidate)
    if not choice.candidate:
        return _undecided(board, left, choice, by_type, unknown(board, told, ""))
    chosen = board.candidates[choice.candidate]
    reasons = reasons_for(board, chosen.id, left, broken)
    return Verdict(
        path=chosen.path,
        adapter=chosen.adapter,
        candidate=chosen.id,
        reasons=reasons,
        summary=_summary(board, chosen.id, left, reasons, by_type),
        types=by_type,
        would_change=would_change(board, chosen.id, left, broken),
        unknown=unknown(board, told, chosen.id),
    )


def each_its_own(plan: Plan, part: Part, verdict: Verdict, otherwise: str) -> Verdict:
    """Return the verdict where no one road is decided, but types of question have theirs and a
    router tells these apart: `otherwise` for every other question."""
    chosen = {candidate.id: candidate for candidate in plan.candidates}[otherwise]
    reasons = {reason.code: reason for type in verdict.types for reason in type.reasons}
    board = Scoreboard(plan, part)
    return replace(
        verdict,
        path=chosen.path,
        adapter=chosen.adapter,
        candidate=chosen.id,
        reasons=tuple(reasons.values()),
        summary=f"No one road is best for all {_counted(board)}. Take "
        + listed(f"{one.candidate} for {_plain(one.type)}" for one in verdict.types)
        + f", and {chosen.id} for everything else.",
        would_change=("Questions of other types, or in another mix.",),
        questions_needed=0,
    )


def _broken(board: Scoreboard, candidate: str) -> dict[str, str]:
    """Return which constraints a candidate breaks: cost, latency or quality, and how."""
    limits, result = board.plan.constraints, board.results[candidate]
    broken = {}
    if limits.max_cost_per_correct is not None:
        cost = result.cost_per_correct
        if cost is None:
            broken["cost"] = "has no correct answer to cost anything"
        elif cost > limits.max_cost_per_correct:
            broken["cost"] = (
                f"costs {cost:.3g} per correct answer where {limits.max_cost_per_correct:.3g} "
                "is allowed"
            )
    if limits.max_p95_ms is not None:
        latency = result.warm or result.cold
        if latency is None:
            broken["latency"] = "has no measured time to answer"
        elif latency.total_p95_ms > limits.max_p95_ms:
            broken["latency"] = (
                f"takes {latency.total_p95_ms:.0f} ms (p95) where {limits.max_p95_ms:.0f} ms "
                "are allowed"
            )
    if limits.min_quality is not None and board.value(candidate) < limits.min_quality:
        broken["quality"] = (
            f"scores {percent(board.value(candidate))} where {percent(limits.min_quality)} "
            "are asked for"
        )
    return broken


def _choose(board: Scoreboard, left: Collection[str]) -> Choice:
    """Apply the rule to the candidates that are left."""
    missing = max(FEWEST - board.part.questions, FEWEST_CLUSTERS - board.part.clusters, 0)
    order = board.cheapest_first(left)
    for number, candidate in enumerate(order):
        others = [other for other in order if other != candidate]
        if all(_not_worse(board, candidate, other) for other in others):
            if all(_better(board, candidate, other) for other in order[:number]) and not missing:
                return Choice(candidate)
            break
    return _open(board, order, missing)


def _not_worse(board: Scoreboard, first: str, second: str) -> bool:
    gap = board.gap(first, second)
    return gap is not None and (gap.not_worse or gap.better)


def _better(board: Scoreboard, first: str, second: str) -> bool:
    gap = board.gap(first, second)
    return gap is not None and gap.better


def _open(board: Scoreboard, order: list[str], missing: int) -> Choice:
    """Say how many more questions would decide: as many as the most doubtful pair needs, of those
    that have the best one or the cheapest that may be as good in them."""
    best = max(order, key=board.value)
    contenders = [one for one in order if one == best or not _better(board, best, one)]
    pairs = {}
    for one in {best, contenders[0]}:
        for other in contenders:
            gap = board.gap(one, other) if one != other else None
            if gap and gap.questions_needed:
                pairs[min(one, other), max(one, other)] = gap.questions_needed
    if not pairs:
        for one in contenders:
            for other in contenders:
                gap = board.gap(one, other) if one < other else None
                if gap and gap.questions_needed:
                    pairs[one, other] = gap.questions_needed
    needed = max([*pairs.values(), missing, 1])
    unclear = tuple(sorted(pairs, key=lambda pair: (-pairs[pair], pair)))
    known = 1 < len(contenders) < len(order) and not missing
    return Choice("", needed, unclear, tuple(contenders) if known else ())


def _by_type(
    plan: Plan, types: Mapping[str, Part], left: Collection[str], overall: str
) -> tuple[TypeVerdict, ...]:
    """Return the types for which another candidate than `overall`, which may be empty, is decided.
    The constraints hold for all questions together, so those who honour them may answer any type.
    """
    found = []
    for type, part in types.items():
        board = Scoreboard(plan, part, len(types))
        answered = [
            candidate
            for candidate in left
            if board.score(candidate) and not board.results[candidate].failed
        ]
        if not answered or (overall and overall not in answered):
            continue
        choice = _choose(board, answered)
        if choice.candidate in ("", overall):
            continue
        chosen = board.candidates[choice.candidate]
        reasons = reasons_for(board, chosen.id, answered, {})
        found.append(TypeVerdict(type, chosen.path, chosen.adapter, chosen.id, reasons))
    return tuple(found)


def _none_left(
    board: Scoreboard, broken: Mapping[str, Mapping[str, str]], unknown: tuple[str, ...]
) -> Verdict:
    told = [f"{candidate} {listed(how.values())}." for candidate, how in broken.items() if how] or [
        "No candidate has answers to compare."
    ]
    return Verdict(
        path="",
        adapter="",
        candidate="",
        reasons=(
            Reason("constraints_impossible", "No candidate honours all limits: " + " ".join(told)),
        ),
        summary="No road honours all limits, so none is named.",
        would_change=("Other limits, or a candidate that keeps to these.",),
        unknown=unknown,
    )


def _undecided(
    board: Scoreboard,
    left: Collection[str],
    choice: Choice,
    types: tuple[TypeVerdict, ...],
    unknown: tuple[str, ...],
) -> Verdict:
    part, needed = board.part, choice.questions_needed
    more = f"about {needed:,} more {'question' if needed == 1 else 'questions'}"
    if part.questions < FEWEST:
        why = f"{_counted(board)} are too few; {FEWEST} are the least"
    elif part.clusters < FEWEST_CLUSTERS:
        why = (
            f"{_counted(board)} are about {part.clusters} separate groups of documents "
            f"only; {FEWEST_CLUSTERS} are the least"
        )
    elif choice.unclear:
        first, second = choice.unclear[0]
        gap = board.gap(first, second)
        why = f"{first} and {second} cannot be told apart"
        if gap:
            why += (
                f": {first} is between {_side(gap.low)} and {_side(gap.high)} than {second}, and "
                f"the margin is {points(board.plan.margin)}"
            )
    else:
        why = f"the candidates {listed(left)} cannot be put in order"
    reasons = [Reason("not_enough_evidence", f"Not enough evidence: {why}. It would take {more}.")]
    summary = "There is not enough evidence to name a road."
    contenders = choice.contenders
    if contenders:
        # What all of them have in common is known, though none of them is chosen.
        summary = f"There is not enough evidence to choose between {listed(contenders)}."
        summary += f" The others are clearly worse; {contenders[0]} is the cheapest of these."
        found = [reasons_for(board, one, left, {}) for one in contenders]
        common = set.intersection(*({reason.code for reason in some} for some in found))
        reasons += [one for one in found[0] if one.code in common and one.code in GAPS]
    return Verdict(
        path="",
        adapter="",
        candidate="",
        reasons=tuple(reasons),
        summary=f"{summary} It would take {more} to decide.",
        types=types,
        would_change=(f"More questions: {more}, if the differences are what they seem.",),
        unknown=unknown,
        questions_needed=needed,
    )


def _counted(board: Scoreboard) -> str:
    """Say which questions decide."""
    part = board.part
    text = f"{part.questions} questions"
    told = []
    if part.trained:
        told.append(f"{part.trained} more do not count, for adapters were trained on them")
    if part.changed:
        told.append(f"{part.changed} count as answered after the change")
    return text + (f" ({'; '.join(told)})" if told else "")


def _side(difference: float) -> str:
    return f"{points(difference)} {'better' if difference >= 0 else 'worse'}"


def _summary(
    board: Scoreboard,
    chosen: str,
    left: Collection[str],
    reasons: tuple[Reason, ...],
    types: tuple[TypeVerdict, ...],
) -> str:
    right = percent(board.value(chosen))
    text = f"Take {chosen}: it scores {right} on {_counted(board)}."
    others = [one for one in left if one != chosen]
    if _no_difference(board, chosen, others):
        text += f" There is no difference to {listed(others)} beyond the margin; it costs no more."
    elif others:
        runner_up = max(others, key=board.value)
        text += f" The best of the others, {runner_up}, scores {percent(board.value(runner_up))}."
    if types:
        text += " Other candidates are better for " + listed(
            f"{_plain(one.type)} ({one.candidate})" for one in types
        )
        text += "."
    elif reasons[0].code in ("cost_cap", "latency_cap"):
        text += " A better one breaks a limit."
    return text


def _no_difference(board: Scoreboard, chosen: str, others: Collection[str]) -> bool:
    gaps = [board.gap(chosen, other) for other in others]
    return bool(gaps) and all(gap and gap.not_worse and gap.not_better for gap in gaps)


def _plain(text: str) -> str:
    """Return a name from the questions without what is not printable, at most 60 characters."""
    return "".join(char if char.isprintable() else " " for char in text)[:60]
