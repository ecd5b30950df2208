"""Whether the verdict of a comparison can become a policy."""

from clients.comparisons import Candidate, Comparison
from services.prompts.options import unusual


def hindrance(comparison: Comparison) -> tuple[str, str]:
    """Return why AUTO cannot follow a comparison, as a reason and in words; both empty if it can.

    COMPARISON_NOT_FINISHED, VERDICT_OPEN if the verdict names no candidate, or POLICY_IMPOSSIBLE if
    a policy cannot say what the candidate does, or that of a type.
    """
    verdict, corpus = comparison.verdict, comparison.start.corpus
    if verdict is None:
        return "COMPARISON_NOT_FINISHED", f"comparison {comparison.id} has no verdict"
    if not verdict.candidate:
        return "VERDICT_OPEN", "the verdict names no path, so there is none to set"
    if not corpus:
        missing = "a policy belongs to a corpus, and this comparison has none"
        return "POLICY_IMPOSSIBLE", missing
    types = verdict.types if verdict.router else ()
    wanted = {verdict.candidate, *(one.candidate for one in types)}
    for candidate in comparison.start.candidates:
        if candidate.id in wanted and (lost := _lost(candidate, corpus)):
            return "POLICY_IMPOSSIBLE", f"the verdict names {candidate.id}, {lost}"
    return "", ""


def _lost(candidate: Candidate, corpus: str) -> str:
    """Return what a policy would lose of a candidate, in words; empty if nothing."""
    left = unusual(candidate.options)
    if "examples" in left or (candidate.path == "base" and candidate.id == "few-shot"):
        return (
            "whose examples a policy cannot keep: send them with each question, as `examples` in"
            " its options"
        )
    if candidate.corpus not in ("", corpus):
        return f"which searches another corpus: {candidate.corpus}"
    return f"but a policy cannot keep its {', '.join(sorted(left))}" if left else ""
