"""The store in this process: LanceDB, a folder of column files. https://lancedb.com

Each corpus has a table of documents and a table of passages. The one of passages is created last
and dropped first: a corpus is there if its passages are.
"""

import asyncio
import fcntl
import functools
import operator
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence, Set
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import lancedb
import numpy as np
import pyarrow as pa
from lancedb import AsyncConnection
from lancedb.expr import Expr, col, lit
from lancedb.index import FTS, BTree
from lancedb.query import AsyncStandardQuery, ColumnOrdering, MatchQuery
from numpy.typing import NDArray

from services.retrieval.stores import rows
from services.retrieval.stores.lancedb_table import Table, translated
from services.retrieval.stores.store import (
    NO_FILTER,
    CorpusKey,
    Document,
    Filter,
    Hit,
    Kind,
    MetadataValue,
    Passage,
)
from services.runtime.errors import NotFound, NotReady

RECORDS = pa.schema(
    [(name, pa.string()) for name in ("id", "kind", "tenant", "name")]
    + [("value", pa.large_string())]
)
DOCUMENTS = pa.schema(
    [(name, pa.string()) for name in ("id", "version", "content_hash")]
    + [(name, pa.large_string()) for name in ("document", "text")]
)
METADATA_TYPES = {"s": pa.string(), "n": pa.float64(), "b": pa.bool_(), "t": pa.int64()}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
PROBES = 32  # parts of the vector index that a search looks into
AT_ONCE = 64  # documents of one delete; LanceDB parses a condition by recursion


def passages_schema(dimension: int) -> pa.Schema:
    """Return the columns of passages without metadata; `vector` has `dimension` components."""
    return pa.schema(
        [(name, pa.string()) for name in ("document_id", "version", "words", "passage")]
        + [("vector", pa.list_(pa.float32(), dimension))]
    )


def all_of(conditions: Iterable[Expr]) -> Expr:
    """Return the condition that holds where all of these, at least one, hold."""
    return functools.reduce(operator.and_, conditions)


def stored(value: MetadataValue) -> str | float | bool:
    """Return a value as its column holds it: times as microseconds since 1970."""
    if isinstance(value, datetime):  # as a time, LanceDB would round it in conditions
        return (value - EPOCH) // timedelta(microseconds=1)
    return value


def predicate(filter: Filter) -> Expr | None:
    """Return the condition on the columns of passages that a filter stands for, None for all. Where
    a column is empty, every comparison fails. LanceDB builds the SQL: no text enters it here."""
    conditions = [
        getattr(operator, condition.comparator)(
            col(rows.condition_column(condition)), lit(stored(condition.value))
        )
        for condition in filter.conditions
    ]
    if filter.document_ids:
        conditions.append(col("document_id").isin(filter.document_ids))
    return all_of(conditions) if conditions else None


