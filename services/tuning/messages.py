"""Turns plain values into the messages that tuning sends, and messages of callers into values."""

from collections.abc import Sequence

from google.protobuf.timestamp_pb2 import Timestamp
from tworoads.v1 import generation_pb2
from tworoads.v1 import tuning_pb2 as pb

from services.prompts.words import Message, Part, Role
from services.runtime.errors import InvalidInput
from services.tuning.adapters.registry import etag
from services.tuning.job import (
    Adapter,
    AdapterState,
    Context,
    DataReport,
    Fidelity,
    Job,
    Options,
    Probe,
    Progress,
    State,
    TokenScore,
)

STATES: dict[State, pb.JobState.ValueType] = {
    "queued": pb.JOB_STATE_QUEUED,
    "preparing": pb.JOB_STATE_PREPARING,
    "training": pb.JOB_STATE_TRAINING,
    "verifying": pb.JOB_STATE_VERIFYING,
    "ready": pb.JOB_STATE_READY,
    "unfaithful": pb.JOB_STATE_UNFAITHFUL,
    "unmeasured": pb.JOB_STATE_UNMEASURED,
    "failed": pb.JOB_STATE_FAILED,
    "cancelled": pb.JOB_STATE_CANCELLED,
}
ADAPTER_STATES: dict[AdapterState, pb.AdapterState.ValueType] = {
    "verifying": pb.ADAPTER_STATE_VERIFYING,
    "ready": pb.ADAPTER_STATE_READY,
    "unfaithful": pb.ADAPTER_STATE_UNFAITHFUL,
    "unmeasured": pb.ADAPTER_STATE_UNMEASURED,
}
CONTEXTS: dict[Context, pb.TrainingContext.ValueType] = {
    "none": pb.TRAINING_CONTEXT_NONE,
    "retrieved": pb.TRAINING_CONTEXT_RETRIEVED,
    "mixed": pb.TRAINING_CONTEXT_MIXED,
    "unknown": pb.TRAINING_CONTEXT_UNSPECIFIED,
}
CONTEXTS_OF: dict[int, Context] = {
    pb.TRAINING_CONTEXT_UNSPECIFIED: "none",
    pb.TRAINING_CONTEXT_NONE: "none",
    pb.TRAINING_CONTEXT_RETRIEVED: "retrieved",
    pb.TRAINING_CONTEXT_MIXED: "mixed",
}
ROLES: dict[int, Role] = {
    generation_pb2.ROLE_SYSTEM: "system",
    generation_pb2.ROLE_USER: "user",
    generation_pb2.ROLE_ASSISTANT: "assistant",
}


def job_message(job: Job, ahead: int) -> pb.Job:
    """Return a job; `ahead` jobs go before it."""
    return pb.Job(
        id=job.id,
        name=job.name,
        state=STATES[job.state],
        base_model=job.base_model,
        corpus=job.corpus,
        options=options_message(job.options),
        prompt_version=job.prompt_version,
        data=report_message(job.data),
        progress=progress_message(job.progress) if job.progress else None,
        jobs_ahead=ahead if job.state == "queued" else 0,
        restarts=job.restarts,
        adapter=job.adapter,
        reason=job.reason,
        message=job.message,
        log_tail=job.log_tail,
        create_time=timestamp(job.created),
        start_time=timestamp(job.started),
        end_time=timestamp(job.ended),
    )


def options_message(options: Options) -> pb.TrainingOptions:
    return pb.TrainingOptions(
        context=CONTEXTS[options.context],
        rank=options.rank,
        alpha=options.alpha,
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        targets=options.targets,
        seed=options.seed,
        quantized=options.quantized,
        held_out_share=options.held_out_share,
    )


def context_of(given: pb.TrainingContext.ValueType) -> Context:
    """Return what examples are shown. Raises InvalidInput (CONTEXT_UNKNOWN)."""
    if given not in CONTEXTS_OF:
        raise InvalidInput("CONTEXT_UNKNOWN", "there is no such training context")
    return CONTEXTS_OF[given]


