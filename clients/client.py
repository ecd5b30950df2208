"""The Python client.

async with Client() as client:
    async for event in client.answer("How many days of leave?", corpus="handbook"):
        ...
    answer = await client.ask("How many days of leave?", corpus="handbook")
"""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Self

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from tworoads.v1 import answer_pb2, retrieval_pb2
from tworoads.v1.answer_pb2_grpc import AnswerServiceStub
from tworoads.v1.generation_pb2 import GenerateOptions
from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub

from clients.events import Answer, Event, Passage, event_of
from clients.files import MetadataValue, NewDocument
from clients.local import address as local_address
from services.runtime.channel import connect
from services.runtime.errors import error_info

PathName = Literal["base", "rag", "tuned", "hybrid", "auto"]
Mode = Literal["hybrid", "vector", "text"]

ANSWERS = "tworoads.v1.AnswerService"
RETRIEVAL = "tworoads.v1.RetrievalService"
CHUNK = 512 * 1024
MOST_QUESTION_BYTES = 1024 * 1024
PAGE = 500


class TworoadsError(Exception):
    """A call that failed. `code` is the gRPC status, `reason` a stable word."""

    def __init__(self, code: grpc.StatusCode, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason


@dataclass(frozen=True)
class Ingested:
    """What became of a document: "indexed", "unchanged" or "failed" with its reason."""

    id: str
    outcome: str
    reason: str
    message: str
    passages: int


@dataclass(frozen=True)
class Progress:
    """How far an ingest has come: documents received and finished, passages embedded."""

    received: int
    finished: int
    passages: int


class Client:
    """Talks to the gateway at `address` (HOST:PORT); by default to the stack on this machine.

    Every method raises TworoadsError.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = address or local_address()

    async def __aenter__(self) -> Self:
        self._channel = connect(self.address, ANSWERS, RETRIEVAL)
        self._answers = AnswerServiceStub(self._channel)
        self._retrieval = RetrievalServiceStub(self._channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def answer(
        self,
        question: str,
        corpus: str = "",
        path: PathName = "auto",
        *,
        adapter: str = "",
        history: Sequence[tuple[str, str]] = (),
        timeout: float | None = None,
        **options: Any,
    ) -> AsyncIterator[Event]:
        """Yield the events of the answer as they come.

        `history` is pairs of question and answer, oldest first; `timeout` is in seconds, 60 by
        default. `options` are the fields of AnswerOptions (limit, filter, pinned_documents,
        allow_degraded ...) and of GenerateOptions (temperature, seed, stop, max_tokens ...).
        """
        request = _answer_request(question, corpus, path, adapter, history, options)
        with self._translated():
            async for response in self._answers.Answer(request, timeout=timeout):
                yield event_of(response)

    async def ask(self, question: str, *args: Any, **options: Any) -> Answer:
        """Return the whole answer; the arguments are those of `answer`."""
        answer = Answer()
        async for event in self.answer(question, *args, **options):
            answer.add(event)
        return answer

    async def create_corpus(self, name: str, allow_existing: bool = True) -> retrieval_pb2.Corpus:
        """Create a corpus, or return the one of this name."""
        request = retrieval_pb2.CreateCorpusRequest(name=name, allow_existing=allow_existing)
        with self._translated():
            response = await self._retrieval.CreateCorpus(request, timeout=60)
        corpus: retrieval_pb2.Corpus = response.corpus
        return corpus

    async def corpora(self) -> list[retrieval_pb2.Corpus]:
        """Return all corpora by name."""
        found: list[retrieval_pb2.Corpus] = []
        token = ""
        with self._translated():
            while True:
                response = await self._retrieval.ListCorpora(
                    retrieval_pb2.ListCorporaRequest(page_size=PAGE, page_token=token), timeout=60
                )
                found += response.corpora
                token = response.next_page_token
                if not token:
                    return found

    async def delete_corpus(self, name: str) -> None:
        """Delete a corpus with all its documents."""
        with self._translated():
            await self._retrieval.DeleteCorpus(
                retrieval_pb2.DeleteCorpusRequest(name=name), timeout=60
            )

    async def ingest(
        self, corpus: str, documents: Iterable[NewDocument]
    ) -> AsyncIterator[Ingested | Progress]:
        """Index documents; yield the result of each as it finishes, and the progress between.

        Documents are read as they are sent, so there may be more of them than fit into memory.
        """
        with self._translated():
            call = self._retrieval.PutDocuments(_parts(corpus, documents))
            try:
                async for response in call:
                    yield _news(response)
            finally:
                call.cancel()

    async def document(self, corpus: str, id: str) -> tuple[retrieval_pb2.Document, str]:
        """Return a document and its whole text."""
        text = ""
        with self._translated():
            while True:
                response = await self._retrieval.GetDocument(
                    retrieval_pb2.GetDocumentRequest(corpus=corpus, id=id, start=len(text)),
                    timeout=60,
                )
                text += response.text
                if len(text) >= response.document.length:
                    return response.document, text

    async def documents(self, corpus: str) -> AsyncIterator[retrieval_pb2.Document]:
        """Yield all documents of a corpus by id, without their text."""
        token = ""
        with self._translated():
            while True:
                response = await self._retrieval.ListDocuments(
                    retrieval_pb2.ListDocumentsRequest(
                        corpus=corpus, page_size=PAGE, page_token=token
                    ),
                    timeout=60,
                )
                for document in response.documents:
                    yield document
                token = response.next_page_token
                if not token:
                    return

    async def delete(self, corpus: str, ids: Sequence[str]) -> int:
        """Delete documents; return how many of them existed."""
        with self._translated():
            response = await self._retrieval.DeleteDocuments(
                retrieval_pb2.DeleteDocumentsRequest(corpus=corpus, ids=ids), timeout=60
            )
        return int(response.deleted)

    async def search(
        self,
        query: str,
        corpus: str,
        limit: int = 5,
        mode: Mode = "hybrid",
        filter: retrieval_pb2.Filter | None = None,
    ) -> list[Passage]:
        """Return the best passages for a query."""
        request = retrieval_pb2.SearchRequest(
            corpus=corpus,
            query=query,
            limit=limit,
            mode=retrieval_pb2.SearchMode.Value(f"SEARCH_MODE_{mode.upper()}"),
            filter=filter,
        )
        with self._translated():
            response = await self._retrieval.Search(request, timeout=60)
        return [Passage.of(passage) for passage in response.passages]

    async def server_info(self) -> answer_pb2.GetServerInfoResponse:
        """Return what the server is and which paths are open."""
        with self._translated():
            response: answer_pb2.GetServerInfoResponse = await self._answers.GetServerInfo(
                answer_pb2.GetServerInfoRequest(), timeout=10
            )
        return response

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            said = error_info(error)
            if said is None and error.code() is grpc.StatusCode.UNAVAILABLE:
                message = f"nothing answers at {self.address}: start it with `tworoads up`"
                raise TworoadsError(error.code(), "SERVER_UNAVAILABLE", message) from error
            reason = said.reason if said else error.code().name
            message = error.details() or error.code().name.lower()
            raise TworoadsError(error.code(), reason, message) from error


def _answer_request(
    question: str,
    corpus: str,
    path: str,
    adapter: str,
    history: Sequence[tuple[str, str]],
    options: Mapping[str, Any],
) -> answer_pb2.AnswerRequest:
    if len(question) > MOST_QUESTION_BYTES:  # more than a message may hold
        raise TworoadsError(
            grpc.StatusCode.INVALID_ARGUMENT, "QUESTION_TOO_LONG", "the question is too long"
        )
    writing = {name for name in options if name in GenerateOptions.DESCRIPTOR.fields_by_name}
    generate = GenerateOptions(**{name: options[name] for name in writing})
    others = {name: value for name, value in options.items() if name not in writing}
    return answer_pb2.AnswerRequest(
        question=question,
        corpus=corpus,
        path=retrieval_pb2.Path.Value(f"PATH_{path.upper()}"),
        adapter=adapter,
        history=[answer_pb2.Turn(question=asked, answer=said) for asked, said in history],
        options=answer_pb2.AnswerOptions(generate=generate, **others),
    )


async def _parts(
    corpus: str, documents: Iterable[NewDocument]
) -> AsyncIterable[retrieval_pb2.PutDocumentsRequest]:
    request = retrieval_pb2.PutDocumentsRequest
    yield request(start=retrieval_pb2.PutDocumentsStart(corpus=corpus))
    iterator = iter(documents)
    while (document := await asyncio.to_thread(next, iterator, None)) is not None:
        yield request(
            document=retrieval_pb2.PutDocumentsDocument(
                id=document.id,
                title=document.title,
                uri=document.uri,
                media_type=document.media_type,
                metadata={name: _value(value) for name, value in document.metadata.items()},
            )
        )
        for start in range(0, len(document.content), CHUNK):
            yield request(chunk=document.content[start : start + CHUNK])


def _value(value: MetadataValue) -> retrieval_pb2.MetadataValue:
    if isinstance(value, bool):
        return retrieval_pb2.MetadataValue(bool_value=value)
    if isinstance(value, str):
        return retrieval_pb2.MetadataValue(string_value=value)
    if isinstance(value, datetime):
        stamp = Timestamp()
        stamp.FromDatetime(value)
        return retrieval_pb2.MetadataValue(time_value=stamp)
    return retrieval_pb2.MetadataValue(number_value=value)


def _news(response: retrieval_pb2.PutDocumentsResponse) -> Ingested | Progress:
    if response.HasField("progress"):
        progress = response.progress
        return Progress(progress.received, progress.finished, progress.passages)
    result = response.result
    name = retrieval_pb2.DocumentOutcome.Name(result.outcome)
    outcome = name[len("DOCUMENT_OUTCOME_") :].lower()
    return Ingested(result.id, outcome, result.reason, result.message, result.passages)
