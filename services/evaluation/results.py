"""What was measured of every candidate, on all questions or on some of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from services.evaluation.comparison import Plan, Prices
from services.evaluation.measures import Floats, Measures, Rows, Scored
from services.evaluation.outcome import (
    CandidateResult,
    Estimate,
    RecallAt,
    RetrievalQuality,
    Scores,
    Staleness,
)
from services.evaluation.part import Part
from services.evaluation.search_quality import DEPTHS
from services.evaluation.staleness import Changed
from services.evaluation.statistics import differences, estimate
from services.questions.overlap import MOST_NAMED, Overlap


@dataclass(frozen=True)
class Material:
    """All that results are computed from. Arrays have one value, or row, a question; `oracles` and
    `changed` are by the candidate that was asked, `found` and `indexing_seconds` by corpus, the
    others by adapter."""

    plan: Plan
    prices: Prices
    lines: NDArray[np.intp]
    clusters: NDArray[np.intp]
    candidates: Sequence[Measures]
    oracles: Mapping[str, Scored]
    found: Mapping[str, Floats]
    overlaps: Mapping[str, Mapping[int, str]]
    changed: Mapping[str, Changed]
    changed_at: float
    training_seconds: Mapping[str, float]
    indexing_seconds: Mapping[str, float]

    def part(self, rows: Rows) -> Part:
        """Return the results of these questions, and how the candidates differ on them."""
        return _Some(self, rows).part()

    def compares(self, measures: Measures, rows: Rows) -> bool:
        """Return whether a candidate is compared on these questions: one that failed on too many of
        all is not compared on any."""
        return not (
            measures.not_compared(rows) or measures.not_compared(np.arange(len(self.lines)))
        )


class _Some:
    """Some of the questions. What candidates share, such as a search, is estimated once."""

    def __init__(self, material: Material, rows: Rows) -> None:
        self._of = material
        self._rows = rows
        self._oracles: dict[str, Scores | None] = {}
        self._found: dict[str, RetrievalQuality | None] = {}
        self._asked_as = material.plan.oracles()

    def part(self) -> Part:
        rows, plan = self._rows, self._of.plan
        compared = [one for one in self._of.candidates if self._of.compares(one, rows)]
        clusters = self._of.clusters[rows]
        pairs = (
            differences(
                [one.candidate.id for one in compared],
                np.array([one.scored.strict[rows] for one in compared]),
                np.array([one.scored.format_blind[rows] for one in compared]),
                np.array([one.scored.decides(plan)[rows] for one in compared]),
                clusters,
                plan.margin,
                plan.seed,
            )
            if len(compared) > 1
            else ()
        )
        results = tuple(self._result(measures) for measures in self._of.candidates)
        return Part(results, pairs, len(rows), len(np.unique(clusters)))

    def scores(self, scored: Scored, rows: Rows) -> Scores:
        return Scores(
            answers=int(scored.answered[rows].sum()),
            strict=self._estimate(scored.strict[rows], rows),
            format_blind=self._estimate(scored.format_blind[rows], rows),
            judge=self._estimate(scored.judge[rows], rows),
        )

    def _result(self, measures: Measures) -> CandidateResult:
        rows, candidate = self._rows, measures.candidate
        concurrency = self._of.plan.concurrency
        errors = measures.errors_by_reason(rows)
        if not self._of.compares(measures, rows):
            return CandidateResult(candidate.id, Scores(0), failed=True, errors=errors)
        answered = rows[measures.scored.answered[rows]]
        result = CandidateResult(
            candidate=candidate.id,
            scores=self.scores(measures.scored, rows),
            errors=errors,
            degraded=int(measures.degraded[rows].sum()),
            no_evidence=int(measures.no_evidence[rows].sum()),
            oracle=self._oracle(candidate.id),
            input_tokens=float(measures.input_tokens[answered].mean()),
            output_tokens=float(measures.output_tokens[answered].mean()),
            warm=measures.latency(answered[~measures.cold[answered]], concurrency),
            cold=measures.latency(answered[measures.cold[answered]], concurrency),
            failures=measures.failures(rows),
        )
        if candidate.searches:
            result = replace(
                result,
                retrieval=self._retrieval(candidate.corpus or self._of.plan.corpus),
                supported=self._supported(measures),
                indexing_seconds=self._of.indexing_seconds.get(
                    candidate.corpus or self._of.plan.corpus
                ),
            )
        if candidate.adapter:
            result = self._with_adapter(result, measures)
        return replace(self._with_costs(result, measures), staleness=self._stale(measures, result))

    def _with_adapter(self, result: CandidateResult, measures: Measures) -> CandidateResult:
        adapter, lines = measures.candidate.adapter, self._of.lines[self._rows]
        result = replace(result, training_seconds=self._of.training_seconds.get(adapter))
        if adapter not in self._of.overlaps:
            return result
        shared = self._of.overlaps[adapter]
        how = [shared.get(int(line), "") for line in lines]
        overlapping = np.array([bool(kind) for kind in how], np.bool_)
        overlap = Overlap(
            questions=len(lines),
            exact=how.count("exact"),
            near=how.count("near"),
            shared_document=how.count("shared_document"),
            lines=tuple(sorted(lines[overlapping].tolist())[:MOST_NAMED]),
        )
        without = None
        if overlapping.any():
            without = self.scores(measures.scored, self._rows[~overlapping])
        return replace(result, overlap=overlap, without_overlap=without)

    def _with_costs(self, result: CandidateResult, measures: Measures) -> CandidateResult:
        """Add what answers cost: failed ones cost too, and that falls on those that came."""
        prices, answers = self._of.prices, result.scores.answers
        training = (result.training_seconds or 0.0) * prices.training_second
        total = float(measures.busy[self._rows].sum()) * prices.answering_second
        total += answers * training / max(1, prices.answers_per_training)
        right = measures.right(self._of.plan, self._rows)
        return replace(
            result,
            cost_per_thousand=1000 * total / answers,
            cost_per_correct=total / right if right else None,
        )

    def _oracle(self, candidate: str) -> Scores | None:
        asked = self._asked_as.get(candidate, "")
        if asked not in self._oracles:
            scored = self._of.oracles.get(asked)
            known = scored is not None and bool(scored.answered[self._rows].any())
            self._oracles[asked] = self.scores(scored, self._rows) if scored and known else None
        return self._oracles[asked]

    def _retrieval(self, corpus: str) -> RetrievalQuality | None:
        if corpus not in self._found:
            self._found[corpus] = self._search(self._of.found.get(corpus))
        return self._found[corpus]

    def _search(self, found: Floats | None) -> RetrievalQuality | None:
        if found is None:
            return None
        values = found[self._rows]
        if np.isnan(values).all():  # of no question of these the relevant documents are known
            return None
        means = [self._estimate(column, self._rows) for column in values.T]
        ndcg, *recall = (mean for mean in means if mean is not None)
        return RetrievalQuality(
            questions=int((~np.isnan(values[:, 0])).sum()),
            ndcg_10=ndcg,
            recall=tuple(RecallAt(k, mean) for k, mean in zip(DEPTHS, recall, strict=True)),
        )

    def _supported(self, measures: Measures) -> Estimate | None:
        """Return the share of sentences, each of which is one value of its question's cluster."""
        rows = self._rows[measures.scored.answered[self._rows]]
        counts = np.stack((measures.supported[rows], measures.unsupported[rows]), axis=1)
        sentences = np.tile([1.0, 0.0], len(rows)).repeat(counts.ravel())
        return self._estimate(sentences, rows.repeat(counts.sum(axis=1)))

    def _stale(self, measures: Measures, result: CandidateResult) -> Staleness | None:
        candidate = measures.candidate
        changed = self._of.changed.get(candidate.id)
        if changed is None or not len(asked := changed.asked(self._rows)):
            return None
        means = [self._estimate(share, asked) for share in changed.shares(self._rows)]
        new, old, neither = (mean for mean in means if mean is not None)
        training, price = result.training_seconds, self._of.prices.training_second
        return Staleness(
            questions=len(asked),
            new_share=new,
            old_share=old,
            neither_share=neither,
            seconds_to_follow=(
                changed.follows(self._rows, self._of.changed_at) if candidate.searches else None
            ),
            retraining_seconds=training,
            retraining_cost=None if training is None else training * price,
        )

    def _estimate(self, values: Floats, rows: Rows) -> Estimate | None:
        if not len(values) or np.isnan(values).all():
            return None
        return estimate(values, self._of.clusters[rows], self._of.plan.seed)
