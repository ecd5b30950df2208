"""Intervals and tests of scores that share questions, and questions that share documents.

All of it is paired: a difference is that of two candidates on one question. Questions about the
same document are not independent, so what is resampled are clusters of questions.

An interval is an expanded percentile bootstrap (Hesterberg 2015, "What teachers should know about
the bootstrap"): plain percentiles are too narrow with few clusters, so they are widened by what
Student's t is wider than the normal distribution. Two invented questions, one at each end of the
scale, are resampled with the others (Bonett and Price 2012, "Adjusted Wald confidence interval for
a difference of binomial proportions based on paired data"): without them, scores that are all equal
would leave no doubt at all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import binomtest, norm, t

from services.evaluation.comparison import Question
from services.evaluation.outcome import Estimate, PairDifference

Floats = NDArray[np.float64]

DRAWS = 10_000
LEVEL = 0.95
POWER = 0.8
RIGHT = 0.5  # the least score of a right answer
RELIABLE_CLUSTERS = 40
# More clusters than this are put together at random, which bounds the work and leaves the interval
# right.
MOST_GROUPS = 1000
DRAWS_AT_ONCE = 1000
# Where fewer clusters than this show any difference, the interval is at least as wide as if none
# did: so few say little about how much others differ.
TELLING_CLUSTERS = 5
MOST_NEEDED = 100_000
SIDE = float(norm.ppf(0.5 + LEVEL / 2))
ONE_SIDE = float(norm.ppf(LEVEL))
TO_POWER = float(norm.ppf(POWER))
# Half the width where nothing differs, times the number of clusters: two invented ones alone.
NONE_DIFFERS = SIDE * math.sqrt(2)


def clusters_of(questions: Sequence[Question]) -> NDArray[np.intp]:
    """Return the cluster of each question, counted from 0: questions that share a relevant
    document, also by way of other questions, are together, and others alone. Shape (n,)."""
    numbers: dict[str, int] = {}
    rows: list[int] = []
    documents: list[int] = []
    for row, question in enumerate(questions):
        for document in question.relevant:
            rows.append(row)
            documents.append(len(questions) + numbers.setdefault(document, len(numbers)))
    size = len(questions) + len(numbers)
    graph = coo_array((np.ones(len(rows), np.int8), (rows, documents)), shape=(size, size))
    _, labels = connected_components(graph, directed=False)
    _, clusters = np.unique(labels[: len(questions)], return_inverse=True)
    return clusters.astype(np.intp)


def estimate(scores: Floats, clusters: NDArray[np.intp], seed: int = 0) -> Estimate | None:
    """Return the mean of `scores` and its 95 % interval; None if there are none.

    `scores` and `clusters` have shape (n,), scores lie from 0 to 1, or from -1 to 1 if they are
    differences; NaN are left out.
    """
    known = ~np.isnan(scores)
    if not known.any():
        return None
    values = scores[known]
    lowest = -1.0 if values.min() < 0 else 0.0
    one = values[:, None]
    sample = _resample(one, np.ones_like(one), clusters[known], lowest, seed)
    return sample.estimate(0)


def differences(
    ids: Sequence[str],
    strict: Floats,
    format_blind: Floats,
    decides: Floats,
    clusters: NDArray[np.intp],
    margin: float,
    seed: int = 0,
) -> tuple[PairDifference, ...]:
    """Return how each pair of candidates differs on the questions that both answered; a pair
    without such questions is left out.

    The scores have shape (candidates, n), NaN where one failed, `clusters` has shape (n,). Answers
    are right from a score in `decides` of 0.5 on. Not being inferior by `margin`, which is asked of
    one side alone (level 95 %), and the questions that are needed are about `decides` too.
    """
    known = ~(np.isnan(strict) | np.isnan(format_blind) | np.isnan(decides))
    pairs = [pair for pair in combinations(range(len(ids)), 2) if (known[list(pair)].all(0)).any()]
    if not pairs:
        return ()
    first, second = np.array(pairs).T
    both = (known[first] & known[second]).T  # (n, pairs)
    known_scores: list[tuple[Floats, _Sample]] = []

    def sample(scores: Floats) -> _Sample:
        # The score that decides is one of the two others: it is not resampled again.
        for same, done in known_scores:
            if np.array_equal(scores, same, equal_nan=True):
                return done
        values = np.where(both, np.nan_to_num(scores[first] - scores[second]).T, 0.0)
        known_scores.append((scores, _resample(values, both * 1.0, clusters, -1.0, seed)))
        return known_scores[-1][1]

    of_strict, of_format_blind, deciding = sample(strict), sample(format_blind), sample(decides)
    right = np.nan_to_num(decides) >= RIGHT
    only_first = (right[first].T & ~right[second].T & both).sum(0)
    only_second = (right[second].T & ~right[first].T & both).sum(0)
    p_values = [_mcnemar(int(a), int(b)) for a, b in zip(only_first, only_second, strict=True)]
    adjusted = _holm(p_values)
    found = []
    for column, (one, other) in enumerate(pairs):
        needed = deciding.needed(column, margin, len(pairs), bool(adjusted[column] < 1 - LEVEL))
        found.append(
            PairDifference(
                first=ids[one],
                second=ids[other],
                questions=int(both[:, column].sum()),
                strict=of_strict.estimate(column),
                format_blind=of_format_blind.estimate(column),
                only_first=int(only_first[column]),
                only_second=int(only_second[column]),
                p_value=p_values[column],
                adjusted_p_value=float(adjusted[column]),
                first_not_inferior=bool(deciding.at_least[column] > -margin),
                second_not_inferior=bool(deciding.at_most[column] < margin),
                detectable=deciding.detectable(column),
                questions_needed=needed,
                intervals_reliable=int(deciding.clusters[column]) >= RELIABLE_CLUSTERS,
            )
        )
    return tuple(found)


def _holm(p_values: Sequence[float]) -> Floats:
    """Return the p-values after Holm's correction (1979). statsmodels has it too, but collects
    garbage on each call, which takes longer than everything else here."""
    order = np.argsort(p_values)
    left = len(p_values) - np.arange(len(p_values))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(np.array(p_values)[order] * left), 1.0)
    return adjusted


def _mcnemar(only_first: int, only_second: int) -> float:
    """Return the p-value of the exact test of McNemar: binomial, on the answers that differ."""
    different = only_first + only_second
    return float(binomtest(only_first, different).pvalue) if different else 1.0


@dataclass(frozen=True)
class _Sample:
    """Means of some columns of values, resampled. All of shape (columns,); `questions` are those
    with a value, `variance` is that of one question, as far as clusters make it larger, `least` is
    half of the least width of the interval. `at_least` and `at_most` each hold with 95 %."""

    means: Floats
    lows: Floats
    highs: Floats
    at_least: Floats
    at_most: Floats
    questions: Floats
    clusters: Floats
    variance: Floats
    least: Floats

    def estimate(self, column: int) -> Estimate:
        return Estimate(
            float(self.means[column]), float(self.lows[column]), float(self.highs[column])
        )

    def detectable(self, column: int) -> float:
        """Return the smallest difference that shows with 80 % power; at most 1."""
        error = max(
            math.sqrt(self.variance[column] / self.questions[column]), self.least[column] / SIDE
        )
        return float(min((SIDE + TO_POWER) * error, 1.0))

    def needed(self, column: int, margin: float, pairs: int, significant: bool) -> int:
        """Return how many more questions would, with 80 % power, either show a difference, also
        after Holm's correction over `pairs`, or that the lower one is not inferior by `margin`."""
        mean = abs(float(self.means[column]))
        if (significant and (self.lows[column] > 0 or self.highs[column] < 0)) or (
            self.at_least[column] > -margin
            if self.means[column] < 0
            else self.at_most[column] < margin
        ):
            return 0
        questions = float(self.questions[column])
        deviation = math.sqrt(self.variance[column])
        # What the two invented questions ask for where hardly anything differs.
        per_cluster = questions / self.clusters[column]
        doubt = 1.1 * self.least[column] * (self.clusters[column] + 2) * per_cluster
        side = float(norm.ppf(1 - (1 - LEVEL) / 2 / pairs))
        enough = float(MOST_NEEDED) + questions
        if mean > 0:
            enough = min(enough, max(((side + TO_POWER) * deviation / mean) ** 2, doubt / mean))
        if margin > mean:
            room = margin - mean
            enough = min(enough, max(((ONE_SIDE + TO_POWER) * deviation / room) ** 2, doubt / room))
        return max(math.ceil(enough - questions), 1)


