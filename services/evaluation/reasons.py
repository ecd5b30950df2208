"""Why a candidate is the one to take: what documents, training and limits did, in sentences.

The paths are two switches, documents and training, so that what each of them does can be read off
pairs that differ in that one alone.
"""

from collections.abc import Callable, Collection, Mapping

from services.evaluation.comparison import Candidate
from services.evaluation.outcome import Reason, Staleness
from services.evaluation.part import Gap, Scoreboard, listed, percent, points, shown_examples


def reasons_for(
    board: Scoreboard,
    chosen: str,
    left: Collection[str],
    broken: Mapping[str, Mapping[str, str]],
) -> tuple[Reason, ...]:
    """Return why `chosen` is taken, at least one reason, the weightiest first: limits that left a
    better one out, then gaps by their size, then facts that change, then ties."""
    gaps = [found for find in (_knowledge_gap, _behaviour_gap) if (found := find(board, chosen))]
    gaps.sort(key=lambda found: -found[0])
    reasons = [
        *_limits(board, chosen, broken),
        *(reason for _, reason in gaps),
        *_facts_change(board, chosen),
        *_tie(board, chosen, left),
    ]
    if not reasons:
        reasons.append(
            Reason(
                "tie_cheaper",
                f"Nothing else that was compared is better than {chosen} "
                f"({percent(board.value(chosen))}) by more than the margin of "
                f"{points(board.plan.margin)}.",
            )
        )
    return tuple(reasons)


def base_of(board: Scoreboard) -> str:
    """Return the candidate that is the model alone, rather without examples; empty if none is."""
    alone = [one for one in board.plan.candidates if one.path == "base" and one.id in board.results]
    alone.sort(key=shown_examples)
    return alone[0].id if alone else ""


def _knowledge_gap(board: Scoreboard, chosen: str) -> tuple[float, Reason] | None:
    mine = board.candidates[chosen]
    if not mine.searches:
        return None

    def without_documents(other: Candidate) -> bool:
        return not other.searches and other.adapter == mine.adapter

    found = _helped(board, mine, without_documents, lambda other: not other.searches)
    if found is None:
        return None
    gain, other, gap = found
    sentence = f"Documents help: {_compared(board, gain, other, gap)}."
    base = base_of(board)
    if base:
        failures = board.results[base].failures
        told = sum(share.answers for share in failures if share.kind != "unspecified")
        missing = sum(share.answers for share in failures if share.kind == "knowledge_gap")
        if told:
            sentence += (
                f" Of the wrong answers of {base} that could be explained, "
                f"{percent(missing / told)} lack knowledge: with the relevant document "
                "they are right."
            )
    return gap.value, Reason("knowledge_gap", sentence)


def _behaviour_gap(board: Scoreboard, chosen: str) -> tuple[float, Reason] | None:
    mine = board.candidates[chosen]
    if not mine.adapter:
        return None

    def untrained(other: Candidate) -> bool:
        return not other.adapter and other.searches == mine.searches

    found = _helped(board, mine, untrained, lambda other: not other.adapter)
    if found is None:
        return None
    gain, other, gap = found
    return gap.value, Reason(
        "behaviour_gap", f"Training helps: {_compared(board, gain, other, gap)}."
    )


def _helped(
    board: Scoreboard,
    mine: Candidate,
    alike: Callable[[Candidate], bool],
    any_such: Callable[[Candidate], bool],
) -> tuple[str, str, Gap] | None:
    """Return the chosen candidate, what it is better than, and by how much: of what differs in one
    thing alone the best, or, if nothing does, of what differs in that and others."""
    for fits in (alike, any_such):
        rivals = [
            other
            for other in board.plan.candidates
            if other.id != mine.id and fits(other) and board.gap(mine.id, other.id)
        ]
        plain = [other for other in rivals if not shown_examples(other)] or rivals
        if plain:
            other = max(plain, key=lambda one: board.value(one.id))
            gap = board.gap(mine.id, other.id)
            return (mine.id, other.id, gap) if gap and gap.low > 0 else None
    return None


def _compared(board: Scoreboard, first: str, second: str, gap: Gap) -> str:
    return (
        f"{first} scores {percent(board.value(first))}, {second} "
        f"{percent(board.value(second))}, {points(gap.value)} more "
        f"(from {points(gap.low)} to {points(gap.high)})"
    )


def _facts_change(board: Scoreboard, chosen: str) -> list[Reason]:
    """Documents that change are followed by what searches them, and by nothing else."""
    mine = board.results[chosen].staleness
    if not board.candidates[chosen].searches or mine is None or not mine.questions:
        return []
    fixed: list[tuple[str, Staleness]] = [
        (one.id, stale)
        for one in board.plan.candidates
        if not one.searches
        and (result := board.results.get(one.id))
        and (stale := result.staleness)
        and stale.questions
    ]
    # What was trained in is what goes stale; without an adapter there are only models that never
    # knew.
    fixed = [one for one in fixed if board.candidates[one[0]].adapter] or fixed
    if not fixed or any(mine.new_share.low <= stale.new_share.high for _, stale in fixed):
        return []
    others = listed(
        f"{name} {percent(stale.new_share.value)} (and still gives the old answer to "
        f"{percent(stale.old_share.value)})"
        for name, stale in fixed
    )
    sentence = (
        f"Facts change: after the documents changed, {chosen} gives the new answer to "
        f"{percent(mine.new_share.value)} of {mine.questions} changed questions, {others}."
    )
    if mine.seconds_to_follow is not None:
        sentence += f" It follows after {mine.seconds_to_follow:.0f} s."
    return [Reason("facts_change", sentence)]


def _limits(
    board: Scoreboard, chosen: str, broken: Mapping[str, Mapping[str, str]]
) -> list[Reason]:
    """Name the best candidate that each limit left out, if it is better than the chosen one."""
    reasons = []
    for limit, code in (("cost", "cost_cap"), ("latency", "latency_cap")):
        out = [
            one
            for one, how in broken.items()
            if limit in how and (gap := board.gap(one, chosen)) and gap.better
        ]
        if out:
            best = max(out, key=board.value)
            message = (
                f"{best} is better, {percent(board.value(best))} where {chosen} scores "
                f"{percent(board.value(chosen))}, but {broken[best][limit]}."
            )
            reasons.append(Reason("cost_cap" if code == "cost_cap" else "latency_cap", message))
    return reasons


def _tie(board: Scoreboard, chosen: str, left: Collection[str]) -> list[Reason]:
    """Name the dearer candidates that are no better than the chosen one by more than the margin,
    and not clearly worse."""
    order = board.cheapest_first(left)
    dearer = [
        (other, gap)
        for other in order[order.index(chosen) + 1 :]
        if (gap := board.gap(chosen, other)) and gap.not_worse and not gap.better
    ]
    if not dearer:
        return []
    names = listed(other for other, _ in dearer)
    margin = points(board.plan.margin)
    if all(gap.not_better for _, gap in dearer):
        text = f"There is no difference between {chosen} and {names} beyond the margin of {margin}"
    else:
        text = f"{chosen} is not worse than {names} by more than the margin of {margin}"
    first, cost, next_cost = dearer[0][0], board.cost(chosen), board.cost(dearer[0][0])
    if cost < next_cost:
        why = f"is the cheaper: 1,000 answers cost {cost:g}, those of {first} {next_cost:g}"
    else:
        why = (
            f"costs the same as {first}, {cost:g} for 1,000 answers; of such the one that needs no "
            "training, then fewer tokens, then less time is taken"
        )
    return [Reason("tie_cheaper", f"{text}, and {why}.")]
