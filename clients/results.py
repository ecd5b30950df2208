"""What a comparison has measured, as plain values."""

from dataclasses import dataclass

from clients.jobs import Overlap


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """The mean scores of a set of answers, from 0 to 1. Answers that failed are not among them."""

    answers: int
    strict: Estimate | None
    format_blind: Estimate | None
    judge: Estimate | None


@dataclass(frozen=True)
class TypeScores:
    """The scores of one type of question."""

    type: str
    scores: Scores


@dataclass(frozen=True)
class RecallAt:
    """The share of the relevant documents that are among the first `k`."""

    k: int
    recall: Estimate


@dataclass(frozen=True)
class RetrievalQuality:
    """How well a search found the relevant documents."""

    questions: int
    ndcg_10: Estimate
    recall: tuple[RecallAt, ...]


@dataclass(frozen=True)
class Latency:
    """How long answers take, in milliseconds."""

    answers: int
    concurrency: int
    first_text_p50_ms: float
    first_text_p95_ms: float
    total_p50_ms: float
    total_p95_ms: float


@dataclass(frozen=True)
class FailureShare:
    """The wrong answers of one kind; `examples` are some of them, by ComparisonAnswer.sequence."""

    kind: str
    answers: int
    examples: tuple[int, ...]


@dataclass(frozen=True)
class Staleness:
    """What became of the answers whose documents changed."""

    questions: int
    new_share: Estimate
    old_share: Estimate
    neither_share: Estimate
    seconds_to_follow: float | None
    retraining_seconds: float | None
    retraining_cost: float | None


@dataclass(frozen=True)
class CandidateResult:
    """What was measured of one candidate; None is what was not. Units are those of the API."""

    candidate: str
    failed: bool
    errors: dict[str, int]
    degraded: int
    no_evidence: int
    scores: Scores
    types: tuple[TypeScores, ...]
    oracle: Scores | None
    overlap: Overlap | None
    without_overlap: Scores | None
    retrieval: RetrievalQuality | None
    supported: Estimate | None
    input_tokens: float
    output_tokens: float
    warm: Latency | None
    cold: Latency | None
    cost_per_thousand: float
    cost_per_correct: float | None
    training_seconds: float | None
    indexing_seconds: float | None
    failures: tuple[FailureShare, ...]
    staleness: Staleness | None


@dataclass(frozen=True)
class PairDifference:
    """How two candidates differ on the questions that both answered: `first` less `second`."""

    first: str
    second: str
    questions: int
    strict: Estimate
    format_blind: Estimate
    only_first: int
    only_second: int
    p_value: float
    adjusted_p_value: float
    first_not_inferior: bool
    second_not_inferior: bool
    detectable: float
    questions_needed: int
    intervals_reliable: bool
