"""The embedding service, as retrieval sees it."""

import asyncio
import gzip
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tworoads.v1 import embedding_pb2 as pb
from tworoads.v1.embedding_pb2_grpc import EmbeddingServiceStub

from services.runtime.call import outgoing
from services.runtime.errors import NotReady, Overloaded, TooLate, downstream

BATCH = 64  # texts of one call
BATCHES = 8  # calls for passages at once: enough to keep the model busy, whoever ingests
FULL_TRIES = 60  # when the embedding service is full or slow, an ingest waits
QUERY_SECONDS = 5.0
PASSAGES_SECONDS = 300.0


@dataclass(frozen=True)
class Identity:
    """Which model made the vectors of a corpus. `hash` decides; the rest describes."""

    name: str
    hash: str
    dimension: int
    max_tokens: int
    normalized: bool


class Embedder:
    """Embeds questions and passages; `stub` calls the embedding service."""

    def __init__(self, stub: EmbeddingServiceStub) -> None:
        self._stub = stub
        self._tokenizers: dict[str, Tokenizer] = {}
        self._batches = asyncio.Semaphore(BATCHES)

    async def identity(self) -> Identity:
        """Return which model the service runs now."""
        with downstream("embedding"):
            response = await self._stub.GetModel(
                pb.EmbeddingServiceGetModelRequest(), **outgoing(QUERY_SECONDS)
            )
        return _identity(response.model)

    async def tokenizer(self, model_hash: str) -> Tokenizer:
        """Return the tokenizer of a model, to count tokens with. Raises NotReady if another
        runs."""
        if model_hash not in self._tokenizers:
            with downstream("embedding"):
                response = await self._stub.GetModel(
                    pb.EmbeddingServiceGetModelRequest(include_tokenizer=True), **outgoing()
                )
            _check(response.model.hash, model_hash)
            text = await asyncio.to_thread(gzip.decompress, response.tokenizer)
            tokenizer = await asyncio.to_thread(Tokenizer.from_str, text.decode())
            tokenizer.no_truncation()
            tokenizer.no_padding()
            self._tokenizers[model_hash] = tokenizer
        return self._tokenizers[model_hash]

    async def query(self, text: str, model_hash: str) -> NDArray[np.float32]:
        """Return the vector of a question, shape (dimension,). Raises NotReady
        (EMBEDDER_MISMATCH)."""
        vectors, made_by = await self._embed([text], pb.EMBED_KIND_QUERY, QUERY_SECONDS)
        _check(made_by, model_hash)
        vector: NDArray[np.float32] = vectors[0]
        return vector

    async def documents(self, texts: Sequence[str], model_hash: str) -> NDArray[np.float32]:
        """Return the vectors of passages, shape (texts, dimension). Raises NotReady
        (EMBEDDER_MISMATCH)."""
        batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
        parts = []
        for batch in batches:
            async with self._batches:
                vectors, made_by = await self._patiently(batch)
            _check(made_by, model_hash)
            parts.append(vectors)
        return np.concatenate(parts)

    async def _patiently(self, batch: Sequence[str]) -> tuple[NDArray[np.float32], str]:
        for _ in range(FULL_TRIES):
            try:
                return await self._embed(batch, pb.EMBED_KIND_DOCUMENT, PASSAGES_SECONDS)
            except (Overloaded, TooLate) as error:
                await asyncio.sleep(error.retry_after or 0)
        return await self._embed(batch, pb.EMBED_KIND_DOCUMENT, PASSAGES_SECONDS)

    async def _embed(
        self, texts: Sequence[str], kind: pb.EmbedKind.ValueType, at_most: float | None
    ) -> tuple[NDArray[np.float32], str]:
        with downstream("embedding"):
            response = await self._stub.Embed(
                pb.EmbedRequest(texts=texts, kind=kind), **outgoing(at_most)
            )
        vectors = np.array([vector.values for vector in response.vectors], np.float32)
        return vectors, response.model_hash


def _identity(model: pb.EmbeddingModel) -> Identity:
    return Identity(
        model.name, model.hash, model.dimension, model.max_tokens, bool(model.normalized)
    )


def _check(made_by: str, model_hash: str) -> None:
    if made_by != model_hash:
        raise NotReady(
            "EMBEDDER_MISMATCH",
            "the corpus was made with another embedding model than the one that runs now;"
            " run that model, or ingest the documents into a new corpus",
        )
