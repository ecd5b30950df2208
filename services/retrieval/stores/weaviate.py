"""The store for a cluster: Weaviate. https://docs.weaviate.io

All documents are in one collection, the passages of each embedder in another, each corpus in a
Weaviate tenant of its own inside them. A placement record tells the embedder of a corpus, and in
which properties its metadata are: all corpora share the same few, since each bears those of all.
"""

import asyncio
import functools
import json
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence, Set
from contextlib import asynccontextmanager
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from weaviate import WeaviateAsyncClient
from weaviate.classes.data import DataObject
from weaviate.classes.query import Filter as Where
from weaviate.classes.query import MetadataQuery, Sort
from weaviate.classes.tenants import Tenant
from weaviate.collections import CollectionAsync
from weaviate.collections.classes.filters import _Filters
from weaviate.exceptions import WeaviateBaseError

from services.retrieval.stores import rows
from services.retrieval.stores.store import (
    NO_FILTER,
    CorpusKey,
    Document,
    Filter,
    Hit,
    Kind,
    Passage,
)
from services.retrieval.stores.weaviate_connection import (
    TenantAbsent,
    WeaviateConnection,
    translated,
)
from services.retrieval.stores.weaviate_schema import (
    DOCUMENTS,
    RECORDS,
    Placement,
    comparable,
    ensure_collections,
    ensure_metadata,
    ensure_passages,
    other_than,
    passages_collection,
    stems,
    stored,
    where,
)
from services.runtime.errors import NotFound

Collection = CollectionAsync[Any, Any]
P = ParamSpec("P")
T = TypeVar("T")
Method = Callable[Concatenate["WeaviateStore", CorpusKey, P], Coroutine[Any, Any, T]]

NAMESPACE = uuid.UUID("c1d8e1b5-0a52-4bb1-9c8b-6f0f5a4e7d21")
OBJECTS_AT_ONCE = 100  # the client packs them on the event loop
BYTES_AT_ONCE = 8_000_000  # of texts; the server takes 100 MB
DOCUMENTS_AT_ONCE = 50
PLACEMENT = TypeAdapter(Placement)


def _where_there_is_a_tenant(nothing: Callable[[], Any]) -> Callable[[Method[P, T]], Method[P, T]]:
    """Decorate a method about a corpus: where there is none, `nothing` says what happens."""

    def decorated(method: Method[P, T]) -> Method[P, T]:
        @functools.wraps(method)
        async def run(
            self: "WeaviateStore", key: CorpusKey, /, *args: P.args, **kwargs: P.kwargs
        ) -> T:
            try:
                return await method(self, key, *args, **kwargs)
            except TenantAbsent:
                if self._placements.pop(key, None) is None:
                    return cast(T, nothing())
            return await run(self, key, *args, **kwargs)  # it may be placed elsewhere by now

        return run

    return decorated


def _refuse() -> None:
    raise NotFound("CORPUS_NOT_FOUND", "the corpus does not exist")


