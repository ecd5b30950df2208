"""Comparisons whose truth is known: how often intervals, differences and verdicts are right.

    python -m benchmarks.simulated [--comparisons 2000]

Each comparison has at least 40 clusters of questions. Answers of one cluster are alike, those of
one question to several candidates too. The true scores are drawn anew for each comparison, so that
true differences of all sizes are met, and some of none at all.

covered     the 95 % interval of a difference has the true difference in it
wrong road  the verdict names a candidate that is truly worse than another one by more than the
            margin, or a dearer one although a cheaper one is truly as good as it
winner      without any true difference, a dearer candidate is named

The last line times the statistics of 10,000 questions and 6 candidates.
"""

import argparse
import sys
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from services.evaluation.comparison import Candidate, Plan
from services.evaluation.outcome import CandidateResult, Estimate, Scores
from services.evaluation.statistics import differences, estimate
from services.evaluation.verdict import Part, decide

MARGIN = 0.05
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Setting:
    """How comparisons are drawn. `spread` is the most that true scores differ from their middle."""

    name: str
    candidates: int
    clusters: int
    largest: int  # questions of a cluster: from 1 to this
    spread: float
    within: float = 0.3  # share of the variance that is the cluster's
    alike: float = 0.4  # share that is the question's


SETTINGS = (
    Setting("2 candidates, 40 questions", 2, 40, 1, 0.2),
    Setting("2 candidates, 40 clusters of 1-5", 2, 40, 5, 0.2),
    Setting("2 candidates, 200 questions", 2, 200, 1, 0.1),
    Setting("2 candidates, 200 clusters of 1-5", 2, 200, 5, 0.1),
    Setting("4 candidates, 100 clusters of 1-3", 4, 100, 3, 0.2),
    Setting("4 candidates, 400 clusters of 1-3", 4, 400, 3, 0.1),
    Setting("6 candidates, 1,000 questions", 6, 1000, 1, 0.08),
)


@dataclass
class Count:
    """What came of the comparisons of one setting."""

    pairs: int = 0
    covered: int = 0
    comparisons: int = 0
    decided: int = 0
    wrong: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--comparisons", type=int, default=2100, metavar="N")
    # One half has true differences, the other has none.
    each = -(-parser.parse_args().comparisons // (2 * len(SETTINGS)))
    print(f"{'':36}{'covered':>9}{'decided':>9}{'wrong road':>12}   none differ: winner")
    total, none = Count(), Count()
    for number, setting in enumerate(SETTINGS):
        differ, same = Count(), Count()
        for seed in range(each):
            rng = np.random.default_rng((number, seed))
            compare(setting, _true_scores(setting, rng), rng, differ)
            compare(setting, np.full(setting.candidates, rng.uniform(0.2, 0.8)), rng, same)
        _print(setting.name, differ, same)
        _add(total, differ)
        _add(none, same)
    _print(f"all, {total.comparisons + none.comparisons:,} comparisons", total, none)
    seconds = time_of_statistics()
    print(f"\nstatistics of 10,000 questions and 6 candidates: {seconds:.1f} s")
    coverage = (total.covered + none.covered) / (total.pairs + none.pairs)
    if not 0.93 <= coverage <= 0.97:
        sys.exit("The intervals are not what they say.")
    if max(total.wrong / total.comparisons, none.wrong / none.comparisons) > 0.05:
        sys.exit("Wrong roads are named too often.")
    if seconds > 10:
        sys.exit("The statistics take too long.")


def compare(setting: Setting, truth: Floats, rng: np.random.Generator, count: Count) -> None:
    """Draw the answers of one comparison, decide it and count what came of it."""
    sizes = rng.integers(1, setting.largest, endpoint=True, size=setting.clusters)
    clusters = np.repeat(np.arange(setting.clusters), sizes)
    scores = _answers(setting, truth, clusters, rng)
    ids = [f"c{number}" for number in range(setting.candidates)]  # the cheapest first
    pairs = differences(ids, scores, scores, scores, clusters, MARGIN)
    for pair in pairs:
        true = truth[int(pair.first[1:])] - truth[int(pair.second[1:])]
        count.pairs += 1
        count.covered += pair.strict.low <= true <= pair.strict.high
    plan = Plan(tuple(Candidate(id, "base") for id in ids), margin=MARGIN)
    results = tuple(
        CandidateResult(id, _scores(scores[number]), cost_per_thousand=number + 1.0)
        for number, id in enumerate(ids)
    )
    verdict = decide(plan, Part(results, pairs, len(clusters), setting.clusters), {})
    count.comparisons += 1
    if verdict.candidate:
        count.decided += 1
        named = ids.index(verdict.candidate)
        worse = truth.max() - truth[named] > MARGIN
        dearer = bool((truth[:named] >= truth[named]).any())
        count.wrong += worse or dearer


def time_of_statistics() -> float:
    """Return seconds for all pairs and the intervals of all scores."""
    rng = np.random.default_rng(0)
    scores = (rng.random((6, 10_000)) < 0.6).astype(np.float64)
    softer = np.clip(scores * 0.5 + rng.random(scores.shape) * 0.5, 0, 1)
    clusters = np.arange(10_000)
    start = time.perf_counter()
    differences(list("abcdef"), scores, softer, scores, clusters, MARGIN)
    for row in (*scores, *softer):
        estimate(row, clusters)
    return time.perf_counter() - start


def _true_scores(setting: Setting, rng: np.random.Generator) -> Floats:
    middle = rng.uniform(0.25, 0.75)
    return np.asarray(rng.uniform(-1, 1, setting.candidates) * setting.spread + middle, np.float64)


def _answers(
    setting: Setting, truth: Floats, clusters: NDArray[np.intp], rng: np.random.Generator
) -> Floats:
    """Return 1 for right and 0 for wrong, shape (candidates, questions). Whether each is right is
    a threshold of a normal variable, of which a part is shared, so that the mean is the truth."""
    shape = (setting.candidates, len(clusters))
    own = 1 - setting.within - setting.alike
    # Half of the cluster's part is each candidate's own: clusters also suit some and not others.
    for_all = rng.standard_normal(setting.clusters)[clusters]
    for_each = rng.standard_normal((setting.candidates, setting.clusters))[:, clusters]
    hidden = (
        np.sqrt(setting.within / 2) * (for_all + for_each)
        + np.sqrt(setting.alike) * rng.standard_normal(shape[1])
        + np.sqrt(own) * rng.standard_normal(shape)
    )
    return np.asarray(hidden < norm.ppf(truth)[:, None], np.float64)


def _scores(row: Floats) -> Scores:
    # The rule reads the mean alone.
    mean = float(row.mean())
    found = Estimate(mean, mean, mean)
    return Scores(len(row), found, found)


def _add(total: Count, count: Count) -> None:
    for name, value in vars(count).items():
        setattr(total, name, getattr(total, name) + value)


def _print(name: str, differ: Count, same: Count) -> None:
    covered = (differ.covered + same.covered) / (differ.pairs + same.pairs)
    print(
        f"{name:36}{covered:>9.1%}{differ.decided / differ.comparisons:>9.1%}"
        f"{differ.wrong / differ.comparisons:>12.1%}{same.wrong / same.comparisons:>22.1%}",
        flush=True,
    )


if __name__ == "__main__":
    main()
