"""What a job and an adapter are, as plain values."""

from dataclasses import dataclass, field
from typing import Literal

from services.prompts.words import Message
from services.questions.overlap import Overlap
from services.runtime.disk import File

Context = Literal["none", "retrieved", "mixed", "unknown"]  # unknown: of an imported adapter
State = Literal[
    "queued",
    "preparing",
    "training",
    "verifying",
    "ready",
    "unfaithful",
    "unmeasured",
    "failed",
    "cancelled",
]
AdapterState = Literal["verifying", "ready", "unfaithful", "unmeasured"]
ENDED: frozenset[State] = frozenset(("ready", "unfaithful", "unmeasured", "failed", "cancelled"))


@dataclass(frozen=True)
class Options:
    """How to train, with nothing left open; units and ranges are those of TrainingOptions.

    `held_out_share` None means a tenth, but at least 16 where that is at most a fifth.
    """

    context: Context = "none"
    rank: int = 16
    alpha: float = 32.0
    epochs: int = 3
    learning_rate: float = 1e-3
    targets: tuple[str, ...] = ()
    seed: int = 0
    quantized: bool = False
    held_out_share: float | None = None


@dataclass(frozen=True)
class DataReport:
    """What the examples are like, as in the message of this name."""

    lines: int
    examples: int
    held_out: int
    tokens: int
    answer_tokens: int
    answer_tokens_min: int
    answer_tokens_p50: int
    answer_tokens_p95: int
    answer_tokens_max: int
    duplicates: int
    too_long: int
    secret_like: int
    hash: str
    overlap: Overlap | None = None


@dataclass(frozen=True)
class Progress:
    """How far training has come, as in JobProgress: losses in nats per answer token."""

    step: int
    steps: int
    loss: float | None = None
    held_out_loss: float | None = None
    tokens_per_second: float = 0.0
    seconds_left: float | None = None


@dataclass(frozen=True)
class Job:
    """The making of one adapter. Times are seconds since 1970, 0 for what has not happened."""

    id: str
    tenant: str
    name: str
    state: State
    base_model: str
    base_model_hash: str
    corpus: str
    options: Options
    prompt_version: str
    data: DataReport
    progress: Progress | None = None
    restarts: int = 0
    adapter: str = ""
    reason: str = ""
    message: str = ""
    log_tail: str = ""
    created: float = 0.0
    started: float = 0.0
    ended: float = 0.0


@dataclass(frozen=True)
class Manifest:
    """What an adapter is, for ever. Its hash is the adapter's; `options` None if unknown."""

    name: str
    base_model: str
    base_model_hash: str
    prompt_version: str
    corpus: str
    examples_hash: str
    options: Options
    files: tuple[File, ...]


@dataclass(frozen=True)
class TokenScore:
    """A token's id and the natural logarithm of its probability."""

    id: int
    log_probability: float


@dataclass(frozen=True)
class Probe:
    """An answer to measure an adapter by, and what the trainer gave its tokens.

    `prompt_hash` is that of ScoreResponse for the prompt as the trainer saw it, empty if unknown.
    """

    messages: tuple[Message, ...]
    continuation: str
    tokens: tuple[TokenScore, ...] = ()
    prompt_hash: str = ""


@dataclass(frozen=True)
class Fidelity:
    """How generation's log-probabilities compare, as in the message of this name."""

    probes: int
    tokens: int
    trainer_difference: float
    trainer_difference_max: float
    bound: float
    base_difference: float


@dataclass(frozen=True)
class Speed:
    """Tokens per second of all streams together, with the adapter and without."""

    streams: int
    adapter_tokens_per_second: float
    base_tokens_per_second: float


@dataclass(frozen=True)
class Adapter:
    """An adapter and what was measured or decided since it was made."""

    id: str
    tenant: str
    hash: str
    manifest: Manifest
    state: AdapterState
    reason: str = ""
    job: str = ""
    held_out_loss: float | None = None
    training_seconds: float | None = None
    fidelity: Fidelity | None = None
    speeds: tuple[Speed, ...] = field(default=())
    accepted_by: str = ""
    accepted: float = 0.0
    created: float = 0.0

    @property
    def served(self) -> bool:
        return self.state in ("ready", "unmeasured") or bool(self.accepted_by)