class WeaviateStore:
    """Use as `async with WeaviateStore.open(...) as store`."""

    def __init__(self) -> None:
        self._connection: WeaviateConnection
        self._placements: dict[CorpusKey, Placement] = {}
        self._placing = asyncio.Lock()

    @classmethod
    @asynccontextmanager
    async def open(cls, http_address: str, grpc_address: str, api_key: str) -> AsyncIterator[Self]:
        """Use the server whose REST and gRPC APIs are at these addresses, HOST:PORT. While it is
        away every call raises Unavailable (STORE_UNAVAILABLE) at once."""
        store = cls()
        async with WeaviateConnection.open(
            http_address, grpc_address, api_key, store._prepare
        ) as store._connection:
            yield store

    async def _prepare(self, client: WeaviateAsyncClient) -> None:
        self._placements.clear()
        await ensure_collections(client)

    async def put_record(self, kind: Kind, key: CorpusKey, value: str) -> None:
        await self._put_record(kind, key, value)

    async def _put_record(self, kind: str, key: CorpusKey, value: str) -> None:
        properties = dict(
            kind=kind,
            tenant=comparable(key.tenant),
            name=comparable(key.name),
            record=json.dumps([key.tenant, key.name, value]),
        )
        async with self._connection.writing() as client:
            row = DataObject(uuid=_id(kind, key), properties=properties)
            await _insert(client.collections.use(RECORDS), [row])

    async def get_record(self, kind: Kind, key: CorpusKey) -> str | None:
        async with self._connection.reading() as client:
            return await self._get_record(client, kind, key)

    async def _get_record(
        self, client: WeaviateAsyncClient, kind: str, key: CorpusKey
    ) -> str | None:
        found = await client.collections.use(RECORDS).query.fetch_object_by_id(
            _id(kind, key), return_properties=["record"]
        )
        if found is None:
            return None
        tenant, name, value = json.loads(str(found.properties["record"]))
        _check((tenant, name) == (key.tenant, key.name))
        return str(value)

    async def list_records(
        self, kind: Kind, tenant: str, after: str, limit: int
    ) -> list[tuple[str, str]]:
        conditions = [
            Where.by_property("kind").equal(kind),
            Where.by_property("tenant").equal(comparable(tenant)),
            Where.by_property("name").greater_than(comparable(after)),
        ]
        async with self._connection.reading() as client:
            found = await client.collections.use(RECORDS).query.fetch_objects(
                filters=Where.all_of(conditions),
                sort=Sort.by_property("name"),
                limit=limit,
                return_properties=["record"],
            )
        records = [json.loads(str(row.properties["record"])) for row in found.objects]
        _check(all(record[0] == tenant for record in records))
        return [(name, value) for _, name, value in records]

    async def delete_record(self, kind: Kind, key: CorpusKey) -> None:
        await self._delete_record(kind, key)

    async def _delete_record(self, kind: str, key: CorpusKey) -> None:
        async with self._connection.writing() as client:
            await client.collections.use(RECORDS).data.delete_by_id(_id(kind, key))

    async def create_corpus(self, key: CorpusKey, embedder: str, dimension: int) -> None:
        async with self._placing:
            async with self._connection.writing() as client:
                placement = await self._get_placement(client, key) or Placement(embedder)
                await ensure_passages(client, placement.embedder)
                for name in (passages_collection(placement.embedder), DOCUMENTS):
                    await client.collections.use(name).tenants.create(Tenant(name=key.digest))
            await self._put_placement(key, placement)

    @_where_there_is_a_tenant(lambda: None)
    async def drop_corpus(self, key: CorpusKey) -> None:
        async with self._placing:
            async with self._connection.writing() as client:
                placement = await self._get_placement(client, key)
                if placement is None:
                    return
                for name in (passages_collection(placement.embedder), DOCUMENTS):
                    await client.collections.use(name).tenants.remove(key.digest)
            await self._delete_record("placement", key)  # last: what went wrong is done again
            self._placements.pop(key, None)

    @_where_there_is_a_tenant(_refuse)
    async def add_columns(self, key: CorpusKey, columns: Set[str]) -> None:
        placement = self._placements.get(key)
        if placement and columns <= placement.properties.keys():
            return
        async with self._placing:
            async with self._connection.writing() as client:
                placement = await self._placed(client, key, columns)
                missing = rows.missing(placement.properties.keys(), columns)
                if not missing:
                    return
                placement = placement.with_columns(missing)
                collection = _of(client, passages_collection(placement.embedder), key)
                await ensure_metadata(collection, placement.properties.values())
            await self._put_placement(key, placement)

    @_where_there_is_a_tenant(_refuse)
    async def put_passages(
        self, key: CorpusKey, passages: Sequence[Passage], vectors: NDArray[np.float32]
    ) -> None:
        columns = rows.columns(passage.metadata for passage in passages)
        await self.add_columns(key, columns)
        async with self._connection.writing() as client:
            placement = await self._placed(client, key, columns)
            collection = _of(client, passages_collection(placement.embedder), key)
        objects = await asyncio.to_thread(
            _passage_objects, key, passages, vectors, placement.properties
        )
        await self._insert_all(collection, objects)

    @_where_there_is_a_tenant(_refuse)
    async def put_documents(
        self, key: CorpusKey, documents: Sequence[tuple[Document, str]]
    ) -> None:
        latest = {document.id: (document, text) for document, text in documents}
        objects = [
            DataObject(
                uuid=_id("document", key, document.id),
                properties=dict(
                    key=comparable(document.id),
                    document=_owned(key, rows.document_to_json(document)),
                    text=text,
                ),
            )
            for document, text in latest.values()
        ]
        async with self._connection.writing() as client:
            collection = _of(client, DOCUMENTS, key)
        await self._insert_all(collection, objects)

    @_where_there_is_a_tenant(dict)
    async def get_versions(self, key: CorpusKey, ids: Sequence[str]) -> dict[str, tuple[str, str]]:
        if not ids:
            return {}
        async with self._connection.reading() as client:
            found = await _of(client, DOCUMENTS, key).query.fetch_objects_by_ids(
                [_id("document", key, id) for id in ids],
                limit=len(ids),
                return_properties=["document"],
            )
        documents = [_document(key, row.properties) for row in found.objects]
        return {document.id: (document.version, document.content_hash) for document in documents}

    @_where_there_is_a_tenant(lambda: None)
    async def get_document(self, key: CorpusKey, id: str) -> tuple[Document, str] | None:
        async with self._connection.reading() as client:
            found = await _of(client, DOCUMENTS, key).query.fetch_object_by_id(
                _id("document", key, id), return_properties=["document", "text"]
            )
        return (_document(key, found.properties), found.properties["text"]) if found else None

    @_where_there_is_a_tenant(list)
    async def list_documents(self, key: CorpusKey, after: str, limit: int) -> list[Document]:
        async with self._connection.reading() as client:
            found = await _of(client, DOCUMENTS, key).query.fetch_objects(
                filters=Where.by_property("key").greater_than(comparable(after)),
                sort=Sort.by_property("key"),
                limit=limit,
                return_properties=["document"],
            )
        return [_document(key, row.properties) for row in found.objects]

    @_where_there_is_a_tenant(int)
    async def count_documents(self, key: CorpusKey) -> int:
        async with self._connection.reading() as client:
            found = await _of(client, DOCUMENTS, key).aggregate.over_all(total_count=True)
        return found.total_count or 0

    @_where_there_is_a_tenant(int)
    async def delete_documents(self, key: CorpusKey, ids: Sequence[str]) -> int:
        if not ids:
            return 0
        uuids = [_id("document", key, id) for id in ids]
        async with self._connection.writing() as client:
            condition = Where.by_id().contains_any(uuids)
            return await _delete(_of(client, DOCUMENTS, key), condition)

    @_where_there_is_a_tenant(lambda: None)
    async def sweep(self, key: CorpusKey, current: Mapping[str, str]) -> None:
        stale = [
            Where.by_property("document").equal(comparable(id))
            & other_than("version", comparable(version))
            for id, version in current.items()
        ]
        for start in range(0, len(stale), DOCUMENTS_AT_ONCE):
            async with self._connection.writing() as client:
                placement = await self._placed(client, key)
                collection = _of(client, passages_collection(placement.embedder), key)
                await _delete(collection, Where.any_of(stale[start : start + DOCUMENTS_AT_ONCE]))

    @_where_there_is_a_tenant(list)
    async def search_vector(
        self, key: CorpusKey, vector: NDArray[np.float32], limit: int, filter: Filter = NO_FILTER
    ) -> list[Hit]:
        async with self._connection.reading() as client:
            columns = {rows.condition_column(condition) for condition in filter.conditions}
            placement = await self._placed(client, key, columns)
            if not columns <= placement.properties.keys():
                return []
            collection = _of(client, passages_collection(placement.embedder), key)
            found = await collection.query.near_vector(
                vector.tolist(),
                limit=limit,
                filters=where(filter, placement.properties),
                return_properties=["passage"],
                return_metadata=MetadataQuery(distance=True),
            )
        return [_hit(key, row, 1.0 - (row.metadata.distance or 0.0)) for row in found.objects]

    @_where_there_is_a_tenant(list)
    async def search_text(
        self, key: CorpusKey, text: str, limit: int, filter: Filter = NO_FILTER
    ) -> list[Hit]:
        [query] = stems([text])
        if not query:
            return []
        async with self._connection.reading() as client:
            columns = {rows.condition_column(condition) for condition in filter.conditions}
            placement = await self._placed(client, key, columns)
            if not columns <= placement.properties.keys():
                return []
            collection = _of(client, passages_collection(placement.embedder), key)
            found = await collection.query.bm25(
                query,
                query_properties=["stems"],
                limit=limit,
                filters=where(filter, placement.properties),
                return_properties=["passage"],
                return_metadata=MetadataQuery(score=True),
            )
        return [_hit(key, row, row.metadata.score or 0.0) for row in found.objects]

    async def _placed(
        self, client: WeaviateAsyncClient, key: CorpusKey, columns: Set[str] = frozenset()
    ) -> Placement:
        """Return where a corpus is, as of now if what is known has not all of these columns. Raises
        TenantAbsent if there is no such corpus."""
        placement = self._placements.get(key)
        if placement is None or not columns <= placement.properties.keys():
            placement = await self._get_placement(client, key)
            if placement is None:
                raise TenantAbsent
            self._placements[key] = placement
        return placement

    async def _get_placement(self, client: WeaviateAsyncClient, key: CorpusKey) -> Placement | None:
        record = await self._get_record(client, "placement", key)
        return PLACEMENT.validate_json(record) if record else None

    async def _put_placement(self, key: CorpusKey, placement: Placement) -> None:
        await self._put_record("placement", key, PLACEMENT.dump_json(placement).decode())
        self._placements[key] = placement

    async def _insert_all(
        self, collection: Collection, objects: Sequence[DataObject[Any, Any]]
    ) -> None:
        batch: list[DataObject[Any, Any]] = []
        size = 0
        for one in objects:
            batch.append(one)
            size += sum(len(value) for value in one.properties.values() if isinstance(value, str))
            if len(batch) == OBJECTS_AT_ONCE or size >= BYTES_AT_ONCE or one is objects[-1]:
                async with self._connection.writing():
                    await _insert(collection, batch)
                batch, size = [], 0


