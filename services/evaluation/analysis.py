"""What comes of the answers: results, differences and the verdict."""

import gc
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from services.evaluation.comparison import Answer, Phase, Plan, Prices, Question
from services.evaluation.failures import kinds
from services.evaluation.measures import Bools, Rows, measures, scored
from services.evaluation.outcome import (
    CandidateResult,
    FailureKind,
    Outcome,
    TypeScores,
    Verdict,
)
from services.evaluation.results import Material
from services.evaluation.router import MOST_TYPES, train
from services.evaluation.search_quality import search_quality
from services.evaluation.staleness import changed
from services.evaluation.statistics import clusters_of
from services.evaluation.verdict import Part, decide, each_its_own

TRAINED_ON = ("exact", "near")  # a shared document alone gives no answer away


@dataclass(frozen=True)
class Measured:
    """All that a comparison measured.

    `found` has what a search alone found: by corpus and line up to 10 documents, best first.
    `overlaps` has, by adapter and line, what a question shares with the training examples: exact,
    near or shared_document; an adapter whose examples are unknown is not in it.
    `training_seconds` is by adapter, `indexing_seconds` by corpus. `changed_at` is when the changed
    documents were sent, in seconds since 1970; 0 if there are none. `embeddings` are those of the
    questions, one row each, of length 1; None if there are no types.
    """

    plan: Plan
    prices: Prices
    questions: Sequence[Question]  # those that are scored
    answers: Sequence[Answer]
    found: Mapping[str, Mapping[int, tuple[str, ...]]]
    overlaps: Mapping[str, Mapping[int, str]]
    training_seconds: Mapping[str, float]
    indexing_seconds: Mapping[str, float]
    changed_at: float
    embeddings: NDArray[np.float32] | None
    embedder_hash: str


def analyse(measured: Measured) -> Outcome:
    """Return what comes of a comparison. Blocks, for seconds with 10,000 questions."""
    # The matrices are so small that threads of the linear algebra only wait for each other: one
    # alone is ten times as fast. And statsmodels collects garbage at each correction of p-values,
    # of every type of question; the answers are none.
    with threadpool_limits(1):
        gc.freeze()
        try:
            return _analysed(measured)
        finally:
            gc.unfreeze()


def _analysed(measured: Measured) -> Outcome:
    answers = _ByRow(measured)
    known = [answer for rows in answers.all() for answer in rows.values()]
    failure_of = kinds(measured.plan, measured.questions, known)
    material = _material(measured, answers, failure_of)
    every = np.arange(len(measured.questions))
    whole = material.part(every)
    rows_of = _types(measured.questions)
    types = {type: material.part(rows) for type, rows in rows_of.items()}
    whole = replace(whole, results=tuple(_with_types(result, types) for result in whole.results))
    deciding = Deciding.of(measured, material, answers)
    if len(deciding.rows) < len(every) or deciding.changed.any():
        part = deciding.part(every)
        types = {type: deciding.part(rows) for type, rows in rows_of.items()}
    else:
        part = whole
    # With one type there is nothing to tell apart.
    verdict = decide(measured.plan, part, types if len(types) > 1 else {}, whole)
    return Outcome(
        results=whole.results,
        differences=whole.differences,
        verdict=_routed(measured, deciding, part, verdict),
        failure_of=failure_of,
    )


@dataclass(frozen=True)
class Deciding:
    """The answers that a verdict is decided on.

    Where documents changed, those after the change count: that is how the world is now. Questions
    that an adapter was trained on do not count, since they say nothing of questions to come; but
    they do if their answer has changed since.
    """

    material: Material
    rows: Rows
    changed: Bools

    @classmethod
    def of(cls, measured: Measured, material: Material, answers: "_ByRow") -> Self:
        size = len(measured.questions)
        after = {one.id: answers.of(one.id, "staleness") for one in measured.plan.candidates}
        changed = np.zeros(size, np.bool_)
        changed[[row for asked in after.values() for row in asked]] = True
        trained = {
            line
            for one in material.candidates
            if not one.not_compared(np.arange(size))
            for line, how in measured.overlaps.get(one.candidate.adapter, {}).items()
            if how in TRAINED_ON
        }
        fair = changed | ~np.isin(material.lines, list(trained))
        candidates = [
            replace(one, scored=one.scored.replaced(changed, scored(after[one.candidate.id], size)))
            for one in material.candidates
        ]
        return cls(replace(material, candidates=candidates), np.flatnonzero(fair), changed)

    def part(self, rows: Rows) -> Part:
        """Return what these of the questions say, as far as they count."""
        fair = rows[np.isin(rows, self.rows)]
        part = self.material.part(fair) if len(fair) else Part((), (), 0, 0)
        return replace(part, trained=len(rows) - len(fair), changed=int(self.changed[fair].sum()))


