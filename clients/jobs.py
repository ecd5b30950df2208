"""Training jobs as plain values: their data, their progress, and what became of them."""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from tworoads.v1 import tuning_pb2 as pb

from clients.messages import enum_name, optional, same, time

Context = Literal["none", "retrieved", "mixed"]

ENDED = frozenset(("ready", "unfaithful", "unmeasured", "failed", "cancelled"))


@dataclass(frozen=True)
class Finding:
    """Something about a line of the "examples" or the "questions".

    `severity` is "error" (all is refused), "left_out" or "warning"; `other_line` is the earlier
    line that it repeats or contradicts, else 0.
    """

    file: str
    line: int
    severity: str
    reason: str
    message: str
    other_line: int


@dataclass(frozen=True)
class CheckProgress:
    """How far the check of an upload has come, in lines."""

    received: int
    checked: int


@dataclass(frozen=True)
class Options:
    """How an adapter is trained; units are those of TrainingOptions. None is the default's share,
    and in an imported adapter whatever is unknown is zero or empty."""

    context: str
    rank: int
    alpha: float
    epochs: int
    learning_rate: float
    targets: tuple[str, ...]
    seed: int
    quantized: bool
    held_out_share: float | None

    @classmethod
    def of(cls, options: pb.TrainingOptions) -> "Options":
        context = enum_name(pb.TrainingContext, options.context)
        return same(cls, options, context=context, **optional(options, "held_out_share"))


@dataclass(frozen=True)
class Overlap:
    """What a question set shares with the examples; `lines` of the set, from 1."""

    questions: int
    exact: int
    near: int
    shared_document: int
    lines: tuple[int, ...]


@dataclass(frozen=True)
class DataReport:
    """What the examples are like. Lengths are in tokens, `hash` is the SHA-256 of the file."""

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
    overlap: Overlap | None

    @classmethod
    def of(cls, report: pb.DataReport) -> "DataReport":
        has_overlap = report.HasField("overlap")
        return same(cls, report, overlap=same(Overlap, report.overlap) if has_overlap else None)


@dataclass(frozen=True)
class JobProgress:
    """How far training has come: losses in nats per answer token, None while unknown."""

    step: int
    steps: int
    loss: float | None
    held_out_loss: float | None
    tokens_per_second: float
    seconds_left: float | None

    @classmethod
    def of(cls, progress: pb.JobProgress) -> "JobProgress":
        return same(cls, progress, **optional(progress, "loss", "held_out_loss", "seconds_left"))


@dataclass(frozen=True)
class Job:
    """The making of one adapter. `state` is "queued", "preparing", "training", "verifying", or one
    of ENDED; `adapter` is NAME@HASH once there is one; times that have not come yet are None."""

    id: str
    name: str
    state: str
    base_model: str
    corpus: str
    options: Options
    prompt_version: str
    data: DataReport
    progress: JobProgress | None
    jobs_ahead: int
    restarts: int
    adapter: str
    reason: str
    message: str
    log_tail: str
    created: datetime | None
    started: datetime | None
    ended: datetime | None

    @classmethod
    def of(cls, job: pb.Job) -> "Job":
        return same(
            cls,
            job,
            state=enum_name(pb.JobState, job.state),
            options=Options.of(job.options),
            data=DataReport.of(job.data),
            progress=JobProgress.of(job.progress) if job.HasField("progress") else None,
            created=time(job, "create_time"),
            started=time(job, "start_time"),
            ended=time(job, "end_time"),
        )


@dataclass(frozen=True)
class JobEvent:
    """News of a job: the job after a change of its state, or the progress of its training."""

    sequence: int
    time: datetime | None
    news: Job | JobProgress


def news_of_check(response: pb.CreateJobResponse) -> Finding | CheckProgress | Job | None:
    """Return the plain value of one response, None for an event of a newer server."""
    match response.WhichOneof("event"):
        case "finding":
            finding = response.finding
            return same(
                Finding,
                finding,
                file=enum_name(pb.UploadedFile, finding.file),
                severity=enum_name(pb.FindingSeverity, finding.severity),
            )
        case "progress":
            return same(CheckProgress, response.progress)
        case "job":
            return Job.of(response.job)
    return None


def event_of(response: pb.WatchJobResponse) -> JobEvent | None:
    """Return the plain value of one response, None for a heartbeat."""
    news: Job | JobProgress
    match response.WhichOneof("event"):
        case "job":
            news = Job.of(response.job)
        case "progress":
            news = JobProgress.of(response.progress)
        case _:
            return None
    return JobEvent(response.sequence, time(response, "time"), news)
