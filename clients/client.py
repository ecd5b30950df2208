"""The Python client.

async with Client() as client:
    async for event in client.answer("How many days of leave?", corpus="handbook"):
        ...
    answer = await client.ask("How many days of leave?", corpus="handbook")
"""

import os
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Literal, Self

import grpc
from tworoads.v1 import answer_pb2, retrieval_pb2
from tworoads.v1.answer_pb2_grpc import AnswerServiceStub
from tworoads.v1.evaluation_pb2_grpc import EvaluationServiceStub
from tworoads.v1.generation_pb2 import GenerateOptions
from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub
from tworoads.v1.tuning_pb2_grpc import TuningServiceStub

from clients.credentials import credentials
from clients.documents import Corpus, Document, Ingested, NewDocument, Progress, Upload, news_of
from clients.errors import TworoadsError, translated
from clients.evaluation import EvaluationMethods
from clients.events import Answer, Event, Passage, event_of
from clients.local import address as local_address
from clients.tuning import TuningMethods
from services.runtime import tracing
from services.runtime.channel import connect
from services.runtime.status import real_status

__all__ = ["Client", "Mode", "PathName", "TworoadsError"]

PathName = Literal["base", "rag", "tuned", "hybrid", "auto"]
Mode = Literal["hybrid", "vector", "text"]

ANSWERS = "tworoads.v1.AnswerService"
RETRIEVAL = "tworoads.v1.RetrievalService"
TUNING = "tworoads.v1.TuningService"
EVALUATION = "tworoads.v1.EvaluationService"
MOST_QUESTION = 256 * 1024  # code points; the server takes fewer, but a message may hold them
MOST_IDS = 1000  # of one DeleteDocumentsRequest
PAGE = 500
SECONDS = 60.0


