"""Turns plain values into the messages that evaluation sends. They have the same field names."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from google.protobuf.json_format import Parse
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from tworoads.v1 import evaluation_pb2 as pb
from tworoads.v1.answer_pb2 import Turn
from tworoads.v1.retrieval_pb2 import Path

from services.evaluation.comparison import Candidate, Comparison, Plan, Progress
from services.evaluation.outcome import Outcome

STATES = {
    name.removeprefix("COMPARISON_STATE_").lower(): number
    for name, number in pb.ComparisonState.items()
}


def comparison_message(comparison: Comparison, outcome: Outcome | None = None) -> pb.Comparison:
    """Return a comparison, with what came of it if that is given."""
    message = pb.Comparison(
        id=comparison.id,
        state=pb.ComparisonState.ValueType(STATES[comparison.state]),
        start=_start(comparison.plan),
        questions=comparison.questions,
        clusters=comparison.clusters,
        questions_hash=comparison.questions_hash,
        changed_documents=comparison.changed_documents,
        corpus_version=comparison.corpus_version,
        model=comparison.model,
        judge=comparison.judge,
        reason=comparison.reason,
        message=comparison.message,
        author=comparison.author,
        create_time=timestamp(comparison.created),
        start_time=timestamp(comparison.started),
        end_time=timestamp(comparison.ended),
    )
    fill(message.prices, comparison.prices)
    if comparison.progress:
        message.progress.CopyFrom(progress_message(comparison.progress))
    if outcome:
        for result in outcome.results:
            fill(message.results.add(), result)
        for difference in outcome.differences:
            fill(message.differences.add(), difference)
        fill(message.verdict, outcome.verdict)
    return message


def progress_message(progress: Progress) -> pb.ComparisonProgress:
    message = pb.ComparisonProgress()
    fill(message, progress)
    return message


def timestamp(seconds: float) -> Timestamp | None:
    """Return a time, given in seconds since 1970; None for 0, which is none."""
    if not seconds:
        return None
    stamp = Timestamp()
    stamp.FromMicroseconds(round(seconds * 1e6))
    return stamp


def fill(message: Message, value: Any) -> None:
    """Set the fields of a message to those of a dataclass that it has; None leaves one unset."""
    message.SetInParent()
    described = message.DESCRIPTOR.fields_by_name
    for field in fields(value):
        said = getattr(value, field.name)
        if said is None or field.name not in described:
            continue
        to = described[field.name]
        if isinstance(said, Mapping):
            getattr(message, field.name).update(said)
        elif isinstance(said, tuple):
            entries = getattr(message, field.name)
            for entry in said:
                if to.message_type:
                    fill(entries.add(), entry)
                else:
                    entries.append(entry)
        elif to.message_type:
            fill(getattr(message, field.name), said)
        elif to.enum_type:
            setattr(message, field.name, enum_number(to.enum_type, said))
        else:
            setattr(message, field.name, said)


def enum_number(enum: Any, word: str) -> int:
    """Return the number of a word such as "knowledge_gap", 0 for an empty one."""
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return int(enum.values_by_name[prefix + (word or "unspecified").upper()].number)


def _start(plan: Plan) -> pb.CreateComparisonStart:
    message = pb.CreateComparisonStart(
        corpus=plan.corpus,
        adapters=plan.adapters,
        candidates=[_candidate(candidate) for candidate in plan.candidates],
        examples=[Turn(question=asked, answer=said) for asked, said in plan.examples],
        concurrency=plan.concurrency,
        margin=plan.margin,
        seed=plan.seed,
    )
    fill(message.scoring, plan.scoring)
    fill(message.constraints, plan.constraints)
    return message


def _candidate(candidate: Candidate) -> pb.Candidate:
    message = pb.Candidate(
        id=candidate.id,
        path=Path.Value(f"PATH_{candidate.path.upper()}"),
        adapter=candidate.adapter,
        corpus=candidate.corpus,
    )
    Parse(candidate.options, message.options)
    return message
