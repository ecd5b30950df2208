"""What tuning asks of the retrieval service."""

import asyncio
from collections.abc import Collection, Coroutine, Iterable
from typing import Any, TypeVar

from tworoads.v1 import retrieval_pb2 as pb
from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub

from services.runtime.call import outgoing
from services.runtime.errors import NotFound, downstream

AT_ONCE = 8  # calls
PAGE = 1000
LISTED = 200  # documents that are listed in the time in which one is looked up
CALL_SECONDS = 30.0

T = TypeVar("T")


async def all_of(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return all results, or raise the first error and end the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    return [task.result() for task in tasks]


class Retrieval:
    """The retrieval service, asked a few things at a time. Methods raise what it says, and
    Unavailable (RETRIEVAL_UNAVAILABLE)."""

    def __init__(self, stub: RetrievalServiceStub) -> None:
        self._stub = stub
        self._places = asyncio.Semaphore(AT_ONCE)

    async def documents(self, corpus: str, ids: Collection[str]) -> Collection[str] | None:
        """Return which documents exist, perhaps with others; None if the corpus does not."""
        async with self._places:
            try:
                with downstream("retrieval"):
                    response = await self._stub.GetCorpus(
                        pb.GetCorpusRequest(name=corpus), **outgoing(CALL_SECONDS)
                    )
            except NotFound:
                return None
        if len(ids) * LISTED > response.corpus.documents:
            return await self._list(corpus)
        asked = list(ids)
        exist = await all_of(self._exists(corpus, id) for id in asked)
        return {id for id, exists in zip(asked, exist, strict=True) if exists}

    async def _list(self, corpus: str) -> set[str]:
        found: set[str] = set()
        request = pb.ListDocumentsRequest(corpus=corpus, page_size=PAGE)
        while True:
            async with self._places:
                with downstream("retrieval"):
                    response = await self._stub.ListDocuments(request, **outgoing(CALL_SECONDS))
            found.update(document.id for document in response.documents)
            if not response.next_page_token:
                return found
            request.page_token = response.next_page_token

    async def _exists(self, corpus: str, id: str) -> bool:
        async with self._places:
            try:
                with downstream("retrieval"):
                    await self._stub.GetDocument(
                        pb.GetDocumentRequest(corpus=corpus, id=id, end=0),
                        **outgoing(CALL_SECONDS),
                    )
            except NotFound:
                return False
        return True

    async def search(
        self, corpus: str, query: str, limit: int, document: str = ""
    ) -> list[pb.Passage]:
        """Return the best passages, of one document only if it is named."""
        async with self._places:
            with downstream("retrieval"):
                response = await self._stub.Search(
                    pb.SearchRequest(
                        corpus=corpus,
                        query=query,
                        mode=pb.SEARCH_MODE_HYBRID,
                        limit=limit,
                        filter=pb.Filter(document_ids=[document] if document else []),
                    ),
                    **outgoing(CALL_SECONDS),
                )
        return list(response.passages)