def report_message(report: DataReport) -> pb.DataReport:
    overlap = report.overlap
    return pb.DataReport(
        lines=report.lines,
        examples=report.examples,
        held_out=report.held_out,
        tokens=report.tokens,
        answer_tokens=report.answer_tokens,
        answer_tokens_min=report.answer_tokens_min,
        answer_tokens_p50=report.answer_tokens_p50,
        answer_tokens_p95=report.answer_tokens_p95,
        answer_tokens_max=report.answer_tokens_max,
        duplicates=report.duplicates,
        too_long=report.too_long,
        secret_like=report.secret_like,
        overlap=pb.Overlap(
            questions=overlap.questions,
            exact=overlap.exact,
            near=overlap.near,
            shared_document=overlap.shared_document,
            lines=overlap.lines,
        )
        if overlap
        else None,
        hash=report.hash,
    )


def progress_message(progress: Progress) -> pb.JobProgress:
    return pb.JobProgress(
        step=progress.step,
        steps=progress.steps,
        loss=progress.loss,
        held_out_loss=progress.held_out_loss,
        tokens_per_second=progress.tokens_per_second,
        seconds_left=progress.seconds_left,
    )


def adapter_message(adapter: Adapter) -> pb.Adapter:
    manifest = adapter.manifest
    return pb.Adapter(
        id=adapter.id,
        name=manifest.name,
        hash=adapter.hash,
        state=ADAPTER_STATES[adapter.state],
        base_model=manifest.base_model,
        base_model_hash=manifest.base_model_hash,
        prompt_version=manifest.prompt_version,
        options=options_message(manifest.options),
        examples_hash=manifest.examples_hash,
        files=[
            pb.AdapterFile(name=file.name, size=file.size, sha256=file.sha256)
            for file in manifest.files
        ],
        job=adapter.job,
        held_out_loss=adapter.held_out_loss,
        training_seconds=adapter.training_seconds,
        fidelity=_fidelity(adapter.fidelity) if adapter.fidelity else None,
        speeds=[
            pb.AdapterSpeed(
                streams=speed.streams,
                adapter_tokens_per_second=speed.adapter_tokens_per_second,
                base_tokens_per_second=speed.base_tokens_per_second,
            )
            for speed in adapter.speeds
        ],
        accepted_by=adapter.accepted_by,
        accept_time=timestamp(adapter.accepted),
        create_time=timestamp(adapter.created),
        etag=etag(adapter),
        corpus=manifest.corpus,
        reason=adapter.reason,
    )


def probe_of(given: pb.AdapterProbe) -> Probe:
    """Return what an adapter is measured by. Raises InvalidInput (PROBE_INVALID)."""
    if not given.continuation:
        raise InvalidInput("PROBE_INVALID", "a probe has an answer, and this one has none")
    return Probe(
        messages=messages_of(given.messages),
        continuation=given.continuation,
        tokens=tuple(TokenScore(token.id, token.log_probability) for token in given.tokens),
    )


def messages_of(given: Sequence[generation_pb2.Message]) -> tuple[Message, ...]:
    """Return the conversation of a probe. Raises InvalidInput (PROBE_INVALID) unless it has turns
    of known speakers and ends with the user's."""
    if not given or given[-1].role != generation_pb2.ROLE_USER:
        raise InvalidInput("PROBE_INVALID", "the conversation of a probe ends with the user's turn")
    if not all(message.role in ROLES and message.parts for message in given):
        raise InvalidInput("PROBE_INVALID", "a message of a probe has a role and parts")
    return tuple(
        Message(
            ROLES[message.role],
            tuple(Part(part.text, part.id, part.droppable) for part in message.parts),
        )
        for message in given
    )


def timestamp(seconds: float) -> Timestamp | None:
    """Return a time, given in seconds since 1970; None for 0, which is none."""
    if not seconds:
        return None
    stamp = Timestamp()
    stamp.FromMicroseconds(round(seconds * 1e6))
    return stamp


def _fidelity(fidelity: Fidelity) -> pb.Fidelity:
    return pb.Fidelity(
        probes=fidelity.probes,
        tokens=fidelity.tokens,
        trainer_difference=fidelity.trainer_difference,
        trainer_difference_max=fidelity.trainer_difference_max,
        bound=fidelity.bound,
        base_difference=fidelity.base_difference,
    )
