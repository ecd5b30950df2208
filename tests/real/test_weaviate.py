"""The contract of a store on a real Weaviate server, and what happens when it comes and goes."""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import pytest_asyncio
import weaviate
from weaviate.classes.init import Auth

from services.retrieval.stores.store import CorpusKey, Filter, MetadataValue, Store
from services.retrieval.stores.weaviate import WeaviateStore
from services.retrieval.stores.weaviate_backup import BackupFailed, back_up, restore
from services.retrieval.stores.weaviate_schema import DOCUMENTS, passages_collection
from services.retrieval.stores.weaviate_server import WeaviateServer, find_binary
from services.runtime import call
from services.runtime.errors import Overloaded, TooLate, Unavailable
from tests.stores_contract import *  # noqa: F403
from tests.stores_contract import make_document, make_passage, put, spread, texts

KNOWN_AWAY_SECONDS = 4.0
NOTICED_SECONDS = 10.0
RECOVERED_SECONDS = 30.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[WeaviateServer]:
    folder = tmp_path_factory.mktemp("weaviate")
    async with WeaviateServer(await find_binary(say=print), folder) as server:
        yield server


@pytest.fixture
async def store(server: WeaviateServer) -> AsyncIterator[Store]:
    async with opened(server) as store:
        yield store


def opened(server: WeaviateServer) -> AbstractAsyncContextManager[WeaviateStore]:
    return WeaviateStore.open(server.http_address, server.grpc_address, server.api_key)


def admin(server: WeaviateServer) -> weaviate.WeaviateAsyncClient:
    return weaviate.use_async_with_custom(
        http_host="127.0.0.1",
        http_port=int(server.http_address.split(":")[1]),
        http_secure=False,
        grpc_host="127.0.0.1",
        grpc_port=int(server.grpc_address.split(":")[1]),
        grpc_secure=False,
        auth_credentials=Auth.api_key(server.api_key),
        skip_init_checks=True,
    )


async def fails_within(seconds: float, store: Store, key: CorpusKey) -> None:
    """Each kind of call fails so fast."""
    for failing in (
        store.get_record("corpus", key),
        store.search_vector(key, spread(1)[0], 5),
        store.search_text(key, "apple", 5),
        store.put_passages(key, [make_passage("apple")], spread(1)),
        store.delete_documents(key, ["a"]),
    ):
        started = time.monotonic()
        with pytest.raises(Unavailable) as caught:
            await failing
        assert caught.value.reason == "STORE_UNAVAILABLE"
        assert time.monotonic() - started < seconds


async def recovers(store: Store, key: CorpusKey) -> None:
    async with asyncio.timeout(RECOVERED_SECONDS):
        while True:
            try:
                await store.get_record("corpus", key)
                await store.search_text(key, "apple", 5)
                return
            except Unavailable:
                await asyncio.sleep(0.02)


async def test_the_server_may_come_late_go_and_come_again(tmp_path: Path, key: CorpusKey) -> None:
    server = WeaviateServer(await find_binary(say=print), tmp_path)
    try:
        async with opened(server) as store:
            await fails_within(KNOWN_AWAY_SECONDS, store, key)
            await server.start()
            await recovers(store, key)
            await put(store, key, make_passage("apple"))
            await store.put_documents(key, [(make_document("a"), "text")])

            calls = [asyncio.create_task(store.search_text(key, "apple", 5)) for _ in range(20)]
            await server.stop()
            await fails_within(NOTICED_SECONDS, store, key)
            await fails_within(KNOWN_AWAY_SECONDS, store, key)
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(outcome, list | Unavailable)

            await server.start()
            await recovers(store, key)
            assert await texts(store, key, Filter()) == ["apple"]
            assert await store.count_documents(key) == 1
    finally:
        await server.stop()


