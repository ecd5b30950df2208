"""What a comparison is, as plain values; names, units and ranges are those of evaluation.proto."""

from dataclasses import dataclass
from typing import Literal

PathName = Literal["base", "rag", "tuned", "hybrid"]
ScorerName = Literal["exact_match", "token_f1", "contains", "label", "json", "regex", "numeric"]
State = Literal["queued", "running", "finished", "failed", "cancelled"]
Phase = Literal["answers", "oracle", "staleness", "analysis"]
# Files in the folder of a comparison.
QUESTIONS = "questions.jsonl"
CHANGED = "changed"  # folder: N.document is a PutDocumentsDocument, N.content what follows it
ANSWERS = "answers.jsonl"  # a ComparisonAnswer as protobuf JSON a line
OUTCOME = "outcome.json"
REPORT = "report"  # .html, .md, .json
ENDED: frozenset[State] = frozenset(("finished", "failed", "cancelled"))


class ComparisonFailed(Exception):
    """The comparison ends without a verdict."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True)
class Scoring:
    """How to score, with nothing left open."""

    strict: ScorerName = "exact_match"
    format_blind: ScorerName = "contains"
    numeric_tolerance: float = 0.0
    judge: bool = False
    strict_decides: bool = False


@dataclass(frozen=True)
class Candidate:
    """One way of answering. `adapter` is NAME@HASH or empty; `corpus` is where it searches, empty
    unless it does; `options` is an AnswerOptions as protobuf JSON."""

    id: str
    path: PathName
    adapter: str = ""
    corpus: str = ""
    options: str = "{}"

    @property
    def searches(self) -> bool:
        return self.path in ("rag", "hybrid")


@dataclass(frozen=True)
class Constraints:
    """What the verdict must honour; None means any."""

    max_cost_per_correct: float | None = None
    max_p95_ms: float | None = None
    min_quality: float | None = None


@dataclass(frozen=True)
class Prices:
    """The operator's prices."""

    currency: str = "EUR"
    answering_second: float = 0.00003
    training_second: float = 0.00003
    answers_per_training: int = 100_000


@dataclass(frozen=True)
class Plan:
    """What a comparison was asked to do. `examples` are pairs of question and answer, those that
    few-shot BASE is shown; `unscored` are the lines of questions that are among them."""

    candidates: tuple[Candidate, ...]
    corpus: str = ""
    adapters: tuple[str, ...] = ()
    examples: tuple[tuple[str, str], ...] = ()
    unscored: tuple[int, ...] = ()
    scoring: Scoring = Scoring()
    constraints: Constraints = Constraints()
    concurrency: int = 4
    margin: float = 0.05
    seed: int = 0

    def oracles(self) -> dict[str, str]:
        """Return, by candidate, the candidate under whose id the answers with the relevant
        documents are kept: one for each adapter and one for none, rather one that searches. Empty
        if there is no corpus."""
        if not (self.corpus or any(candidate.corpus for candidate in self.candidates)):
            return {}
        first: dict[str, str] = {}
        for candidate in sorted(self.candidates, key=lambda candidate: not candidate.searches):
            first.setdefault(candidate.adapter, candidate.id)
        return {candidate.id: first[candidate.adapter] for candidate in self.candidates}


@dataclass(frozen=True)
class CandidateProgress:
    """How far one candidate has come, of all phases."""

    candidate: str
    done: int = 0
    total: int = 0
    failed: int = 0
    seconds_left: float | None = None
    strict: float | None = None
    format_blind: float | None = None


@dataclass(frozen=True)
class Progress:
    """How far a comparison has come."""

    phase: Phase
    seconds_left: float | None = None
    candidates: tuple[CandidateProgress, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """A comparison without its answers and its outcome, which are files. Times are seconds since
    1970, 0 if they have not come."""

    id: str
    tenant: str
    state: State
    plan: Plan
    questions: int
    clusters: int
    questions_hash: str
    created: float
    author: str = ""
    changed_documents: int = 0
    corpus_version: str = ""
    model: str = ""
    judge: str = ""
    prices: Prices = Prices()
    progress: Progress | None = None
    reason: str = ""
    message: str = ""
    started: float = 0.0
    ended: float = 0.0


@dataclass(frozen=True)
class Question:
    """One line of the question set. `answers` are those that are right in the end,
    `stale_answers` those that are right until the documents change, if that differs."""

    line: int
    question: str
    answers: tuple[str, ...]
    relevant: tuple[str, ...] = ()
    type: str = ""
    stale_answers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Quote:
    """What a citation quotes: the span `start` to `end` of the answer, and the document's words."""

    start: int
    end: int
    document: str
    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What one candidate answered to one question, as far as it is analysed; the whole of it is a
    ComparisonAnswer, a line of answers.jsonl.

    `documents` are those of the passages that it was shown, best first. `quotes` has one entry for
    each sentence that a passage supports, `unsupported` counts the others. `error` is empty unless
    it failed; then there are no scores. `time` is when it was sent, in seconds since 1970.
    """

    sequence: int
    candidate: str
    phase: Phase
    line: int
    time: float
    total_ms: float
    text: str = ""
    documents: tuple[str, ...] = ()
    quotes: tuple[Quote, ...] = ()
    unsupported: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    first_text_ms: float | None = None
    degraded: tuple[str, ...] = ()
    no_evidence: bool = False
    strict: float | None = None
    format_blind: float | None = None
    judge: float | None = None
    error: str = ""
