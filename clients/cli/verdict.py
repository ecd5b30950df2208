"""What came of a comparison, in words."""

from collections.abc import Iterable, Sequence

from clients.applying import hindrance
from clients.cli.output import line, table
from clients.comparisons import Comparison, Reason, Verdict
from clients.results import CandidateResult, Estimate

HEADER = ("CANDIDATE", "STRICT", "FORMAT-BLIND", "P95", "COST PER 1,000")


def outcome(comparison: Comparison) -> list[str]:
    """Return in lines the verdict of a finished comparison and what it rests on."""
    verdict = comparison.verdict
    if verdict is None:
        return []
    lines = [line(verdict.summary), ""]
    lines += table(HEADER, [_row(comparison, result) for result in comparison.results])
    marked = " * is what the verdict names." if verdict.candidate else ""
    lines += [f"Scores are from 0 to 1, with their 95 % intervals in brackets.{marked}"]
    lines += _failed(comparison.results)
    lines += _list("Why:", map(reason, verdict.reasons))
    lines += _list("By type of question:", _types(verdict))
    lines += _list("What would change it:", map(line, verdict.would_change))
    lines += _list("What it does not know:", map(line, verdict.unknown))
    if verdict.questions_needed:
        lines.append("")
        lines.append(f"About {verdict.questions_needed:,} more questions would decide.")
    return [*lines, ""]


def reason(reason: Reason) -> str:
    """Return a reason on one line."""
    return line(f"{reason.message} ({reason.code})")


def estimate(number: Estimate | None) -> str:
    """Return a number with its interval."""
    return f"{number.value:.2f} [{number.low:.2f}, {number.high:.2f}]" if number else "-"


def next_steps(comparison: Comparison) -> list[str]:
    """Return in lines what to do with a finished comparison now."""
    steps = [f"Its report: tworoads comparisons report {comparison.id}"]
    match hindrance(comparison):
        case "", _:
            steps.append(f"Let AUTO follow it: tworoads comparisons apply {comparison.id}")
        case "VERDICT_OPEN", _ if corpus := line(comparison.start.corpus):
            steps.append(f"Choose a path yourself: tworoads policies set {corpus} PATH")
        case "POLICY_IMPOSSIBLE", why:
            steps.append(line(f"AUTO cannot follow it: {why}."))
    return steps


def _row(comparison: Comparison, result: CandidateResult) -> tuple[str, ...]:
    verdict, name = comparison.verdict, result.candidate
    named = f"{name} *" if verdict and name == verdict.candidate else name
    if result.failed:
        return (named, "failed", "-", "-", "-")
    return (
        named,
        estimate(result.scores.strict),
        estimate(result.scores.format_blind),
        f"{result.warm.total_p95_ms:,.0f} ms" if result.warm else "-",
        f"{result.cost_per_thousand:,.4g} {comparison.prices.currency}",
    )


def _failed(results: Sequence[CandidateResult]) -> list[str]:
    lines = []
    for result in results:
        if result.errors:
            lines.append(line(f"{result.candidate} failed on {_errors(result)}."))
        if result.degraded:
            lines.append(
                line(f"{result.candidate} answered {result.degraded:,} with something left out.")
            )
        if (overlap := result.overlap) and (found := overlap.exact + overlap.near):
            lines.append(
                line(
                    f"{result.candidate}: {found:,} of {overlap.questions:,} questions are in the"
                    " adapter's training examples, or almost."
                )
            )
    return lines


def _errors(result: CandidateResult) -> str:
    count = sum(result.errors.values())
    questions, are = ("question", "is") if count == 1 else ("questions", "are")
    kept = "and is not compared" if result.failed else f"which {are} not scored"
    reasons = ", ".join(f"{number:,} {why}" for why, number in result.errors.items())
    return f"{count:,} {questions}, {kept}: {reasons}"


def _types(verdict: Verdict) -> list[str]:
    lines = []
    for one in verdict.types:
        why = f": {line(one.reasons[0].message)}" if one.reasons else ""
        lines.append(line(f"{one.type}: {one.candidate}") + why)
    if verdict.types:
        follows = (
            "AUTO can tell the types apart."
            if verdict.router
            else ("AUTO would not gain from telling the types apart, so the policy names one path.")
        )
        lines.append(follows)
    return lines


def _list(title: str, items: Iterable[str]) -> list[str]:
    lines = [f"- {item}" for item in items]
    return ["", title, *lines] if lines else []
