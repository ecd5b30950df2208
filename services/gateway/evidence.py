"""The passages that an answer may rest on: what is searched, and with which words."""

import asyncio
from dataclasses import dataclass, field
from itertools import zip_longest

from tworoads.v1 import answer_pb2 as pb
from tworoads.v1 import retrieval_pb2
from tworoads.v1.retrieval_pb2 import (
    SEARCH_MODE_HYBRID,
    SEARCH_MODE_TEXT,
    Filter,
    Passage,
    SearchMode,
)
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
    embedder_gone: bool = False


def query_of(request: pb.AnswerRequest) -> str:
    """Return the words to search: the question, and before it the last one asked, which often names
    what the new one only points at."""
    last = [turn.question.strip() for turn in request.history[-1:]]
    return "\n".join([*last, request.question.strip()])[-MOST_QUESTION:]


async def search(
    retrieval: RetrievalServiceStub,
    request: pb.AnswerRequest,
    query: str,
    embedder_gone: bool = False,
) -> Evidence:
    """Return the passages for `query`: of the pinned documents first, then what the search finds.
    With `embedder_gone` by words alone, for the corpus's vectors cannot be searched any more.

    Raises what retrieval raises, Unavailable (RETRIEVAL_UNAVAILABLE) when it is away, NotFound
    (DOCUMENT_NOT_FOUND) for a pinned document that does not exist.
    """
    options = request.options
    pinned = list(dict.fromkeys(options.pinned_documents))
    limit = max(options.limit or DEFAULT_PASSAGES, len(pinned))
    mode = SEARCH_MODE_TEXT if embedder_gone else options.search_mode
    mode_of_pinned = SEARCH_MODE_TEXT if embedder_gone else SEARCH_MODE_HYBRID
    with downstream("retrieval"):
        found, *of_pinned = await asyncio.gather(
            _search(retrieval, request, query, mode, limit, options.filter),
            *(
                # By vector too: a pinned document is shown even if it has no word of the question.
                _search(retrieval, request, query, mode_of_pinned, limit, Filter(document_ids=[id]))
                for id in pinned
            ),
        )
        for id, response in zip(pinned, of_pinned, strict=True):
            if not response.passages:  # this says so if it does not exist
                await retrieval.GetDocument(
                    retrieval_pb2.GetDocumentRequest(corpus=request.corpus, id=id, end=0),
                    **outgoing(SEARCH_SECONDS),
                )
    # The best of each pinned document, then the second best of each ...
    rounds = zip_longest(*(response.passages for response in of_pinned))
    first = [passage for passages in rounds for passage in passages if passage is not None]
    passages = {passage.id: passage for passage in [*first, *found.passages]}
    return Evidence(
        query,
        list(passages.values())[:limit],
        found.corpus_version,
        found.embed_ms,
        found.search_ms,
        ["VECTOR_SEARCH"] if embedder_gone else list(found.degraded),
        embedder_gone,
    )


async def _search(
    retrieval: RetrievalServiceStub,
    request: pb.AnswerRequest,
    query: str,
    mode: SearchMode.ValueType,
    limit: int,
    filter: Filter,
) -> retrieval_pb2.SearchResponse:
    response: retrieval_pb2.SearchResponse = await retrieval.Search(
        retrieval_pb2.SearchRequest(
            corpus=request.corpus,
            query=query,
            mode=mode,
            limit=limit,
            filter=filter,
            allow_degraded=request.options.allow_degraded,
        ),
        **outgoing(SEARCH_SECONDS),
    )
    return response
