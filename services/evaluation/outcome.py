"""What came of a comparison, as plain values; names, units and ranges are those of
evaluation.proto."""

from dataclasses import dataclass, field
from typing import Literal

from services.evaluation.comparison import PathName
from services.questions.overlap import Overlap

FailureKind = Literal[
    "unspecified", "knowledge_gap", "retrieval_miss", "reading_failure", "behaviour_gap"
]
Code = Literal[
    "knowledge_gap",
    "behaviour_gap",
    "facts_change",
    "cost_cap",
    "latency_cap",
    "tie_cheaper",
    "not_enough_evidence",
    "constraints_impossible",
]


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """The scores of one set of answers, without those that failed."""

    answers: int
    strict: Estimate | None = None
    format_blind: Estimate | None = None
    judge: Estimate | None = None


@dataclass(frozen=True)
class TypeScores:
    """The scores of one type of question."""

    type: str
    scores: Scores


@dataclass(frozen=True)
class RecallAt:
    """Recall of the first `k` documents."""

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
    """The wrong answers of one kind, and some of them by Answer.sequence."""

    kind: FailureKind
    answers: int
    examples: tuple[int, ...]


@dataclass(frozen=True)
class Staleness:
    """What became of the answers whose documents changed."""

    questions: int
    new_share: Estimate
    old_share: Estimate
    neither_share: Estimate
    seconds_to_follow: float | None = None
    retraining_seconds: float | None = None
    retraining_cost: float | None = None


@dataclass(frozen=True)
class CandidateResult:
    """What was measured of one candidate."""

    candidate: str
    scores: Scores
    failed: bool = False
    errors: dict[str, int] = field(default_factory=dict)
    degraded: int = 0
    no_evidence: int = 0
    types: tuple[TypeScores, ...] = ()
    oracle: Scores | None = None
    overlap: Overlap | None = None
    without_overlap: Scores | None = None
    retrieval: RetrievalQuality | None = None
    supported: Estimate | None = None
    input_tokens: float = 0.0
    output_tokens: float = 0.0
    warm: Latency | None = None
    cold: Latency | None = None
    cost_per_thousand: float = 0.0
    cost_per_correct: float | None = None
    training_seconds: float | None = None
    indexing_seconds: float | None = None
    failures: tuple[FailureShare, ...] = ()
    staleness: Staleness | None = None


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


@dataclass(frozen=True)
class Reason:
    """Why a verdict is what it is, with its numbers in one sentence."""

    code: Code
    message: str


@dataclass(frozen=True)
class TypeVerdict:
    """The candidate for one type of question, where it differs."""

    type: str
    path: PathName
    adapter: str
    candidate: str
    reasons: tuple[Reason, ...]


@dataclass(frozen=True)
class RouterClass:
    """One class of a router: the greatest `weights` x embedding + `bias` wins."""

    type: str
    weights: tuple[float, ...]
    bias: float


@dataclass(frozen=True)
class Router:
    """A linear classifier of question embeddings."""

    embedder_hash: str
    classes: tuple[RouterClass, ...]


@dataclass(frozen=True)
class Verdict:
    """Which candidate to take; `candidate` is empty if there is none, and so is `path`."""

    path: PathName | Literal[""]
    adapter: str
    candidate: str
    reasons: tuple[Reason, ...]
    summary: str
    types: tuple[TypeVerdict, ...] = ()
    would_change: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    questions_needed: int = 0
    router: Router | None = None
    router_regret: Estimate | None = None


@dataclass(frozen=True)
class Outcome:
    """All of it. `failure_of` has the kind of each wrong answer by Answer.sequence."""

    results: tuple[CandidateResult, ...]
    differences: tuple[PairDifference, ...]
    verdict: Verdict
    failure_of: dict[int, FailureKind] = field(default_factory=dict)