class LanceStore:
    """Use as `async with LanceStore.open(folder) as store`."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection
        self._tables: dict[str, Table] = {}
        self._catalog = asyncio.Lock()

    @classmethod
    @asynccontextmanager
    async def open(cls, folder: Path) -> AsyncIterator[Self]:
        """Open the store in `folder`, which is created if need be. Raises NotReady (STORE_IN_USE)
        if another process has it open: each would miss what the other writes."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise NotReady("STORE_IN_USE", f"another process uses the store {folder}") from None
            with await lancedb.connect_async(folder) as connection:
                store = cls(connection)
                try:
                    yield store
                finally:
                    await asyncio.gather(*(table.close() for table in store._tables.values()))

    async def put_record(self, kind: Kind, key: CorpusKey, value: str) -> None:
        row = dict(id=_record(kind, key), kind=kind, tenant=key.tenant, name=key.name, value=value)
        with translated():
            table = await self._create("records", RECORDS)
            await _upsert(table, pa.Table.from_pylist([row], schema=RECORDS))

    async def get_record(self, kind: Kind, key: CorpusKey) -> str | None:
        found = await self._rows("records", col("id") == lit(_record(kind, key)), ["value"])
        return found[0]["value"] if found else None

    async def list_records(
        self, kind: Kind, tenant: str, after: str, limit: int
    ) -> list[tuple[str, str]]:
        where = all_of(
            [col("kind") == lit(kind), col("tenant") == lit(tenant), col("name") > lit(after)]
        )
        found = await self._rows("records", where, ["name", "value"], order="name", limit=limit)
        return [(row["name"], row["value"]) for row in found]

    async def delete_record(self, kind: Kind, key: CorpusKey) -> None:
        await self._delete("records", col("id") == lit(_record(kind, key)))

    async def create_corpus(self, key: CorpusKey, embedder: str, dimension: int) -> None:
        with translated():
            if await self._table(_passages(key)) is None:
                await self._drop(_documents(key))  # what is left of a corpus dropped half
                await self._create(_documents(key), DOCUMENTS, id=BTree())
                schema = passages_schema(dimension)
                await self._create(_passages(key), schema, words=FTS(), document_id=BTree())

    async def drop_corpus(self, key: CorpusKey) -> None:
        with translated():
            await self._drop(_passages(key))
            await self._drop(_documents(key))

    async def add_columns(self, key: CorpusKey, columns: Set[str]) -> None:
        table = await self._needed(_passages(key))
        if columns <= set(table.schema.names):
            return
        with translated():
            async with table.writing():
                known = set(table.schema.names).difference(passages_schema(1).names)
                added = rows.missing(known, columns)
                await table.add_columns([pa.field(one, METADATA_TYPES[one[0]]) for one in added])

    async def put_passages(
        self, key: CorpusKey, passages: Sequence[Passage], vectors: NDArray[np.float32]
    ) -> None:
        await self.add_columns(key, rows.columns(passage.metadata for passage in passages))
        table = await self._needed(_passages(key))
        with translated():
            async with table.writing(len(passages)):
                data = await asyncio.to_thread(_passages_data, passages, vectors, table.schema)
                await table.lance.add(data)

    async def put_documents(
        self, key: CorpusKey, documents: Sequence[tuple[Document, str]]
    ) -> None:
        latest = {document.id: (document, text) for document, text in documents}
        data = await asyncio.to_thread(_documents_data, list(latest.values()))
        table = await self._needed(_documents(key))
        with translated():
            await _upsert(table, data)

    async def get_versions(self, key: CorpusKey, ids: Sequence[str]) -> dict[str, tuple[str, str]]:
        if not ids:
            return {}
        columns = ["id", "version", "content_hash"]
        found = await self._rows(_documents(key), col("id").isin(ids), columns)
        return {row["id"]: (row["version"], row["content_hash"]) for row in found}

    async def get_document(self, key: CorpusKey, id: str) -> tuple[Document, str] | None:
        found = await self._rows(_documents(key), col("id") == lit(id), ["document", "text"])
        return (rows.document_from_json(found[0]["document"]), found[0]["text"]) if found else None

    async def list_documents(self, key: CorpusKey, after: str, limit: int) -> list[Document]:
        found = await self._rows(
            _documents(key), col("id") > lit(after), ["id", "document"], order="id", limit=limit
        )
        return [rows.document_from_json(row["document"]) for row in found]

    async def count_documents(self, key: CorpusKey) -> int:
        with translated():
            table = await self._table(_documents(key))
            return await table.lance.count_rows() if table else 0

    async def delete_documents(self, key: CorpusKey, ids: Sequence[str]) -> int:
        return await self._delete(_documents(key), col("id").isin(ids)) if ids else 0

    async def sweep(self, key: CorpusKey, current: Mapping[str, str]) -> None:
        stale = [
            (col("document_id") == lit(id)) & (col("version") != lit(version))
            for id, version in current.items()
        ]
        for start in range(0, len(stale), AT_ONCE):
            where = functools.reduce(operator.or_, stale[start : start + AT_ONCE])
            await self._delete(_passages(key), where)

    async def search_vector(
        self, key: CorpusKey, vector: NDArray[np.float32], limit: int, filter: Filter = NO_FILTER
    ) -> list[Hit]:
        with translated():
            table = await self._searched(key, filter)
            if table is None:
                return []
            query = table.lance.query().nearest_to(vector).distance_type("cosine").nprobes(PROBES)
            found = await _best(table, query, limit, filter, "_distance")
        return [
            Hit(rows.passage_from_json(row["passage"]), 1.0 - row["_distance"]) for row in found
        ]

    async def search_text(
        self, key: CorpusKey, text: str, limit: int, filter: Filter = NO_FILTER
    ) -> list[Hit]:
        with translated():
            table = await self._searched(key, filter)
            if table is None:
                return []
            query = table.lance.query().nearest_to_text(MatchQuery(text, "words"))  # type: ignore[call-arg]
            found = await _best(table, query, limit, filter, "_score")
        return [Hit(rows.passage_from_json(row["passage"]), row["_score"]) for row in found]

    async def _searched(self, key: CorpusKey, filter: Filter) -> Table | None:
        """Return the passages to search, None if none can fit the filter."""
        table = await self._table(_passages(key))
        columns = {rows.condition_column(condition) for condition in filter.conditions}
        return table if table and columns <= set(table.schema.names) else None

    async def _rows(
        self, name: str, where: Expr, columns: list[str], order: str = "", limit: int = 0
    ) -> list[dict[str, Any]]:
        with translated():
            table = await self._table(name)
            if table is None:
                return []
            query = table.lance.query().where(where).select(columns)
            if order:  # LanceDB orders by UTF-8, which is the order of code points
                query = query.order_by([ColumnOrdering(column_name=order)]).limit(limit)
            found = await table.read(query)
        return found.to_pylist()  # type: ignore[no-any-return]

    async def _delete(self, name: str, where: Expr) -> int:
        """Delete rows; return how many."""
        with translated():
            table = await self._table(name)
            if table is None:
                return 0
            async with table.writing():
                result: Any = await table.lance.delete(where)
                return int(result.num_deleted_rows)

    async def _needed(self, name: str) -> Table:
        with translated():
            table = await self._table(name)
        if table is None:
            raise NotFound("CORPUS_NOT_FOUND", "the corpus does not exist")
        return table

    async def _table(self, name: str) -> Table | None:
        if name not in self._tables:
            async with self._catalog:
                await self._open(name)
        return self._tables.get(name)

    async def _open(self, name: str) -> None:
        if name in self._tables:
            return
        try:
            self._tables[name] = await Table.opened(await self._connection.open_table(name))
        except ValueError as error:
            if "was not found" not in str(error):
                raise

    async def _create(self, name: str, schema: pa.Schema, **indexes: FTS | BTree) -> Table:
        async with self._catalog:
            await self._open(name)
            if name not in self._tables:
                lance = await self._connection.create_table(name, schema=schema)
                for column, index in indexes.items():
                    await lance.create_index(column, config=index)
                self._tables[name] = await Table.opened(lance)
            return self._tables[name]

    async def _drop(self, name: str) -> None:
        async with self._catalog:
            if table := self._tables.pop(name, None):
                await table.retire()
            await self._connection.drop_table(name, ignore_missing=True)


