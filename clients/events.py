"""What an answer is made of, as plain values."""

from dataclasses import dataclass, field
from typing import Any

from tworoads.v1 import answer_pb2 as pb
from tworoads.v1 import retrieval_pb2

from clients.messages import enum_name


@dataclass(frozen=True)
class Started:
    """How the question is being answered: the path taken, and why."""

    request_id: str
    path: str
    reason: str
    explanation: str
    adapter: str
    model: str
    corpus_version: str
    query: str
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Passage:
    """A passage of a document; `text` is document.text[start:end], in code points."""

    id: str
    document: str
    title: str
    uri: str
    start: int
    end: int
    text: str
    page: int
    heading_path: list[str]
    score: float

    @classmethod
    def of(cls, passage: retrieval_pb2.Passage) -> "Passage":
        return cls(
            passage.id,
            passage.document_id,
            passage.title,
            passage.uri,
            passage.start,
            passage.end,
            passage.text,
            passage.page,
            list(passage.heading_path),
            passage.score,
        )


@dataclass(frozen=True)
class Passages:
    """What was found, best first."""

    passages: list[Passage]


@dataclass(frozen=True)
class Text:
    """The text written since the event before."""

    text: str


@dataclass(frozen=True)
class Citation:
    """A sentence of the answer and the quote that supports it:
    document.text[source_start:source_end] == quote. All offsets are code points."""

    answer_start: int
    answer_end: int
    document: str
    source_start: int
    source_end: int
    quote: str
    support: float


@dataclass(frozen=True)
class Unsupported:
    """A sentence of the answer that no passage supports."""

    answer_start: int
    answer_end: int


@dataclass(frozen=True)
class Finished:
    """How the answer ended: "stop", "length" or "no_evidence". Times are milliseconds by stage."""

    reason: str
    usage: dict[str, int]
    timings_ms: dict[str, float]
    degraded: list[str]
    unused_passages: list[str]


Event = Started | Passages | Text | Citation | Unsupported | Finished


@dataclass
class Answer:
    """A whole answer: its events joined."""

    text: str = ""
    path: str = ""
    reason: str = ""
    explanation: str = ""
    adapter: str = ""
    model: str = ""
    finish: str = ""
    citations: list[Citation] = field(default_factory=list)
    unsupported: list[tuple[int, int]] = field(default_factory=list)
    passages: list[Passage] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)
    timings_ms: dict[str, float] = field(default_factory=dict)
    degraded: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, event: Event) -> None:
        """Join one more event."""
        match event:
            case Started():
                self.path, self.reason = event.path, event.reason
                self.explanation, self.model = event.explanation, event.model
                self.adapter, self.warnings = event.adapter, event.warnings
            case Passages():
                self.passages = event.passages
            case Text():
                self.text += event.text
            case Citation():
                self.citations.append(event)
            case Unsupported():
                self.unsupported.append((event.answer_start, event.answer_end))
            case Finished():
                self.finish, self.degraded = event.reason, event.degraded
                self.usage, self.timings_ms = event.usage, event.timings_ms

    def to_dict(self) -> dict[str, Any]:
        """Return what `tworoads ask --json` prints."""
        return {
            "answer": self.text,
            "path": self.path,
            "reason": self.reason,
            "adapter": self.adapter,
            "finish": self.finish,
            "citations": [vars(citation) for citation in self.citations],
            "unsupported": [list(span) for span in self.unsupported],
            "passages": [vars(passage) for passage in self.passages],
            "usage": self.usage,
            "timings_ms": self.timings_ms,
            "degraded": self.degraded,
            "warnings": self.warnings,
        }


def event_of(response: pb.AnswerResponse) -> Event | None:
    """Return the plain value of one response, None for an event of a newer server."""
    match response.WhichOneof("event"):
        case "started":
            started = response.started
            return Started(
                started.request_id,
                enum_name(retrieval_pb2.Path, started.path),
                started.reason,
                started.explanation,
                started.adapter,
                started.model,
                started.corpus_version,
                started.query,
                list(started.warnings),
            )
        case "passages":
            return Passages([Passage.of(passage) for passage in response.passages.passages])
        case "text":
            return Text(response.text)
        case "citation":
            citation = response.citation
            return Citation(
                citation.answer_start,
                citation.answer_end,
                citation.document_id,
                citation.source_start,
                citation.source_end,
                citation.quote,
                citation.support,
            )
        case "unsupported":
            return Unsupported(response.unsupported.answer_start, response.unsupported.answer_end)
        case "finished":
            return _finished(response.finished)
        case _:
            return None


def _finished(finished: pb.AnswerFinished) -> Finished:
    usage = {
        "input_tokens": finished.input_tokens,
        "output_tokens": finished.output_tokens,
        "cached_tokens": finished.cached_tokens,
    }
    timings = {
        stage.name: round(getattr(finished.timings, stage.name), 1)
        for stage in pb.Timings.DESCRIPTOR.fields
    }
    return Finished(
        enum_name(pb.AnswerFinishReason, finished.reason),
        usage,
        timings,
        list(finished.degraded),
        list(finished.unused_passages),
    )
