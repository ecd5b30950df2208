"""Search: vector and text ranks, fused, of passages that are current."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from prometheus_client import Histogram

from services.retrieval.corpora import Corpora
from services.retrieval.embedder import Embedder
from services.retrieval.stores.store import CorpusKey, Filter, Hit, Store
from services.runtime.errors import Overloaded, TooLate, Unavailable

FOUND = Histogram(
    "tworoads_passages_found", "Passages that a search found.", buckets=(0, 1, 3, 5, 10, 20, 50)
)
EMBEDDING = Histogram("tworoads_search_embed_seconds", "Time to embed a query, in seconds.")
STORE = Histogram("tworoads_search_store_seconds", "Time of a search in the store, in seconds.")

Mode = Literal["hybrid", "vector", "text"]

RRF_K = 60  # the constant of Cormack et al., SIGIR 2009
OVERFETCH = 3  # candidates for each passage asked for: room for fusion and for outdated passages
FEWEST = 20
TRIES = 3


@dataclass(frozen=True)
class Found:
    """Passages, best first, and what finding them took, in milliseconds."""

    hits: list[Hit]
    corpus_version: str
    embed_ms: float
    search_ms: float
    degraded: list[str]


class Searcher:
    """Searches corpora of a store."""

    def __init__(self, store: Store, corpora: Corpora, embedder: Embedder) -> None:
        self._store = store
        self._corpora = corpora
        self._embedder = embedder

    async def search(
        self,
        key: CorpusKey,
        query: str,
        mode: Mode,
        limit: int,
        filter: Filter,
        allow_degraded: bool = False,
    ) -> Found:
        """Return the `limit` best passages for `query`.

        The search by words runs while the question is embedded. Raises NotFound
        (CORPUS_NOT_FOUND), NotReady (EMBEDDER_MISMATCH), Unavailable (EMBEDDING_UNAVAILABLE; with
        `allow_degraded` a hybrid search then goes by words alone).
        """
        start = time.perf_counter()
        corpus, version = await asyncio.gather(self._corpora.get(key), self._corpora.version(key))
        embed_ms = 0.0
        degraded: list[str] = []
        wanted = max(FEWEST, limit * OVERFETCH)

        async def by_text(wanted: int) -> list[Hit]:
            return await self._store.search_text(key, query, wanted, filter)

        text = asyncio.create_task(by_text(wanted)) if mode != "vector" else None
        try:
            vector = None
            if mode != "text":
                embedding = time.perf_counter()
                try:
                    vector = await self._embedder.query(query, corpus.embedder.hash)
                except (Unavailable, Overloaded, TooLate):
                    if mode == "vector" or not allow_degraded:
                        raise
                    degraded.append("VECTOR_SEARCH")
                embed_ms = (time.perf_counter() - embedding) * 1e3
            for attempt in range(TRIES):
                ranks: list[list[Hit]] = []
                if vector is not None:
                    ranks.append(await self._store.search_vector(key, vector, wanted, filter))
                if text is not None:
                    ranks.append(await text if attempt == 0 else await by_text(wanted))
                hits = await self._current(key, fuse(ranks) if len(ranks) > 1 else ranks[0])
                if len(hits) >= limit or all(len(rank) < wanted for rank in ranks):
                    break
                wanted *= 4  # outdated passages took the places
        finally:
            if text is not None:
                text.cancel()
        search_ms = (time.perf_counter() - start) * 1e3 - embed_ms
        FOUND.observe(len(hits[:limit]))
        EMBEDDING.observe(embed_ms / 1e3)
        STORE.observe(search_ms / 1e3)
        return Found(hits[:limit], version, embed_ms, search_ms, degraded)

    async def _current(self, key: CorpusKey, hits: list[Hit]) -> list[Hit]:
        """Keep the passages of the versions that the documents have now."""
        ids = list({hit.passage.document_id for hit in hits})
        versions = await self._store.get_versions(key, ids) if ids else {}
        return [
            hit
            for hit in hits
            if versions.get(hit.passage.document_id, ("",))[0] == hit.passage.document_version
        ]


def fuse(ranks: Sequence[Sequence[Hit]]) -> list[Hit]:
    """Return the hits of all lists by the sum of 1 / (60 + rank), ranks counted from 1 (reciprocal
    rank fusion, Cormack et al., SIGIR 2009). That sum becomes their score."""
    scores: dict[str, float] = {}
    found: dict[str, Hit] = {}
    for hits in ranks:
        for rank, hit in enumerate(hits, 1):
            scores[hit.passage.id] = scores.get(hit.passage.id, 0.0) + 1 / (RRF_K + rank)
            found.setdefault(hit.passage.id, hit)
    order = sorted(scores, key=lambda id: -scores[id])
    return [replace(found[id], score=scores[id]) for id in order]