def _resample(
    values: Floats, counts: Floats, clusters: NDArray[np.intp], lowest: float, seed: int
) -> _Sample:
    """Resample the means of the columns of `values`, from `lowest` to 1, of shape (n, columns).
    `counts` is 1 where there is a value and 0 where there is none; then the value must be 0."""
    sums = _by_cluster(values, clusters)
    sizes = _by_cluster(counts, clusters)
    means = values.sum(0) / counts.sum(0)
    known = (sizes > 0).sum(0).astype(np.float64)
    off = values != (0.0 if lowest < 0 else means)
    telling = (_by_cluster(off * counts, clusters) > 0).sum(0)
    least = np.where(telling < TELLING_CLUSTERS, NONE_DIFFERS * (1 - lowest) / 2 / (known + 2), 0.0)
    grouped_sums, grouped_sizes = sums, sizes
    if len(sums) > MOST_GROUPS:
        groups = np.random.default_rng(abs(seed)).permutation(len(sums)) % MOST_GROUPS
        grouped_sums, grouped_sizes = _by_cluster(sums, groups), _by_cluster(sizes, groups)
    ends = np.array([[lowest], [1.0]]) * np.ones(values.shape[1])
    grouped_sums = np.concatenate([grouped_sums, ends])
    grouped_sizes = np.concatenate([grouped_sizes, np.ones_like(ends)])
    lows, at_least, at_most, highs = _percentiles(grouped_sums, grouped_sizes, seed)
    # Clusters of unequal size count as fewer of equal size (Kish).
    effective = np.maximum(counts.sum(0) ** 2 / (sizes**2).sum(0), 2.0)
    centre = grouped_sums.sum(0) / grouped_sizes.sum(0)

    def widened(low: Floats, high: Floats, share: float, side: float) -> tuple[Floats, Floats]:
        wider = t.ppf(share, effective - 1) / side * np.sqrt(effective / (effective - 1))
        half = least * side / SIDE
        low = np.minimum(np.minimum(centre + (low - centre) * wider, means - half), means)
        high = np.maximum(np.maximum(centre + (high - centre) * wider, means + half), means)
        one_cluster = known < 2  # says nothing about others
        low = np.where(one_cluster, lowest, np.clip(low, lowest, 1.0))
        return low, np.where(one_cluster, 1.0, np.clip(high, lowest, 1.0))

    lows, highs = widened(lows, highs, 0.5 + LEVEL / 2, SIDE)
    at_least, at_most = widened(at_least, at_most, LEVEL, ONE_SIDE)
    errors = sums - sizes * means
    variance = (errors**2).sum(0) / counts.sum(0) * known / np.maximum(known - 1, 1)
    return _Sample(means, lows, highs, at_least, at_most, counts.sum(0), known, variance, least)


