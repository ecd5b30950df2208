"""What a comparison needs beside answers: what a search finds, training examples, embeddings."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tworoads.v1 import answer_pb2, embedding_pb2, retrieval_pb2, tuning_pb2

from services.evaluation.asking import Gateway, Patience, passes
from services.evaluation.comparison import Question
from services.questions import fields
from services.questions.lines import BadLine, Lines, parse
from services.questions.overlap import Trained
from services.runtime.call import outgoing
from services.runtime.errors import (
    InvalidInput,
    NotFound,
    NotReady,
    Overloaded,
    Unavailable,
    downstream,
)
from services.runtime.threads import in_thread

AT_ONCE = 8
SECONDS = 60.0
DOCUMENTS = 10  # that nDCG@10 looks at
PASSAGES = 50  # that hold as many documents, most of the time
TEXTS = 64  # of one call of Embed
T = TypeVar("T")
R = TypeVar("R")


class Gatherer:
    """Asks the gateway; waits while a service is away, for at most `patience_seconds`.

    All methods raise ComparisonFailed after that.
    """

    def __init__(self, gateway: Gateway, patience_seconds: float) -> None:
        self._gateway = gateway
        self._patience_seconds = patience_seconds

    async def model(self) -> str:
        """Return the name of the language model; empty while generation is away."""
        request = answer_pb2.GetServerInfoRequest()
        response = await self.patiently(
            lambda: self._gateway.answers.GetServerInfo(request, **_time())
        )
        return str(response.model)

    async def corpus(self, name: str) -> retrieval_pb2.Corpus:
        """Return a corpus. Raises NotFound (CORPUS_NOT_FOUND)."""
        request = retrieval_pb2.GetCorpusRequest(name=name)
        response = await self.patiently(
            lambda: self._gateway.retrieval.GetCorpus(request, **_time())
        )
        corpus: retrieval_pb2.Corpus = response.corpus
        return corpus

    async def known(self, corpus: str, ids: Iterable[str]) -> frozenset[str]:
        """Return those of the documents that the corpus has."""

        async def there(id: str) -> str:
            request = retrieval_pb2.GetDocumentRequest(corpus=corpus, id=id, end=0)
            try:
                await self.patiently(
                    lambda: self._gateway.retrieval.GetDocument(request, **_time())
                )
            except (NotFound, InvalidInput):
                return ""
            return id

        found = await each(sorted(set(ids)), there, AT_ONCE)
        return frozenset(filter(None, found))

    async def found(self, corpus: str, questions: Sequence[Question]) -> dict[int, tuple[str, ...]]:
        """Return the documents that a search alone finds, best first, by line of the question."""

        async def search(question: Question) -> tuple[int, tuple[str, ...]]:
            request = retrieval_pb2.SearchRequest(
                corpus=corpus, query=question.question, limit=PASSAGES
            )
            response = await self.patiently(
                lambda: self._gateway.retrieval.Search(request, **_time())
            )
            ids = dict.fromkeys(passage.document_id for passage in response.passages)
            return question.line, tuple(ids)[:DOCUMENTS]

        return dict(await each(questions, search, AT_ONCE))

    async def training_seconds(self, adapter: str) -> float | None:
        """Return what training an adapter took; None if unknown."""
        request = tuning_pb2.GetAdapterRequest(adapter=adapter)
        try:
            response = await self.patiently(
                lambda: self._gateway.tuning.GetAdapter(request, **_time())
            )
        except NotFound:  # deleted meanwhile
            return None
        found = response.adapter
        return found.training_seconds if found.HasField("training_seconds") else None

    async def examples(self, adapter: str) -> list[fields.Example] | None:
        """Return what an adapter was trained on; None if unknown, as for an imported one."""

        async def download() -> list[fields.Example]:
            request = tuning_pb2.DownloadAdapterRequest(
                adapter=adapter, content=tuning_pb2.ADAPTER_CONTENT_EXAMPLES
            )
            lines, found = Lines(), list[fields.Example]()
            async for response in self._gateway.tuning.DownloadAdapter(request, **_time()):
                for line in lines.feed(response.chunk.data):
                    found += _example(lines.count, line)
            for line in lines.close():
                found += _example(lines.count, line)
            return found

        try:
            return await self.patiently(download)
        except (NotFound, NotReady):
            return None

    async def overlap(self, adapter: str, questions: Sequence[Question]) -> dict[int, str] | None:
        """Return what questions share with an adapter's training examples, by line; None if these
        are unknown."""
        examples = await self.examples(adapter)
        return None if examples is None else await in_thread(_overlap, examples, questions)

    async def embeddings(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], str]:
        """Return the vectors of questions, shape (texts, dimension), and their model's hash."""
        parts: list[Any] = []

        async def embed() -> Any:
            return await self._gateway.embedding.Embed(request, **_time())

        for start in range(0, len(texts), TEXTS):
            request = embedding_pb2.EmbedRequest(
                texts=texts[start : start + TEXTS], kind=embedding_pb2.EMBED_KIND_QUERY
            )
            parts.append(await self.patiently(embed))
        vectors = [vector.values for part in parts for vector in part.vectors]
        return np.array(vectors, np.float32), parts[0].model_hash

    async def patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """Return what a call does, tried again while a service is away."""
        patience = Patience(self._patience_seconds)
        while True:
            try:
                with downstream("gateway"):
                    return await call()
            except (Unavailable, Overloaded) as error:
                if not passes(error):
                    raise
                await patience.wait(error)


async def each(items: Iterable[T], work: Callable[[T], Awaitable[R]], at_once: int) -> list[R]:
    """Return what `work` makes of each item, in order, at most `at_once` at the same time. The
    first error ends all work and is raised."""
    numbered = iter(enumerate(items))
    results: dict[int, R] = {}

    async def worker() -> None:
        for number, item in numbered:
            results[number] = await work(item)

    workers = [asyncio.create_task(worker()) for _ in range(at_once)]
    try:
        await asyncio.gather(*workers)
    finally:
        for one in workers:
            one.cancel()
        await asyncio.wait(workers)
    return [results[number] for number in sorted(results)]


def _time() -> Mapping[str, Any]:
    return outgoing(SECONDS)


def _example(number: int, line: bytes | None) -> list[fields.Example]:
    try:
        return [fields.example(number, parse(line))[0]] if line and line.strip() else []
    except BadLine:  # it was checked when it came
        return []


def _overlap(examples: Sequence[fields.Example], questions: Sequence[Question]) -> dict[int, str]:
    trained = Trained(examples)
    shared = {
        question.line: trained.shares(
            fields.Question(question.line, question.question, question.relevant)
        )
        for question in questions
    }
    return {line: how for line, how in shared.items() if how}
