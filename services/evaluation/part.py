"""The questions that a verdict is about, and what is read off them in the score that decides."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from services.evaluation.comparison import Candidate, Plan
from services.evaluation.outcome import CandidateResult, Estimate, PairDifference

SIGNIFICANT = 0.05  # of p-values, after Holm's correction


@dataclass(frozen=True)
class Part:
    """What was measured on all questions, or on some of them, such as those of one type.

    `trained` are the questions left out because an adapter was trained on them, `changed` are those
    in it that count as they were answered after documents changed.
    """

    results: tuple[CandidateResult, ...]
    differences: tuple[PairDifference, ...]
    questions: int
    clusters: int
    trained: int = 0
    changed: int = 0


@dataclass(frozen=True)
class Gap:
    """What one candidate scores more than another: in the score that decides, from -1 to 1."""

    value: float
    low: float
    high: float
    significant: bool  # in the answers that only one of them got right
    not_worse: bool  # the first is not worse than the second by more than the margin
    not_better: bool  # nor is the second worse than the first
    questions_needed: int

    @property
    def better(self) -> bool:
        return self.low > 0 and self.significant

    @property
    def worse(self) -> bool:
        return self.high < 0 and self.significant


class Scoreboard:
    """The candidates of a plan with what a part says of them. `tests` is how many parts are asked
    the same, by which the differences of each are corrected (Bonferroni)."""

    def __init__(self, plan: Plan, part: Part, tests: int = 1) -> None:
        self.plan = plan
        self.part = part
        self._level = SIGNIFICANT / max(tests, 1)
        self.candidates = {candidate.id: candidate for candidate in plan.candidates}
        self.results = {
            result.candidate: result
            for result in part.results
            if result.candidate in self.candidates
        }
        self._pairs = {(pair.first, pair.second): pair for pair in part.differences}

    def score(self, candidate: str) -> Estimate | None:
        """Return the score that decides; None if the candidate has no answers."""
        result = self.results.get(candidate)
        if result is None:
            return None
        scores = result.scores
        return scores.strict if self.plan.scoring.strict_decides else scores.format_blind

    def value(self, candidate: str) -> float:
        score = self.score(candidate)
        return score.value if score else 0.0

    def gap(self, first: str, second: str) -> Gap | None:
        """Return `first` less `second`; None if they have no questions together."""
        strict = self.plan.scoring.strict_decides
        if pair := self._pairs.get((first, second)):
            gap = pair.strict if strict else pair.format_blind
            return Gap(
                gap.value,
                gap.low,
                gap.high,
                pair.adjusted_p_value < self._level,
                pair.first_not_inferior,
                pair.second_not_inferior,
                pair.questions_needed,
            )
        if pair := self._pairs.get((second, first)):
            gap = pair.strict if strict else pair.format_blind
            return Gap(
                -gap.value,
                -gap.high,
                -gap.low,
                pair.adjusted_p_value < self._level,
                pair.second_not_inferior,
                pair.first_not_inferior,
                pair.questions_needed,
            )
        return None

    def cost(self, candidate: str) -> float:
        """Return what 1,000 answers cost, in the two digits in which costs are compared: those
        measured of two copies differ a little."""
        return float(f"{self.results[candidate].cost_per_thousand:.1e}")

    def cheapest_first(self, candidates: Iterable[str]) -> list[str]:
        """Order by cost, and what costs the same by training, tokens and latency."""

        def price(candidate: str) -> tuple[float, bool, float, float]:
            result = self.results[candidate]
            tokens = result.input_tokens + result.output_tokens
            latency = result.warm or result.cold
            return (
                self.cost(candidate),
                bool(self.candidates[candidate].adapter),
                tokens,
                latency.total_p95_ms if latency else 0.0,
            )

        return sorted(candidates, key=price)


def shown_examples(candidate: Candidate) -> bool:
    """Return whether a candidate is shown examples in its prompt."""
    try:
        options = json.loads(candidate.options or "{}")
    except ValueError:
        return False
    return isinstance(options, dict) and bool(options.get("examples"))


def points(difference: float) -> str:
    """Write a difference of scores in points."""
    size = abs(difference) * 100
    text = f"{size:.1f}" if size < 10 else f"{size:.0f}"
    text = text.removesuffix(".0")
    return f"{text} point" if text == "1" else f"{text} points"


def percent(share: float) -> str:
    """Write a share in percent."""
    size = share * 100
    near_an_end = 0 < size < 10 or 90 < size < 100
    return f"{f'{size:.1f}' if near_an_end else f'{size:.0f}'}".removesuffix(".0") + " %"


def listed(names: Iterable[str]) -> str:
    """Write names as in a sentence."""
    *most, last = list(names) or [""]
    return f"{', '.join(most)} and {last}" if most else last