class Client(EvaluationMethods, TuningMethods):
    """Talks to the gateway at `address` (HOST:PORT); by default to the stack on this machine.

    `key` is an API key or a token; `tls` is for a server with a certificate, which is checked by
    the authorities of the system or by those in the file `ca`. What is not given is taken from the
    environment: TWOROADS_KEY_FILE or TWOROADS_KEY, TWOROADS_TLS=1, TWOROADS_CA.

    Every method raises TworoadsError. Those about jobs and adapters are in clients/tuning.py,
    those about comparisons and policies in clients/evaluation.py.
    """

    def __init__(
        self,
        address: str | None = None,
        key: str = "",
        ca: str | os.PathLike[str] | None = None,
        tls: bool = False,
    ) -> None:
        self.address = address or local_address()
        self._credentials = credentials(self.address, key, ca, tls)

    async def __aenter__(self) -> Self:
        known = self._credentials
        self._channel = connect(
            self.address,
            *(ANSWERS, RETRIEVAL, TUNING, EVALUATION),
            key=known.key,
            ca=known.ca,
            public=known.tls,
        )
        channel = tracing.traced(self._channel)
        self._answers = AnswerServiceStub(channel)
        self._retrieval = RetrievalServiceStub(channel)
        self._tuning = TuningServiceStub(channel)
        self._evaluation = EvaluationServiceStub(channel)
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
        timeout: float = SECONDS,
        **options: Any,
    ) -> AsyncIterator[Event]:
        """Yield the events of the answer as they come; leaving the loop early stops all work.

        `history` is pairs of question and answer, oldest first; `timeout` is in seconds, at most
        300. `options` are the fields of AnswerOptions (limit, filter, pinned_documents,
        allow_degraded ...) and of GenerateOptions (temperature, seed, stop, max_tokens ...).
        """
        with translated(self.address):
            request = _answer_request(question, corpus, path, adapter, history, options)
            call = self._answers.Answer(request, timeout=timeout)
            try:
                async for response in call:
                    if event := event_of(response):
                        yield event
            finally:
                call.cancel()

    async def ask(
        self, question: str, corpus: str = "", path: PathName = "auto", **options: Any
    ) -> Answer:
        """Return the whole answer; the arguments are those of `answer`."""
        answer = Answer()
        async for event in self.answer(question, corpus, path, **options):
            answer.add(event)
        return answer

    async def create_corpus(self, name: str, allow_existing: bool = True) -> Corpus:
        """Create a corpus, or return the one of this name."""
        with translated(self.address):
            request = retrieval_pb2.CreateCorpusRequest(name=name, allow_existing=allow_existing)
            response = await self._retrieval.CreateCorpus(request, timeout=SECONDS)
        return Corpus.of(response.corpus)

    async def corpora(self) -> list[Corpus]:
        """Return all corpora by name."""
        found: list[Corpus] = []
        token = ""
        with translated(self.address):
            while True:
                response = await self._retrieval.ListCorpora(
                    retrieval_pb2.ListCorporaRequest(page_size=PAGE, page_token=token),
                    timeout=SECONDS,
                )
                found += map(Corpus.of, response.corpora)
                token = response.next_page_token
                if not token:
                    return found

    async def delete_corpus(self, name: str) -> None:
        """Delete a corpus with all its documents."""
        with translated(self.address):
            await self._retrieval.DeleteCorpus(
                retrieval_pb2.DeleteCorpusRequest(name=name), timeout=SECONDS
            )

    async def ingest(
        self, corpus: str, documents: Iterable[NewDocument | Ingested]
    ) -> AsyncIterator[Ingested | Progress]:
        """Index documents; yield the result of each as it finishes, and the progress between.

        Documents are read as they are sent, so there may be more of them than fit into memory. A
        result among them (a file that could not be read) is passed on. What `documents` raises is
        raised when the documents before it are finished.
        """
        with translated(self.address):
            upload = Upload(corpus, documents)
            call = self._retrieval.PutDocuments(upload.requests())
            try:
                async with real_status(call):
                    async for response in call:
                        if news := news_of(response):
                            yield news
            finally:
                call.cancel()
        for failed in upload.failed:
            yield failed
        if upload.error:
            raise upload.error

    async def document(self, corpus: str, id: str) -> tuple[Document, str]:
        """Return a document and its whole text."""
        text = version = ""
        with translated(self.address):
            while True:
                response = await self._retrieval.GetDocument(
                    retrieval_pb2.GetDocumentRequest(corpus=corpus, id=id, start=len(text)),
                    timeout=SECONDS,
                )
                if text and response.document.version != version:  # replaced while it was read
                    text = ""
                    continue
                version = response.document.version
                text += response.text
                if len(text) >= response.document.length:
                    return Document.of(response.document), text

    async def documents(self, corpus: str) -> AsyncIterator[Document]:
        """Yield all documents of a corpus by id, without their text."""
        token = ""
        with translated(self.address):
            while True:
                response = await self._retrieval.ListDocuments(
                    retrieval_pb2.ListDocumentsRequest(
                        corpus=corpus, page_size=PAGE, page_token=token
                    ),
                    timeout=SECONDS,
                )
                for document in response.documents:
                    yield Document.of(document)
                token = response.next_page_token
                if not token:
                    return

    async def delete(self, corpus: str, ids: Sequence[str]) -> int:
        """Delete documents; return how many of them existed."""
        deleted = 0
        with translated(self.address):
            for start in range(0, len(ids), MOST_IDS):
                response = await self._retrieval.DeleteDocuments(
                    retrieval_pb2.DeleteDocumentsRequest(
                        corpus=corpus, ids=ids[start : start + MOST_IDS]
                    ),
                    timeout=SECONDS,
                )
                deleted += response.deleted
        return deleted

    async def search(
        self,
        query: str,
        corpus: str,
        limit: int = 5,
        mode: Mode = "hybrid",
        filter: retrieval_pb2.Filter | None = None,
    ) -> list[Passage]:
        """Return the best passages for a query."""
        _check_length(query, "query")
        with translated(self.address):
            request = retrieval_pb2.SearchRequest(
                corpus=corpus,
                query=query,
                limit=limit,
                mode=retrieval_pb2.SearchMode.Value(f"SEARCH_MODE_{mode.upper()}"),
                filter=filter,
            )
            response = await self._retrieval.Search(request, timeout=SECONDS)
        return [Passage.of(passage) for passage in response.passages]

    async def server_info(self) -> answer_pb2.GetServerInfoResponse:
        """Return what the server is and which paths are open."""
        with translated(self.address):
            response: answer_pb2.GetServerInfoResponse = await self._answers.GetServerInfo(
                answer_pb2.GetServerInfoRequest(), timeout=10
            )
        return response


def _answer_request(
    question: str,
    corpus: str,
    path: str,
    adapter: str,
    history: Sequence[tuple[str, str]],
    options: Mapping[str, Any],
) -> answer_pb2.AnswerRequest:
    _check_length(question, "question")
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


def _check_length(text: str, what: str) -> None:
    """Refuse what gRPC would refuse without a reason."""
    if len(text) > MOST_QUESTION:
        raise TworoadsError(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"{what.upper()}_TOO_LONG",
            f"the {what} is too long: a few sentences will do",
        )