def _of(client: WeaviateAsyncClient, name: str, key: CorpusKey) -> Collection:
    return client.collections.use(name).with_tenant(key.digest)


def _id(kind: str, key: CorpusKey, id: str = "") -> uuid.UUID:
    return uuid.uuid5(NAMESPACE, json.dumps([kind, key.tenant, key.name, id]))


def _owned(key: CorpusKey, text: str) -> str:
    return key.digest + text


def _of_owner(key: CorpusKey, text: str) -> str:
    _check(text.startswith(key.digest))
    return text[len(key.digest) :]


def _check(own: bool) -> None:
    if not own:  # never to happen: Weaviate keeps tenants apart
        raise RuntimeError("the store answered with what belongs to another corpus")


def _document(key: CorpusKey, properties: Mapping[str, Any]) -> Document:
    return rows.document_from_json(_of_owner(key, properties["document"]))


def _hit(key: CorpusKey, row: Any, score: float) -> Hit:
    return Hit(rows.passage_from_json(_of_owner(key, row.properties["passage"])), score)


def _passage_objects(
    key: CorpusKey,
    passages: Sequence[Passage],
    vectors: NDArray[np.float32],
    properties: Mapping[str, str],
) -> list[DataObject[Any, Any]]:
    stemmed = stems([rows.words(passage) for passage in passages])
    return [
        DataObject(
            uuid=_id("passage", key, passage.id),
            vector=vector,
            properties={
                "document": comparable(passage.document_id),
                "version": comparable(passage.document_version),
                "stems": words,
                "passage": _owned(key, rows.passage_to_json(passage)),
            }
            | {
                properties[rows.column(name, value)]: stored(value)
                for name, value in passage.metadata.items()
            },
        )
        for passage, words, vector in zip(passages, stemmed, vectors.tolist(), strict=True)
    ]


async def _insert(collection: Collection, objects: Sequence[DataObject[Any, Any]]) -> None:
    """Create or replace objects. Raises what `translated` makes of the first that failed."""
    result = await collection.data.insert_many(objects)
    for error in result.errors.values():
        raise translated(WeaviateBaseError(error.message))


async def _delete(collection: Collection, condition: _Filters) -> int:
    """Delete objects; return how many. One call of Weaviate deletes at most 10,000."""
    deleted = 0
    while True:
        result = await collection.data.delete_many(condition)
        if result.failed:  # it does not say why, but the shard may
            states = [shard.status for shard in await collection.config.get_shards()]
            raise translated(WeaviateBaseError(f"a delete failed, the shard is {states}"))
        deleted += result.successful
        if not result.successful:
            return deleted
