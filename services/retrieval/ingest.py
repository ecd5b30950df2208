"""Ingest: documents of one stream are parsed, chunked, embedded and committed, many at a time.

What waits is committed together, passages before the documents' rows that make them current. So a
crash leaves at most passages that nobody sees; sending the document again heals it.
"""

import asyncio
import hashlib
import json
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Counter
from tokenizers import Tokenizer

from services.retrieval.chunking import chunk
from services.retrieval.corpora import HEADROOM, Corpora, Corpus
from services.retrieval.embedder import Embedder
from services.retrieval.parser import Parser
from services.retrieval.sharing import Share, Sharing
from services.retrieval.stores import rows
from services.retrieval.stores.store import (
    CorpusKey,
    Document,
    MetadataValue,
    Passage,
    Store,
)
from services.runtime.errors import InvalidInput

AT_ONCE = 64  # documents between arrival and commit
LOOKED_UP = 256  # documents that are compared with the store in one call
COMMITTED = 2048  # passages of one commit, more only for a document that has more
TITLE_CHARS = 200
TEXT_BYTES = 4  # that a character takes of room

DOCUMENTS = Counter("tworoads_documents_ingested", "Documents that were ingested.", ["outcome"])
PASSAGES = Counter("tworoads_passages_indexed", "Passages that were indexed.")

Outcome = Literal["INDEXED", "UNCHANGED", "FAILED"]
T = TypeVar("T")


@dataclass(frozen=True)
class Incoming:
    """A document as it was sent, checked; `size` is that of its header and content, in bytes,
    `error` says why it cannot be indexed."""

    id: str
    title: str = ""
    uri: str = ""
    media_type: str = ""
    metadata: dict[str, MetadataValue] = field(default_factory=dict)
    content: bytes = b""
    size: int = 0
    error: InvalidInput | None = None

    def content_hash(self) -> str:
        """Return SHA-256 over all that decides what is indexed, in hexadecimal."""
        typed = {rows.column(key, value): value for key, value in self.metadata.items()}
        fields = [self.title, self.uri, self.media_type, sorted(typed.items())]
        digest = hashlib.sha256(json.dumps(fields, default=datetime.isoformat).encode())
        digest.update(self.content)
        return digest.hexdigest()


@dataclass(frozen=True)
class Result:
    """What became of a document."""

    id: str
    outcome: Outcome
    reason: str = ""
    message: str = ""
    passages: int = 0


@dataclass
class Progress:
    """How far a stream has come."""

    received: int = 0
    finished: int = 0
    passages: int = 0


@dataclass(frozen=True)
class _Prepared:
    document: Document
    text: str
    passages: list[Passage]
    vectors: NDArray[np.float32]


@dataclass
class _OnTheWay:
    """A document between arrival and commit: its size, and what its text takes of room."""

    size: int
    text: int = 0
    left: asyncio.Event = field(default_factory=asyncio.Event)


