"""The passages that an answer may rest on: what is searched, and with which words."""

import asyncio
from dataclasses import dataclass, field

from tworoads.v1 import answer_pb2 as pb
from tworoads.v1 import retrieval_pb2
from tworoads.v1.retrieval_pb2 import Filter, Passage
from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub

from services.gateway.checks import DEFAULT_PASSAGES, MOST_QUESTION
from services.runtime.call import outgoing
from services.runtime.errors import downstream

SEARCH_SECONDS = 10.0


@dataclass(frozen=True)
class Evidence:
    """What a search for `query` found. Times are in milliseconds."""

    query: str = ""
    passages: list[Passage] = field(default_factory=list)
    corpus_version: str = ""
    embed_ms: float = 0.0
    search_ms: float = 0.0
    degraded: list[str] = field(default_factory=list)


def query_of(request: pb.AnswerRequest) -> str:
    """Return the words to search: the question, and before it the last one asked, which often names
    what the new one only points at."""
    last = [turn.question.strip() for turn in request.history[-1:]]
    return "\n".join([*last, request.question.strip()])[-MOST_QUESTION:]


async def search(
    retrieval: RetrievalServiceStub, request: pb.AnswerRequest, query: str
) -> Evidence:
    """Return the passages for `query`: of the pinned documents first, then what the search finds.

    Raises what retrieval raises, Unavailable (RETRIEVAL_UNAVAILABLE) when it is away, NotFound
    (DOCUMENT_NOT_FOUND) for a pinned document that does not exist.
    """
    options = request.options
    limit = options.limit or DEFAULT_PASSAGES
    pinned = list(dict.fromkeys(options.pinned_documents))
    searches = [_search(retrieval, request, query, limit, options.filter)]
    if pinned:
        searches.append(_search(retrieval, request, query, limit, Filter(document_ids=pinned)))
    with downstream("retrieval"):
        found, *first = await asyncio.gather(*searches)
        passages = {passage.id: passage for response in first for passage in response.passages}
        shown = {passage.document_id for passage in passages.values()}
        for id in pinned:
            if id not in shown:  # unless it was only outranked, this says that it does not exist
                await retrieval.GetDocument(
                    retrieval_pb2.GetDocumentRequest(corpus=request.corpus, id=id, end=0),
                    **outgoing(SEARCH_SECONDS),
                )
    passages |= {passage.id: passage for passage in found.passages if passage.id not in passages}
    return Evidence(
        query,
        list(passages.values())[:limit],
        found.corpus_version,
        found.embed_ms,
        found.search_ms,
        list(found.degraded),
    )


async def _search(
    retrieval: RetrievalServiceStub,
    request: pb.AnswerRequest,
    query: str,
    limit: int,
    filter: Filter,
) -> retrieval_pb2.SearchResponse:
    response: retrieval_pb2.SearchResponse = await retrieval.Search(
        retrieval_pb2.SearchRequest(
            corpus=request.corpus,
            query=query,
            mode=request.options.search_mode,
            limit=limit,
            filter=filter,
            allow_degraded=request.options.allow_degraded,
        ),
        **outgoing(SEARCH_SECONDS),
    )
    return response