async def test_what_was_backed_up_comes_back_on_an_empty_server(
    tmp_path: Path, key: CorpusKey
) -> None:
    binary = await find_binary(say=print)
    passages = [make_passage(f"apple {number}") for number in range(40)]
    other = CorpusKey("somebody else", key.name)
    async with WeaviateServer(binary, tmp_path / "first") as server, opened(server) as store:
        for place in (key, other):
            await put(store, place, *passages)
            await store.put_documents(place, [(make_document("a"), "text")])
        await store.put_record("policy", key, "rag")
        before = await store.search_vector(key, spread(1)[0], 10)
        address, api_key = server.http_address, server.api_key
        names = await back_up(address, api_key, "filesystem", "nightly")
        assert len(names) == 3
        with pytest.raises(BackupFailed):  # the collections are there
            await restore(address, api_key, "filesystem", "nightly")
        await put(store, key, make_passage("banana"))  # after the backup
    shutil.copytree(tmp_path / "first" / "backups", tmp_path / "second" / "backups")
    shutil.rmtree(tmp_path / "first")
    async with WeaviateServer(binary, tmp_path / "second") as server:
        names = await restore(server.http_address, server.api_key, "filesystem", "nightly")
        assert len(names) == 3
        async with opened(server) as store:
            await recovers(store, key)
            assert await store.search_vector(key, spread(1)[0], 10) == before
            assert await store.get_record("policy", key) == "rag"
            for place in (key, other):
                assert len(await texts(store, place, Filter())) == 40
                assert await store.count_documents(place) == 1
        with pytest.raises(BackupFailed):
            await restore(server.http_address, server.api_key, "filesystem", "never-made")


async def test_a_wrong_key_is_as_good_as_no_server(server: WeaviateServer, key: CorpusKey) -> None:
    async with WeaviateStore.open(server.http_address, server.grpc_address, "wrong") as store:
        await fails_within(KNOWN_AWAY_SECONDS, store, key)


async def test_a_call_ends_with_its_deadline(store: Store, key: CorpusKey) -> None:
    now = time.monotonic()
    token = call.current.set(call.Call(deadline=now + call.MARGIN + 0.0005))
    try:
        with pytest.raises(TooLate):
            await store.search_text(key, "apple", 5)
        assert time.monotonic() - now < 5
    finally:
        call.current.reset(token)


async def test_a_read_only_server_refuses_writes_and_answers_searches(
    server: WeaviateServer, store: Store, key: CorpusKey
) -> None:
    await put(store, key, make_passage("apple"))
    await store.put_documents(key, [(make_document("a"), "text")])
    async with admin(server) as client:
        names = [name for name in await client.collections.list_all() if "Records" not in name]
        for name in names:
            config = client.collections.use(name).config
            if name == DOCUMENTS or await client.collections.use(name).tenants.exists(key.digest):
                await config.update_shards("READONLY", shard_names=key.digest)
    for refused in (
        store.put_documents(key, [(make_document("b"), "text")]),
        store.put_passages(key, [make_passage("apple")], spread(1)),
        store.delete_documents(key, ["a"]),
    ):
        with pytest.raises(Overloaded) as caught:
            await refused
        assert caught.value.reason == "STORE_FULL"
    assert await texts(store, key, Filter()) == ["apple"]
    assert await store.count_documents(key) == 1


async def test_corpora_share_the_properties_of_their_metadata(
    server: WeaviateServer, store: Store, key: CorpusKey
) -> None:
    for number in range(5):
        one = CorpusKey(key.tenant, f"c{number}")
        metadata: dict[str, MetadataValue] = {f"text{number}": "x", f"number{number}": 1}
        await store.create_corpus(one, "embedder of its own", 3)
        await store.put_passages(one, [make_passage("apple", metadata=metadata)], spread(1))
    async with admin(server) as client:
        passages = client.collections.use(passages_collection("embedder of its own"))
        config = await passages.config.get(simple=True)
    names = {one.name for one in config.properties}
    assert names == {"document", "version", "stems", "passage", "s0", "n0"}


async def test_a_replica_notices_that_another_one_created_the_corpus_anew(
    server: WeaviateServer, store: Store, key: CorpusKey
) -> None:
    await put(store, key, make_passage("apple"))
    async with opened(server) as other:
        assert await texts(other, key, Filter()) == ["apple"]
        await store.drop_corpus(key)
        await store.create_corpus(key, "other embedder", 3)
        await store.put_passages(key, [make_passage("apple pie", metadata={"k": 1})], spread(1))
        assert await texts(other, key, Filter()) == ["apple pie"]
