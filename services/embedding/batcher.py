"""Groups the texts that wait into batches for the model.

There is no timer. While the model is busy the queues fill, and the next batch is what waits, up to
a budget of tokens: an idle service answers at once, a busy one batches fully.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, Self

from prometheus_client import Counter, Gauge, Histogram

from services.runtime.errors import Overloaded

Vector = list[float]

WAITING = Gauge("tworoads_texts_waiting", "Texts that wait for the model.", ["kind"])
TEXTS = Counter("tworoads_texts_embedded", "Texts that the model embedded.", ["kind"])
TOKENS = Histogram(
    "tworoads_batch_tokens",
    "Tokens of a batch, about.",
    ["kind"],
    buckets=(16, 64, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768),
)

QUERY_BATCHES = 4  # in a row, before a batch of waiting documents has its turn
CODE_POINTS = 4  # in a token, about; the exact number is known when the model has read the text


class Kind(StrEnum):
    """What a text is for. The values are the tasks of sentence-transformers."""

    QUERY = "query"
    DOCUMENT = "document"


class Model(Protocol):
    """An embedding model.

    `name` is for people, `hash` the identity: 64 hexadecimal digits. `dimension` is the number of
    components of a vector, `max_tokens` the number of tokens of a text that reach it, `tokenizer`
    a gzip-compressed tokenizer.json without truncation and padding.
    """

    name: str
    hash: str
    dimension: int
    max_tokens: int
    tokenizer: bytes

    def encode(self, kind: Kind, texts: Sequence[str]) -> list[Vector]:
        """Return a vector of unit length per text, in order. Called by one thread at a time."""
        ...


@dataclass(eq=False)
class _Call:
    vectors: list[Vector]
    missing: int
    done: asyncio.Future[list[Vector]]

    def fill(self, index: int, vector: Vector) -> None:
        self.vectors[index] = vector
        self.missing -= 1
        if not self.missing and not self.done.done():
            self.done.set_result(self.vectors)

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


@dataclass
class _Waiting:
    call: _Call
    index: int
    text: str
    tokens: int


class Batcher:
    """Use as `async with Batcher(...) as batcher`, then `await batcher.embed(kind, texts)`.

    Queries go before documents, so that a search does not wait behind a bulk load. `max_tokens` is
    the budget of a batch, `max_texts` how many texts of each kind may be inside.
    """

    def __init__(self, model: Model, max_tokens: int, max_texts: int) -> None:
        self._model = model
        self._max_tokens = max_tokens
        self._max_texts = max_texts
        self._inside = dict.fromkeys(Kind, 0)
        self._queues: dict[Kind, deque[_Waiting]] = {kind: deque() for kind in Kind}
        self._query_batches = 0  # in a row
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "model")

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def waiting(self) -> int:
        """Texts that wait for the model."""
        return sum(map(len, self._queues.values()))

    async def embed(self, kind: Kind, texts: Sequence[str]) -> list[Vector]:
        """Return a vector per text, in order. Raises Overloaded (QUEUE_FULL) at once when full."""
        if self._inside[kind] + len(texts) > self._max_texts:
            raise Overloaded("QUEUE_FULL", "the embedding queue is full; try again later")
        call = _Call([[]] * len(texts), len(texts), asyncio.get_running_loop().create_future())
        queue = self._queues[kind]
        self._inside[kind] += len(texts)
        for index, text in enumerate(texts):
            tokens = min(len(text) // CODE_POINTS + 1, self._model.max_tokens)
            queue.append(_Waiting(call, index, text, tokens))
        WAITING.labels(kind).set(len(queue))
        self._arrived.set()
        try:
            return await call.done
        finally:
            self._inside[kind] -= len(texts)
            if call.missing:  # the caller left, or a batch failed: the model need not see the rest
                rest = [waiting for waiting in queue if waiting.call is not call]
                queue.clear()
                queue.extend(rest)
                WAITING.labels(kind).set(len(queue))

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            kind, batch = self._next_batch()
            if not batch:
                self._arrived.clear()
                continue
            try:
                vectors = await loop.run_in_executor(
                    self._thread, self._model.encode, kind, [waiting.text for waiting in batch]
                )
                for waiting, vector in zip(batch, vectors, strict=True):
                    waiting.call.fill(waiting.index, vector)
            except Exception as error:
                for waiting in batch:
                    waiting.call.fail(error)

    def _next_batch(self) -> tuple[Kind, list[_Waiting]]:
        kinds = [Kind.QUERY, Kind.DOCUMENT]
        if self._query_batches >= QUERY_BATCHES:
            kinds.reverse()
        kind = next((kind for kind in kinds if self._queues[kind]), Kind.QUERY)
        self._query_batches = self._query_batches + 1 if kind is Kind.QUERY else 0
        queue, batch, tokens = self._queues[kind], list[_Waiting](), 0
        while queue and (not batch or tokens + queue[0].tokens <= self._max_tokens):
            batch.append(queue.popleft())
            tokens += batch[-1].tokens
        if batch:
            WAITING.labels(kind).set(len(queue))
            TOKENS.labels(kind).observe(tokens)
            TEXTS.labels(kind).inc(len(batch))
        return kind, batch
