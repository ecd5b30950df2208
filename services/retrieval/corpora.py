"""Corpora and their policies, kept as records of the store."""

import asyncio
import json
import re
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from pydantic import TypeAdapter

from services.retrieval.embedder import Embedder, Identity
from services.retrieval.stores.store import CorpusKey, Store
from services.runtime.errors import AlreadyExists, Conflict, InvalidInput, NotFound, NotReady

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
CHUNK_TOKENS = 200
CHUNK_TOKENS_LEAST = 16
HEADROOM = 2  # special tokens that the embedder adds to every text


@dataclass(frozen=True)
class Corpus:
    """A corpus without its documents."""

    name: str
    embedder: Identity
    chunk_tokens: int
    created: datetime


@dataclass(frozen=True)
class TypePath:
    """The path that AUTO takes for one type of question."""

    type: str
    path: int
    adapter: str


@dataclass(frozen=True)
class Policy:
    """The path that AUTO takes for a corpus. `path` is a number of the enum Path, `router` a Router
    message in base64, which nobody here looks into; empty without `types`."""

    corpus: str
    path: int
    adapter: str
    comparison: str
    author: str
    updated: datetime
    etag: str = ""
    types: tuple[TypePath, ...] = ()
    router: str = ""


# Fields that a newer version has written into a record are passed over.
CORPUS, POLICY = TypeAdapter(Corpus), TypeAdapter(Policy)


class Corpora:
    """Creates, finds and deletes corpora, at most `most` of a tenant, and says when one changes."""

    def __init__(self, store: Store, embedder: Embedder, most: int) -> None:
        self._store = store
        self._embedder = embedder
        self._most = most
        self._creating = asyncio.Lock()

    async def create(self, key: CorpusKey, chunk_tokens: int | None, allow_existing: bool) -> None:
        """Create a corpus for the embedder that runs now. Raises AlreadyExists (CORPUS_EXISTS),
        NotReady (TOO_MANY_CORPORA)."""
        if not NAME.fullmatch(key.name):
            raise InvalidInput(
                "CORPUS_NAME_INVALID",
                "a corpus name is 1 to 64 of a-z, 0-9, '.', '_' and '-', and begins with a letter"
                " or a digit",
            )
        async with self._creating:
            if await self._store.get_record("corpus", key) is not None:
                if allow_existing:
                    return
                raise AlreadyExists("CORPUS_EXISTS", f"there is a corpus {key.name!r} already")
            there = await self._store.list_records("corpus", key.tenant, "", self._most)
            if len(there) == self._most:
                raise NotReady(
                    "TOO_MANY_CORPORA",
                    f"there may be {self._most:,} corpora; delete one that is not needed",
                )
            model = await self._embedder.identity()
            most = model.max_tokens - HEADROOM
            tokens = min(CHUNK_TOKENS, most) if chunk_tokens is None else chunk_tokens
            if not CHUNK_TOKENS_LEAST <= tokens <= most:
                raise InvalidInput(
                    "CHUNK_TOKENS_OUT_OF_RANGE",
                    f"chunk_tokens is from {CHUNK_TOKENS_LEAST} to {most} for this embedder",
                )
            # What a delete that was cut short may have left.
            await self._store.delete_record("policy", key)
            await self._store.drop_corpus(key)
            await self._store.create_corpus(key, model.hash, model.dimension)
            corpus = Corpus(key.name, model, tokens, datetime.now(UTC))
            await self._store.put_record("version", key, uuid.uuid4().hex)
            await self._store.put_record("corpus", key, _to_json(corpus))

    async def get(self, key: CorpusKey) -> Corpus:
        """Return a corpus. Raises NotFound (CORPUS_NOT_FOUND)."""
        record = await self._store.get_record("corpus", key)
        if record is None:
            raise NotFound("CORPUS_NOT_FOUND", f"there is no corpus {key.name!r}")
        return _corpus(record)

    async def list_all(self, tenant: str, after: str, limit: int) -> list[Corpus]:
        """Return the tenant's corpora by name, from behind `after`."""
        records = await self._store.list_records("corpus", tenant, after, limit)
        return [_corpus(value) for _, value in records]

    async def delete(self, key: CorpusKey) -> None:
        """Delete a corpus: it is hidden first, so that nobody meets half of it."""
        await self.get(key)
        await self._store.delete_record("corpus", key)
        await self._store.delete_record("policy", key)
        await self._store.drop_corpus(key)
        await self._store.delete_record("version", key)

    async def version(self, key: CorpusKey) -> str:
        """Return the opaque token of the corpus's state."""
        return await self._store.get_record("version", key) or ""

    @asynccontextmanager
    async def changing(self, key: CorpusKey) -> AsyncIterator[None]:
        """Give the corpus a new version before and after the block: whoever reads the corpus with
        either version, and wherever a crash falls, no version names two states for good."""
        await self._store.put_record("version", key, uuid.uuid4().hex)
        yield
        await self._store.put_record("version", key, uuid.uuid4().hex)

    async def get_policy(self, key: CorpusKey) -> Policy:
        """Return a corpus's policy. Raises NotFound (CORPUS_NOT_FOUND, POLICY_NOT_FOUND)."""
        await self.get(key)
        record = await self._store.get_record("policy", key)
        if record is None:
            raise NotFound("POLICY_NOT_FOUND", f"the corpus {key.name!r} has no policy")
        return _policy(record)

    async def set_policy(self, key: CorpusKey, policy: Policy, etag: str) -> Policy:
        """Set a corpus's policy. Raises Conflict (ETAG_MISMATCH) if another stands than `etag`
        names; an empty one overwrites."""
        await self.get(key)
        record = await self._store.get_record("policy", key)
        if etag and (record is None or _policy(record).etag != etag):
            raise Conflict("ETAG_MISMATCH", "the policy has changed since it was read")
        policy = replace(policy, updated=datetime.now(UTC), etag=uuid.uuid4().hex)
        await self._store.put_record("policy", key, _to_json(policy))
        return policy

    async def list_policies(self, tenant: str, after: str, limit: int) -> list[Policy]:
        """Return the tenant's policies by corpus name, from behind `after`."""
        records = await self._store.list_records("policy", tenant, after, limit)
        return [_policy(value) for _, value in records]


def _to_json(value: Corpus | Policy) -> str:
    return json.dumps(asdict(value), default=datetime.isoformat)


def _corpus(record: str) -> Corpus:
    return CORPUS.validate_json(record)


def _policy(record: str) -> Policy:
    return POLICY.validate_json(record)