def _by_cluster(values: Floats, clusters: NDArray[np.intp]) -> Floats:
    """Return the sums of the rows of each cluster, shape (clusters, columns)."""
    names, numbers = np.unique(clusters, return_inverse=True)
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, numbers, values)
    return sums


def _percentiles(sums: Floats, sizes: Floats, seed: int) -> tuple[Floats, ...]:
    """Return what 2.5, 5, 95 and 97.5 % of the means over resampled rows are below, each of shape
    (columns,)."""
    drawn = _draws(len(sums), seed)
    means = np.empty((DRAWS, sums.shape[1]), np.float32)
    both = np.concatenate([sums, sizes], axis=1).astype(np.float32)
    for start in range(0, DRAWS, DRAWS_AT_ONCE):
        rows = slice(start, start + DRAWS_AT_ONCE)
        summed, counted = np.split(drawn[rows].astype(np.float32) @ both, 2, axis=1)
        means[rows] = summed / np.maximum(counted, 1.0)
    ordered = np.ascontiguousarray(means.T)
    shares = [0.5 - LEVEL / 2, 1 - LEVEL, LEVEL, 0.5 + LEVEL / 2]
    return tuple(np.quantile(ordered, shares, axis=1))


@lru_cache(maxsize=8)
def _draws(groups: int, seed: int) -> NDArray[np.uint8]:
    """Return how often each group is drawn, shape (draws, groups); 10 MB at most. All that is
    computed of one comparison has the same draws."""
    rng = np.random.default_rng(abs(seed))
    # uint8 holds any count that can come up: a count has a mean of 1 and is never above `groups`.
    return rng.multinomial(groups, np.full(groups, 1 / groups), size=DRAWS).astype(np.uint8)
