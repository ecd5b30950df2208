"""The contract of a store on LanceDB, and what LanceDB alone has to do."""

import asyncio
import stat
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lancedb.index import FTS

from services.retrieval.stores import lancedb_table
from services.retrieval.stores.lancedb import LanceStore, predicate, stored
from services.retrieval.stores.lancedb_table import Table
from services.retrieval.stores.store import Condition, CorpusKey, Filter, Store
from services.runtime.errors import NotReady
from tests.stores_contract import *  # noqa: F403
from tests.stores_contract import make_document, make_passage, put, spread, texts

KEY = CorpusKey("default", "handbook")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with LanceStore.open(tmp_path / "store") as store:
        yield store


async def test_the_folder_is_closed_to_other_users(tmp_path: Path):
    async with LanceStore.open(tmp_path / "store"):
        assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o700


SQL = st.sampled_from(
    ["'", "''", '"', "\\", "`", "--", "/*", "*/", ";", " OR ", "1=1", "\0", "%", "_"]
)
TEXTS = st.one_of(st.text(max_size=20), st.lists(SQL | st.text(max_size=2)).map("".join))
TIMES = st.datetimes(timezones=st.just(UTC))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(TEXTS, st.floats(allow_nan=False), TIMES), min_size=1, max_size=5))
def test_a_condition_finds_its_value_and_no_other(
    values: list[tuple[str, float, datetime]],
) -> None:
    async def found(table: lancedb.AsyncTable, filter: Filter) -> set[int]:
        condition = predicate(filter)
        assert condition is not None
        rows = await table.query().where(condition).select(["row"]).to_arrow()
        return set(rows["row"].to_pylist())

    async def check() -> None:
        columns = {
            "row": list(range(len(values))),
            "document_id": [text for text, _, _ in values],
            "s_k": [text for text, _, _ in values],
            "n_k": [number for _, number, _ in values],
            "t_k": [stored(time) for _, _, time in values],
        }
        connection = await lancedb.connect_async("memory://")
        table = await connection.create_table("t", pa.table(columns))
        for number, row in enumerate(values):
            for place, value in enumerate(row):
                same = {i for i, other in enumerate(values) if other[place] == value}
                filter = Filter(conditions=(Condition("k", "eq", value),))
                assert number in same and await found(table, filter) == same
            same = {i for i, other in enumerate(values) if other[0] == row[0]}
            assert await found(table, Filter((row[0],))) == same

    asyncio.run(check())


async def test_a_folder_is_open_in_one_store_only(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NotReady) as caught:
        async with LanceStore.open(tmp_path / "store"):
            pass
    assert caught.value.reason == "STORE_IN_USE"


async def test_what_was_put_is_there_when_the_store_opens_again(tmp_path: Path) -> None:
    async with LanceStore.open(tmp_path) as store:
        await put(store, KEY, make_passage("apple", metadata={"k": 1}))
        await store.put_record("corpus", KEY, "record")
    async with LanceStore.open(tmp_path) as store:
        assert await texts(store, KEY, Filter((), (Condition("k", "eq", 1),))) == ["apple"]
        assert await store.get_record("corpus", KEY) == "record"
        await put(store, KEY, make_passage("apple two", metadata={"k": 1, "new": 1}))
        assert await texts(store, KEY, Filter((), (Condition("new", "eq", 1),))) == ["apple two"]


async def test_searches_that_are_cancelled_keep_no_other_waiting(tmp_path: Path) -> None:
    async with LanceStore.open(tmp_path) as store:
        await put(store, KEY, make_passage("apple"))
    for cancelled_after in np.arange(60) * 1e-4:  # seconds, while the index is loaded
        async with LanceStore.open(tmp_path) as store:
            assert await store.list_documents(KEY, "", 1) == []  # the tables are open
            search = asyncio.create_task(store.search_text(KEY, "apple", 1))
            await asyncio.sleep(cancelled_after)
            search.cancel()
            assert await asyncio.wait_for(store.search_text(KEY, "apple", 1), 30)