class Ingest:
    """Indexes the documents of one stream: `put` each, `finish`, and meanwhile read `results`.
    `close` it when it has ended, however it did."""

    def __init__(
        self,
        key: CorpusKey,
        corpus: Corpus,
        tokenizer: Tokenizer,
        store: Store,
        corpora: Corpora,
        embedder: Embedder,
        parser: Parser,
        committing: asyncio.Lock,
        sharing: Sharing,
    ) -> None:
        self.progress = Progress()
        self.results: asyncio.Queue[Result | None] = asyncio.Queue()
        self._key = key
        self._corpus = corpus
        self._tokenizer = tokenizer
        self._store = store
        self._corpora = corpora
        self._embedder = embedder
        self._parser = parser
        self._committing = committing
        self._arrived: asyncio.Queue[Incoming | None] = asyncio.Queue(LOOKED_UP)
        self._prepared: asyncio.Queue[_Prepared | None] = asyncio.Queue(AT_ONCE)
        self._places = asyncio.Semaphore(AT_ONCE)
        self._contents = Share(sharing.contents, key.tenant)
        self._texts = Share(sharing.texts, key.tenant)
        self._turns = sharing.turns(key.tenant)
        self._started: set[str] = set()
        self._on_the_way: dict[str, _OnTheWay] = {}

    async def put(self, document: Incoming) -> None:
        """Take a document; waits while too many are on their way."""
        await self._contents.take(document.size)
        self.progress.received += 1
        await self._arrived.put(document)

    async def finish(self) -> None:
        """Say that no document follows."""
        await self._arrived.put(None)

    def close(self) -> None:
        """Give back the room of what never came to its end."""
        self._contents.close()
        self._texts.close()

    async def run(self) -> None:
        """Work until every document has its result; None ends `results`."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._prepare_all())
            tasks.create_task(self._commit_all())
        await self.results.put(None)

    async def _prepare_all(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            more = True
            while more:
                batch, more = await _waiting(self._arrived, LOOKED_UP)
                for document, content_hash, stored in await self._look_up(batch):
                    if document.error:
                        self._failed(document, document.error)
                        continue
                    if document.id in self._started:  # twice in this stream: one by one
                        stored = await self._stored_now(document.id)
                    self._started.add(document.id)
                    if stored == content_hash:
                        self._finished(Result(document.id, "UNCHANGED"), document.size)
                    else:
                        await self._places.acquire()
                        self._on_the_way[document.id] = _OnTheWay(document.size)
                        tasks.create_task(self._prepare(document, content_hash))
        await self._prepared.put(None)

    async def _look_up(self, batch: list[Incoming]) -> list[tuple[Incoming, str, str]]:
        """Return each document with its hash and with the one that the store has of it. What a
        crash may have left of other versions of the unchanged ones is swept."""
        hashes = await asyncio.to_thread(lambda: [document.content_hash() for document in batch])
        ids = [document.id for document in batch if not document.error]
        known = await self._store.get_versions(self._key, ids) if ids else {}
        looked_up = [
            (document, content_hash, known.get(document.id, ("", ""))[1])
            for document, content_hash in zip(batch, hashes, strict=True)
        ]
        unchanged = [document.id for document, own, stored in looked_up if stored == own]
        if unchanged:
            async with self._committing:  # another stream may have committed newer ones meanwhile
                now = await self._store.get_versions(self._key, unchanged)
                current = {id: version for id, (version, _) in now.items()}
                await self._store.sweep(self._key, current)
        return looked_up

    async def _stored_now(self, id: str) -> str:
        """Return the stored hash of a document once none of that id is on the way."""
        if id in self._on_the_way:
            await self._on_the_way[id].left.wait()
        known = await self._store.get_versions(self._key, [id])
        return known.get(id, ("", ""))[1]

    async def _prepare(self, document: Incoming, content_hash: str) -> None:
        try:
            await self._prepared.put(await self._parse_and_embed(document, content_hash))
        except InvalidInput as error:
            self._leave(document.id)
            self._failed(document, error)

    async def _parse_and_embed(self, document: Incoming, content_hash: str) -> _Prepared:
        async with self._turns:
            parsed = await self._parser.parse(document.content, document.media_type)
            await self._texts.take(TEXT_BYTES * len(parsed.text))
            self._on_the_way[document.id].text = TEXT_BYTES * len(parsed.text)
        await self._store.add_columns(self._key, rows.columns([document.metadata]))
        chunks = await asyncio.to_thread(chunk, parsed, self._tokenizer, self._corpus.chunk_tokens)
        version = uuid.uuid4().hex
        title = (document.title or parsed.title or document.id)[:TITLE_CHARS]
        passages = [
            Passage(
                id=f"{version}.{index}",
                document_id=document.id,
                document_version=version,
                title=title,
                uri=document.uri,
                start=piece.start,
                end=piece.end,
                text=parsed.text[piece.start : piece.end],
                page=piece.page,
                heading_path=piece.heading_path,
                metadata=document.metadata,
            )
            for index, piece in enumerate(chunks)
        ]
        texts = await asyncio.to_thread(self._embedded_texts, passages)
        vectors = await self._embedder.documents(texts, self._corpus.embedder.hash)
        self.progress.passages += len(passages)
        row = Document(
            id=document.id,
            title=title,
            uri=document.uri,
            media_type=document.media_type,
            metadata=document.metadata,
            content_hash=content_hash,
            version=version,
            length=len(parsed.text),
            passages=len(passages),
            updated=datetime.now(UTC),
        )
        return _Prepared(row, parsed.text, passages, vectors)

    def _embedded_texts(self, passages: list[Passage]) -> list[str]:
        """Return what is embedded for each passage: its text, behind as much of its headings as the
        embedder then still takes."""
        room = self._corpus.embedder.max_tokens - HEADROOM - self._corpus.chunk_tokens
        texts = []
        for passage in passages:
            headings = " > ".join((passage.title, *passage.heading_path))
            ends = self._tokenizer.encode(headings, add_special_tokens=False).offsets
            if len(ends) > room:
                headings = headings[: ends[room - 1][1]] if room else ""
            texts.append(f"{headings}\n{passage.text}".lstrip())
        return texts

    async def _commit_all(self) -> None:
        more = True
        while more:
            waiting, more = await _waiting(self._prepared, AT_ONCE)
            group: list[_Prepared] = []
            passages = 0
            for prepared in waiting:
                if group and passages + len(prepared.passages) > COMMITTED:
                    await self._commit(group)
                    group, passages = [], 0
                group.append(prepared)
                passages += len(prepared.passages)
            if group:
                await self._commit(group)

    async def _commit(self, group: list[_Prepared]) -> None:
        passages = [passage for prepared in group for passage in prepared.passages]
        vectors = np.concatenate([prepared.vectors for prepared in group])
        current = {prepared.document.id: prepared.document.version for prepared in group}
        async with self._committing, self._corpora.changing(self._key):
            await self._store.put_passages(self._key, passages, vectors)
            await self._store.put_documents(self._key, [(p.document, p.text) for p in group])
            await self._store.sweep(self._key, current)
        for prepared in group:
            document = prepared.document
            size = self._leave(document.id)
            self._finished(Result(document.id, "INDEXED", passages=document.passages), size)

    def _leave(self, id: str) -> int:
        gone = self._on_the_way.pop(id)
        self._texts.give(gone.text)
        self._places.release()
        gone.left.set()
        return gone.size

    def _failed(self, document: Incoming, error: InvalidInput) -> None:
        result = Result(document.id, "FAILED", error.reason, str(error))
        self._finished(result, document.size)

    def _finished(self, result: Result, size: int) -> None:
        self._contents.give(size)
        self.progress.finished += 1
        DOCUMENTS.labels(result.outcome.lower()).inc()
        PASSAGES.inc(result.passages)
        self.results.put_nowait(result)


async def _waiting(queue: asyncio.Queue[T | None], most: int) -> tuple[list[T], bool]:
    """Return what waits in the queue, at least one and at most `most`, and False at its end."""
    items: list[T] = []
    item = await queue.get()
    while item is not None:
        items.append(item)
        if queue.empty() or len(items) == most:
            return items, True
        item = queue.get_nowait()
    return items, False