def _record(kind: Kind, key: CorpusKey) -> str:
    return f"{kind}-{key.digest}"


def _documents(key: CorpusKey) -> str:
    return f"{key.digest}-documents"


def _passages(key: CorpusKey) -> str:
    return f"{key.digest}-passages"


async def _upsert(table: Table, data: pa.Table) -> None:
    merge = table.lance.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
    async with table.writing(len(data)):
        await merge.execute(data)


async def _best(
    table: Table, query: AsyncStandardQuery, limit: int, filter: Filter, score: str
) -> list[dict[str, Any]]:
    where = predicate(filter)
    if where is not None:
        query = query.where(where)
    found = await table.read(query.limit(limit).select(["passage", score]))
    return found.to_pylist()  # type: ignore[no-any-return]


def _passages_data(
    passages: Sequence[Passage], vectors: NDArray[np.float32], schema: pa.Schema
) -> pa.Table:
    flat = np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1)
    columns: dict[str, pa.Array] = {
        "document_id": pa.array([passage.document_id for passage in passages]),
        "version": pa.array([passage.document_version for passage in passages]),
        "words": pa.array([rows.words(passage) for passage in passages]),
        "passage": pa.array([rows.passage_to_json(passage) for passage in passages]),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(flat), vectors.shape[1]),
    }
    values: dict[str, list[str | float | bool | None]] = {}
    for place, passage in enumerate(passages):
        for key, value in passage.metadata.items():
            column = values.setdefault(rows.column(key, value), [None] * len(passages))
            column[place] = stored(value)
    for field in schema:
        if field.name not in columns:
            of_all = values.get(field.name, [None] * len(passages))
            columns[field.name] = pa.array(of_all, field.type)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _documents_data(documents: Sequence[tuple[Document, str]]) -> pa.Table:
    columns = [
        [document.id for document, _ in documents],
        [document.version for document, _ in documents],
        [document.content_hash for document, _ in documents],
        [rows.document_to_json(document) for document, _ in documents],
        [text for _, text in documents],
    ]
    arrays = [pa.array(c, field.type) for c, field in zip(columns, DOCUMENTS, strict=True)]
    return pa.table(arrays, schema=DOCUMENTS)
