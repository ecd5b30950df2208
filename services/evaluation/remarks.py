"""What would change a verdict, and what a comparison does not know, in sentences."""

from collections.abc import Collection, Mapping

from services.evaluation.comparison import Candidate
from services.evaluation.part import Scoreboard, listed, percent, points

RELIABLE_CLUSTERS = 40


def would_change(
    board: Scoreboard,
    chosen: str,
    left: Collection[str],
    broken: Mapping[str, Mapping[str, str]],
) -> tuple[str, ...]:
    """Return what would make another candidate the one to take than `chosen`."""
    told = []
    margin = board.plan.margin
    order = board.cheapest_first(left)
    before = order[: order.index(chosen)]
    if before:
        cheaper = max(before, key=board.value)
        gap = board.gap(chosen, cheaper)
        if gap:
            told.append(
                f"A margin above {points(-min(-gap.high, 0.0))} instead of {points(margin)}: then "
                f"{cheaper}, which costs no more, counts as not worse."
            )
    better = [
        other
        for other in order[order.index(chosen) + 1 :]
        if (gap := board.gap(other, chosen)) and gap.value > 0
    ]
    if better:
        best = max(better, key=board.value)
        gap = board.gap(best, chosen)
        if gap:
            told.append(
                f"A margin below {points(gap.high)} instead of {points(margin)}: then {best} may "
                "count as better."
            )
    for one, how in broken.items():
        gap = board.gap(one, chosen)
        if gap and gap.value > 0:
            told.append(f"Another limit: {one} scores higher but {listed(how.values())}.")
    if len(left) > 1 and order[0] == chosen:
        told.append(
            f"Prices, or a number of answers to spread training over, by which {chosen} is no "
            "longer the cheapest."
        )
    if not told:
        told.append("A candidate that was not compared, or other questions.")
    return tuple(told)


def unknown(board: Scoreboard, whole: Scoreboard, chosen: str) -> tuple[str, ...]:
    """Return what the comparison cannot say, `chosen` being empty if nothing was decided. `board`
    has the questions that decide, `whole` all of them."""
    plan, part = board.plan, board.part
    told = []
    if part.clusters < RELIABLE_CLUSTERS:
        told.append(
            f"The questions are about {part.clusters} separate groups of documents; with fewer "
            f"than {RELIABLE_CLUSTERS} the intervals are unreliable."
        )
    for one in plan.candidates:
        if one.id in whole.results:
            told += _of_one(whole, one)
    results = list(whole.results.values())
    searching = [one.id for one in plan.candidates if one.searches]
    if searching and not any(result.oracle for result in results):
        told.append(
            "No relevant documents are known, so wrong answers cannot be put down to missing "
            "knowledge, search or reading."
        )
    if searching and not any(result.staleness for result in results):
        told.append(
            "There are no answers after a change of documents, so how fast each candidate follows "
            "new facts is not measured."
        )
    for one in plan.candidates:
        told += _read_worse(board, one)
    return tuple(told)


def _of_one(board: Scoreboard, one: Candidate) -> list[str]:
    """Say what is amiss with the answers of one candidate."""
    result = board.results[one.id]
    told = []
    errors = sum(result.errors.values())
    why = listed(f"{reason} {count} times" for reason, count in sorted(result.errors.items()))
    if result.failed:
        told.append(
            f"{one.id} failed and is not compared" + (f": {why}." if result.errors else ".")
        )
        return told
    if errors:
        told.append(f"{one.id} has no answer to {errors} questions: {why}. They are not scored.")
    if result.degraded:
        told.append(f"{result.degraded} answers of {one.id} were degraded; they are scored as is.")
    overlap = result.overlap
    score = board.score(one.id)
    shared = overlap.exact + overlap.near + overlap.shared_document if overlap else 0
    if overlap and shared and score:
        text = (
            f"{shared} of {overlap.questions} questions are also in the training data of {one.id}: "
            f"{overlap.exact} exactly, {overlap.near} nearly, {overlap.shared_document} by "
            f"document. It scores {percent(score.value)} with them"
        )
        rest = result.without_overlap
        clean = rest and (rest.strict if board.plan.scoring.strict_decides else rest.format_blind)
        told.append(
            text + (f" and {percent(clean.value)} without." if clean else "; nothing is without.")
        )
    if one.adapter and overlap is None:
        told.append(
            f"The training data of {one.id} is not known, so whether it has seen the questions "
            "is not either."
        )
    if one.adapter and result.training_seconds is None:
        told.append(f"How long training took for {one.id} is not known; its cost is left out.")
    return told


def _read_worse(board: Scoreboard, one: Candidate) -> list[str]:
    """Warn of an adapter that reads documents worse than the model without it."""
    if one.path != "hybrid":
        return []
    plain = [
        other.id
        for other in board.plan.candidates
        if other.path == "rag" and (gap := board.gap(one.id, other.id)) and gap.worse
    ]
    tuned = [
        other.id
        for other in board.plan.candidates
        if other.path == "tuned"
        and other.adapter == one.adapter
        and (gap := board.gap(one.id, other.id))
        and gap.worse
    ]
    if not plain and not tuned:
        return []
    return [
        f"{one.id} is worse than {listed([*plain, *tuned])}: its adapter may never have been "
        "trained with passages, and one that was may do better."
    ]
