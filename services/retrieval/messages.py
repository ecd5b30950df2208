"""Fills the messages that retrieval sends from plain values."""

from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp
from tworoads.v1 import retrieval_pb2 as pb
from tworoads.v1.embedding_pb2 import EmbeddingModel

from services.retrieval import checks
from services.retrieval.corpora import Corpus
from services.retrieval.ingest import Progress, Result
from services.retrieval.stores.store import Document, Hit, MetadataValue

OUTCOMES = {
    "INDEXED": pb.DOCUMENT_OUTCOME_INDEXED,
    "UNCHANGED": pb.DOCUMENT_OUTCOME_UNCHANGED,
    "FAILED": pb.DOCUMENT_OUTCOME_FAILED,
}


def corpus_of(corpus: Corpus, version: str, documents: int) -> pb.Corpus:
    model = corpus.embedder
    return pb.Corpus(
        name=corpus.name,
        embedder=EmbeddingModel(
            name=model.name,
            hash=model.hash,
            dimension=model.dimension,
            max_tokens=model.max_tokens,
            normalized=model.normalized,
        ),
        chunk_tokens=corpus.chunk_tokens,
        version=version,
        documents=documents,
        create_time=_timestamp(corpus.created),
    )


def next_token(names: list[str], size: int) -> str:
    """Return the token behind a page of `size` of these names; empty if no more follow."""
    return checks.page_token(names[size - 1]) if len(names) > size else ""


def progress_of(progress: Progress) -> pb.PutDocumentsResponse:
    return pb.PutDocumentsResponse(
        progress=pb.IngestProgress(
            received=progress.received, finished=progress.finished, passages=progress.passages
        )
    )


def result_of(result: Result) -> pb.PutDocumentsResponse:
    return pb.PutDocumentsResponse(
        result=pb.DocumentResult(
            id=result.id,
            outcome=OUTCOMES[result.outcome],
            reason=result.reason,
            message=result.message,
            passages=result.passages,
        )
    )


def document_of(document: Document) -> pb.Document:
    return pb.Document(
        id=document.id,
        title=document.title,
        uri=document.uri,
        media_type=document.media_type,
        metadata={key: _value(value) for key, value in document.metadata.items()},
        content_hash=document.content_hash,
        version=document.version,
        length=document.length,
        passages=document.passages,
        update_time=_timestamp(document.updated),
    )


def passage_of(hit: Hit) -> pb.Passage:
    passage = hit.passage
    return pb.Passage(
        id=passage.id,
        document_id=passage.document_id,
        title=passage.title,
        uri=passage.uri,
        start=passage.start,
        end=passage.end,
        text=passage.text,
        page=passage.page,
        heading_path=passage.heading_path,
        score=hit.score,
        document_version=passage.document_version,
    )


def _value(value: MetadataValue) -> pb.MetadataValue:
    if isinstance(value, bool):
        return pb.MetadataValue(bool_value=value)
    if isinstance(value, str):
        return pb.MetadataValue(string_value=value)
    if isinstance(value, datetime):
        return pb.MetadataValue(time_value=_timestamp(value))
    return pb.MetadataValue(number_value=value)


def _timestamp(time: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(time)
    return stamp
