"""Documents as plain values: those to ingest, what became of them, and those of a corpus."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp
from tworoads.v1 import retrieval_pb2 as pb

from clients.messages import enum_name
from services.retrieval.media_types import TEXT

MetadataValue = str | float | bool | datetime

CHUNK = 512 * 1024


@dataclass(frozen=True)
class NewDocument:
    """A document to ingest. `id` names it in its corpus; `title` may be left to the content."""

    id: str
    content: bytes
    media_type: str = TEXT
    title: str = ""
    uri: str = ""
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)


@dataclass(frozen=True)
class Ingested:
    """What became of a document: "indexed", "unchanged" or "failed" with its reason."""

    id: str
    outcome: str
    reason: str = ""
    message: str = ""
    passages: int = 0


@dataclass(frozen=True)
class Progress:
    """How far an ingest has come: documents received and finished, passages embedded."""

    received: int
    finished: int
    passages: int


@dataclass(frozen=True)
class Document:
    """A document of a corpus, without its text, which has `length` code points."""

    id: str
    title: str
    uri: str
    media_type: str
    metadata: Mapping[str, MetadataValue]
    version: str
    length: int
    passages: int
    updated: datetime

    @classmethod
    def of(cls, document: pb.Document) -> "Document":
        return cls(
            document.id,
            document.title,
            document.uri,
            document.media_type,
            {name: _plain(value) for name, value in document.metadata.items()},
            document.version,
            document.length,
            document.passages,
            document.update_time.ToDatetime(UTC),
        )


@dataclass(frozen=True)
class Corpus:
    """A corpus, the name of its embedding model, and how many documents it has."""

    name: str
    embedder: str
    chunk_tokens: int
    version: str
    documents: int
    created: datetime

    @classmethod
    def of(cls, corpus: pb.Corpus) -> "Corpus":
        return cls(
            corpus.name,
            corpus.embedder.name,
            corpus.chunk_tokens,
            corpus.version,
            corpus.documents,
            corpus.create_time.ToDatetime(UTC),
        )


def news_of(response: pb.PutDocumentsResponse) -> Ingested | Progress | None:
    """Return the plain value of one response to an ingest, None for an event of a newer server."""
    match response.WhichOneof("event"):
        case "progress":
            progress = response.progress
            return Progress(progress.received, progress.finished, progress.passages)
        case "result":
            result = response.result
            outcome = enum_name(pb.DocumentOutcome, result.outcome)
            return Ingested(result.id, outcome, result.reason, result.message, result.passages)
    return None


class Upload:
    """The requests that send documents to a corpus, and what went wrong before sending.

    `failed` grows by documents that could not be sent. `error` is what the iterable raised; the
    stream then ends as if it were over, so that what was sent is indexed.
    """

    def __init__(self, corpus: str, documents: Iterable[NewDocument | Ingested]) -> None:
        self._start = pb.PutDocumentsRequest(start=pb.PutDocumentsStart(corpus=corpus))
        self._documents = iter(documents)
        self.failed: list[Ingested] = []
        self.error: Exception | None = None

    async def requests(self) -> AsyncIterator[pb.PutDocumentsRequest]:
        """Yield the start, then of each document its header and its content in chunks."""
        yield self._start
        while (document := await self._next()) is not None:
            try:
                header = header_of(document)
            except (TypeError, ValueError, AttributeError, OverflowError) as error:
                self.failed.append(Ingested(document.id, "failed", "DOCUMENT_INVALID", str(error)))
                continue
            yield pb.PutDocumentsRequest(document=header)
            for start in range(0, len(document.content), CHUNK):
                yield pb.PutDocumentsRequest(chunk=document.content[start : start + CHUNK])
        yield pb.PutDocumentsRequest(end=pb.PutDocumentsEnd())

    async def _next(self) -> NewDocument | None:
        while True:
            try:
                document = await asyncio.to_thread(next, self._documents, None)
            except Exception as error:  # gRPC would cancel the call and not say why
                self.error = error
                return None
            if not isinstance(document, Ingested):
                return document
            self.failed.append(document)


def header_of(document: NewDocument) -> pb.PutDocumentsDocument:
    """Return what is sent before the content of a document.

    Raises TypeError, ValueError or AttributeError for metadata that cannot be sent.
    """
    return pb.PutDocumentsDocument(
        id=document.id,
        title=document.title,
        uri=document.uri,
        media_type=document.media_type,
        metadata={name: _value(value) for name, value in document.metadata.items()},
    )


def _value(value: MetadataValue) -> pb.MetadataValue:
    if isinstance(value, bool):
        return pb.MetadataValue(bool_value=value)
    if isinstance(value, str):
        return pb.MetadataValue(string_value=value)
    if isinstance(value, datetime):
        stamp = Timestamp()
        stamp.FromDatetime(value)
        return pb.MetadataValue(time_value=stamp)
    return pb.MetadataValue(number_value=value)


def _plain(value: pb.MetadataValue) -> MetadataValue:
    if value.HasField("time_value"):
        return value.time_value.ToDatetime(UTC)
    plain: str | float | bool = getattr(value, value.WhichOneof("kind") or "string_value")
    return plain
