"""Comparisons as plain values: what is compared, what was measured, and the verdict."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from tworoads.v1 import answer_pb2
from tworoads.v1 import evaluation_pb2 as pb

from clients.events import Citation, Finished, Started, Unsupported, event_of
from clients.jobs import CheckProgress, Finding
from clients.messages import plain, same, time
from clients.policies import Router
from clients.results import CandidateResult, Estimate, PairDifference

ComparisonPath = Literal["base", "rag", "tuned", "hybrid"]
Phase = Literal["answers", "oracle", "staleness", "analysis"]
ReportFormat = Literal["html", "markdown", "json"]

ENDED = frozenset(("finished", "failed", "cancelled"))


@dataclass(frozen=True)
class Turn:
    """A question and its answer, as few-shot BASE is shown it."""

    question: str
    answer: str


@dataclass(frozen=True)
class Candidate:
    """One way of answering. `options` are fields of AnswerOptions, as protobuf's JSON has them."""

    id: str
    path: str
    adapter: str = ""
    corpus: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scoring:
    """How answers are scored; empty is chosen from the data."""

    strict: str = ""
    format_blind: str = ""
    numeric_tolerance: float = 0.0
    judge: bool = False
    strict_decides: bool | None = None


@dataclass(frozen=True)
class Constraints:
    """What the verdict must honour: cost in the currency of the prices, time in milliseconds, and
    the format-blind score from 0 to 1. None means any."""

    max_cost_per_correct: float | None = None
    max_p95_ms: float | None = None
    min_quality: float | None = None


@dataclass(frozen=True)
class Plan:
    """What a comparison was asked to do, with the values taken for what was left open."""

    corpus: str
    candidates: tuple[Candidate, ...]
    adapters: tuple[str, ...]
    examples: tuple[Turn, ...]
    scoring: Scoring
    constraints: Constraints
    concurrency: int
    margin: float | None
    seed: int | None
    shots: int | None


@dataclass(frozen=True)
class Prices:
    """The operator's prices, by which costs are computed."""

    currency: str
    answering_second: float
    training_second: float
    answers_per_training: int


@dataclass(frozen=True)
class CandidateProgress:
    """How far one candidate has come, and its mean scores so far, from 0 to 1."""

    candidate: str
    done: int
    total: int
    failed: int
    seconds_left: float | None
    strict: float | None
    format_blind: float | None


@dataclass(frozen=True)
class ComparisonProgress:
    """How far a comparison has come."""

    phase: str
    seconds_left: float | None
    candidates: tuple[CandidateProgress, ...]


@dataclass(frozen=True)
class Reason:
    """Why a verdict is what it is: a code, and one sentence with its numbers."""

    code: str
    message: str


@dataclass(frozen=True)
class TypeVerdict:
    """Which candidate to take for one type of question."""

    type: str
    path: str
    adapter: str
    candidate: str
    reasons: tuple[Reason, ...]


@dataclass(frozen=True)
class Verdict:
    """Which path to take. `path` and `candidate` are empty if there is none to take."""

    path: str
    adapter: str
    candidate: str
    reasons: tuple[Reason, ...]
    summary: str
    types: tuple[TypeVerdict, ...]
    would_change: tuple[str, ...]
    unknown: tuple[str, ...]
    questions_needed: int
    router: Router | None
    router_regret: Estimate | None


@dataclass(frozen=True)
class Comparison:
    """All candidates on one question set. `state` is "queued", "running" or one of ENDED; results,
    differences and verdict are there once it is "finished"."""

    id: str
    state: str
    start: Plan
    questions: int
    clusters: int
    questions_hash: str
    changed_documents: int
    corpus_version: str
    model: str
    judge: str
    prices: Prices
    progress: ComparisonProgress | None
    results: tuple[CandidateResult, ...]
    differences: tuple[PairDifference, ...]
    verdict: Verdict | None
    reason: str
    message: str
    author: str
    created: datetime | None
    started: datetime | None
    ended: datetime | None

    def candidate(self, id: str) -> Candidate | None:
        """Return a candidate."""
        found = (candidate for candidate in self.start.candidates if candidate.id == id)
        return next(found, None)


@dataclass(frozen=True)
class ComparisonEvent:
    """News of a comparison: as it stands after a change of its state, or how far it has come."""

    sequence: int
    time: datetime | None
    news: Comparison | ComparisonProgress


@dataclass(frozen=True)
class ComparisonAnswer:
    """What one candidate answered to one question. Times are milliseconds; scores are None if it
    failed, and `error` says why."""

    sequence: int
    candidate: str
    phase: str
    line: int
    question: str
    type: str
    right_answers: tuple[str, ...]
    text: str
    started: Started | None
    passages: tuple[str, ...]
    documents: tuple[str, ...]
    citations: tuple[Citation, ...]
    unsupported: tuple[Unsupported, ...]
    finished: Finished | None
    first_text_ms: float | None
    total_ms: float
    strict: float | None
    format_blind: float | None
    judge: float | None
    failure: str
    error: str
    time: datetime | None


def news_of_check(
    response: pb.CreateComparisonResponse,
) -> Finding | CheckProgress | Comparison | None:
    """Return the plain value of one response, None for an event of a newer server."""
    match response.WhichOneof("event"):
        case "finding":
            return plain(Finding, response.finding)
        case "progress":
            return same(CheckProgress, response.progress)
        case "comparison":
            return plain(Comparison, response.comparison)
    return None


def event_of_watch(response: pb.WatchComparisonResponse) -> ComparisonEvent | None:
    """Return the plain value of one response, None for a heartbeat."""
    news: Comparison | ComparisonProgress
    match response.WhichOneof("event"):
        case "comparison":
            news = plain(Comparison, response.comparison)
        case "progress":
            news = plain(ComparisonProgress, response.progress)
        case _:
            return None
    return ComparisonEvent(response.sequence, time(response, "time"), news)


def answer_of(answer: pb.ComparisonAnswer) -> ComparisonAnswer:
    """Return the plain value of a kept answer."""
    return plain(
        ComparisonAnswer,
        answer,
        started=_event(started=answer.started) if answer.HasField("started") else None,
        citations=tuple(_event(citation=citation) for citation in answer.citations),
        unsupported=tuple(_event(unsupported=span) for span in answer.unsupported),
        finished=_event(finished=answer.finished) if answer.HasField("finished") else None,
    )


def _event(**event: Any) -> Any:
    return event_of(answer_pb2.AnswerResponse(**event))