async def test_tidying_indexes_new_rows_and_the_vectors_of_a_large_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lancedb_table, "EXACT_ROWS", 999)
    connection = await lancedb.connect_async(tmp_path)
    schema = pa.schema([("words", pa.string()), ("vector", pa.list_(pa.float32(), 3))])
    table = await Table.opened(await connection.create_table("t", schema=schema))
    await table.lance.create_index("words", config=FTS())
    flat = pa.FixedSizeListArray.from_arrays(pa.array(spread(500).reshape(-1)), 3)

    async def add_and_tidy() -> tuple[int, list[str]]:
        async with table.writing(500):
            await table.lance.add(pa.table([pa.array(["apple"] * 500), flat], schema=schema))
        await table.tidy()
        stats = await table.lance.index_stats("words_idx")
        assert stats is not None and stats.num_unindexed_rows == 0
        indexes = await table.lance.list_indices()
        return stats.num_indexed_rows, sorted(index.columns[0] for index in indexes)

    assert await add_and_tidy() == (500, ["words"])
    assert await add_and_tidy() == (1000, ["vector", "words"])
    nearest = table.lance.query().nearest_to(spread(500)[7]).distance_type("cosine").limit(2)
    found = (await table.read(nearest))["vector"].to_pylist()
    assert np.allclose(found, [spread(500)[7]] * 2)
    await table.close()


async def test_many_writes_are_tidied_by_themselves(store: Store, tmp_path: Path) -> None:
    await store.create_corpus(KEY, "e" * 64, 3)
    writes = 4 * lancedb_table.MANY_WRITES
    for number in range(writes):
        await store.put_documents(KEY, [(make_document(str(number)), "text")])
    connection = await lancedb.connect_async(tmp_path / "store")
    stats: Any = await (await connection.open_table(f"{KEY.digest}-documents")).stats()
    assert stats["num_rows"] == writes
    assert stats["fragment_stats"]["num_fragments"] < writes / 2  # each write adds one


WRITER = """
import asyncio, sys
from pathlib import Path
from typing import Any
from services.retrieval.stores.lancedb import LanceStore
from tests.stores_contract import make_document, make_passage, put, spread
from tests.test_lancedb import KEY

async def main():
    async with LanceStore.open(Path(sys.argv[1])) as store:
        for number in range(100_000):
            passages = [make_passage("apple " * 200, str(number)) for _ in range(20)]
            await put(store, KEY, *passages)
            await store.put_documents(KEY, [(make_document(str(number)), "text " * 1000)])
            print(number, flush=True)
"""


async def test_what_was_committed_survives_kill_9_in_the_middle_of_writes(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", WRITER + "asyncio.run(main())", str(tmp_path)),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    while await process.stdout.readline() != b"25\n":
        assert not process.stdout.at_eof()
    process.kill()
    rest = (await process.communicate())[0].split()
    committed = 26 + len(rest)
    async with LanceStore.open(tmp_path) as store:
        found = await store.get_versions(KEY, [str(number) for number in range(committed)])
        assert len(found) == committed
        for number in range(committed):
            hits = await store.search_text(KEY, "apple", 100, Filter((str(number),)))
            assert len(hits) == 20
        await put(store, KEY, make_passage("banana"))
        assert len(await store.search_text(KEY, "banana", 9)) == 1


FILLER = """
import resource
from services.runtime.errors import Overloaded
from tests.stores_contract import texts
from services.retrieval.stores.store import Filter

async def fill():
    async with LanceStore.open(Path(sys.argv[1])) as store:
        await put(store, KEY, make_passage("apple"))
        await store.put_documents(KEY, [(make_document("a"), "small")])
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        for write in (
            store.put_documents(KEY, [(make_document("b"), "\\U0001f600" * 100_000)]),
            put(store, KEY, *[make_passage(str(i) * 500) for i in range(1000)]),
            store.put_record("corpus", KEY, "x" * 1_000_000),
        ):
            try:
                await write
            except Overloaded as error:
                print(error.reason, error)
        assert await texts(store, KEY, Filter()) == ["apple"]
        assert (await store.get_document(KEY, "a"))[1] == "small"
        assert await store.count_documents(KEY) == 1
"""


async def test_a_full_disk_refuses_writes_and_keeps_what_was_there(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", WRITER + FILLER + "asyncio.run(fill())", str(tmp_path)),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert output.decode().splitlines() == ["STORE_FULL the disk of the store is full"] * 3
    assert process.returncode == 0