class _ByRow:
    """The answers of each candidate and phase, by row of the questions. If one question was asked
    twice, as after a restart, the later answer counts."""

    def __init__(self, measured: Measured) -> None:
        rows = {question.line: row for row, question in enumerate(measured.questions)}
        known = {candidate.id for candidate in measured.plan.candidates}
        self._answers: dict[tuple[str, Phase], dict[int, Answer]] = defaultdict(dict)
        for answer in sorted(measured.answers, key=lambda answer: answer.sequence):
            if answer.candidate in known and (row := rows.get(answer.line)) is not None:
                self._answers[answer.candidate, answer.phase][row] = answer

    def of(self, candidate: str, phase: Phase) -> Mapping[int, Answer]:
        return self._answers.get((candidate, phase), {})

    def all(self) -> Sequence[Mapping[int, Answer]]:
        return list(self._answers.values())


def _material(
    measured: Measured, answers: _ByRow, failure_of: Mapping[int, FailureKind]
) -> Material:
    plan, questions = measured.plan, measured.questions
    size = len(questions)
    qualities = {
        corpus: search_quality(questions, found) for corpus, found in measured.found.items()
    }
    return Material(
        plan=plan,
        prices=measured.prices,
        lines=np.array([question.line for question in questions], np.intp),
        clusters=clusters_of(questions),
        candidates=[
            measures(one, answers.of(one.id, "answers"), failure_of, size, plan.concurrency)
            for one in plan.candidates
        ],
        oracles={
            asked: scored(answers.of(asked, "oracle"), size)
            for asked in set(plan.oracles().values())
        },
        found={corpus: found for corpus, found in qualities.items() if found is not None},
        overlaps=measured.overlaps,
        changed={
            one.id: changed(questions, answers.of(one.id, "staleness"), plan.scoring)
            for one in plan.candidates
        },
        changed_at=measured.changed_at,
        training_seconds=measured.training_seconds,
        indexing_seconds=measured.indexing_seconds,
    )


def _types(questions: Sequence[Question]) -> dict[str, NDArray[np.intp]]:
    """Return the rows of each type, the types in the order of the questions; of many types the 100
    most frequent, as a policy takes no more and each takes its time."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, question in enumerate(questions):
        if question.type:
            rows[question.type].append(row)
    frequent = set(sorted(rows, key=lambda type: -len(rows[type]))[:MOST_TYPES])
    return {type: np.array(rows[type], np.intp) for type in rows if type in frequent}


def _with_types(result: CandidateResult, types: Mapping[str, Part]) -> CandidateResult:
    if result.failed:
        return result
    scores = tuple(
        TypeScores(type, of_type.scores)
        for type, part in types.items()
        for of_type in part.results
        if of_type.candidate == result.candidate
    )
    return replace(result, types=scores)


def _routed(measured: Measured, deciding: Deciding, part: Part, verdict: Verdict) -> Verdict:
    """Add a router to a verdict that differs by type: its regret, and itself if it is worth it."""
    compared = {result.candidate for result in part.results if not result.failed}
    if not verdict.types or measured.embeddings is None or not compared:
        return verdict
    rows = deciding.rows
    scores = {
        one.candidate.id: one.scored.decides(measured.plan)[rows]
        for one in deciding.material.candidates
        if one.candidate.id in compared
    }
    best = max(scores, key=lambda candidate: float(np.nanmean(scores[candidate])))
    single = verdict.candidate or best
    trained = train(
        types=[measured.questions[row].type for row in rows],
        embeddings=measured.embeddings[rows],
        embedder_hash=measured.embedder_hash,
        wanted={type.type: type.candidate for type in verdict.types},
        single=single,
        scores=scores,
        clusters=deciding.material.clusters[rows],
        seed=measured.plan.seed,
    )
    if trained is None:
        return verdict
    router, regret = trained
    verdict = replace(verdict, router_regret=regret)
    if regret.high >= 0:
        return verdict
    verdict = replace(verdict, router=router)
    return verdict if verdict.candidate else each_its_own(measured.plan, part, verdict, single)
