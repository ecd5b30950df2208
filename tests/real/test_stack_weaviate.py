"""A stack without a language model, over a Weaviate server that comes and goes."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from tworoads.v1 import retrieval_pb2 as pb
from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub

from clients.client import Client, Mode, TworoadsError
from clients.documents import Ingested, NewDocument
from clients.stack import free_addresses, plan
from services.retrieval.stores.weaviate_server import WeaviateServer, find_binary
from services.runtime.errors import error_info
from tests.real.stack import LIMIT, Supervised, supervised, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODES: tuple[Mode, ...] = ("hybrid", "vector", "text")
NOTICED_SECONDS = 10.0
DOCUMENTS = {
    "bees": "Bees dance to show each other where the flowers are.",
    "owls": "Owls fly without a sound and hunt at night.",
    "salmon": "Salmon swim back to the river in which they were born.",
}
QUESTIONS = {
    "bees": "How do bees tell each other about flowers?",
    "owls": "When do owls hunt?",
    "salmon": "Where do salmon swim?",
}


@dataclass(frozen=True)
class Stack:
    """A stack as its supervisor sees it, and clients of its gateway and of retrieval itself."""

    supervised: Supervised
    client: Client
    retrieval: RetrievalServiceStub

    def address(self, name: str) -> str:
        return self.supervised.states[name].address


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    planned = plan(folder, "weaviate", "", None, "", _free_port())
    away = ("model", "generation", "tuning", "evaluation")
    without_model = [child for child in planned.children if child.name not in away]
    async with supervised(without_model, folder) as seen, Client(planned.address) as client:
        address = seen.states["retrieval"].address
        async with grpc.aio.insecure_channel(address) as channel:
            retrieval = RetrievalServiceStub(channel)
            await comes_back(retrieval)  # it looks for Weaviate every few seconds
            yield Stack(seen, client, retrieval)


def _free_port() -> int:
    [address] = free_addresses(1)
    return int(address.rpartition(":")[2])


async def ingest(client: Client, corpus: str) -> list[str]:
    """Return what became of each of DOCUMENTS."""
    await client.create_corpus(corpus)
    documents = [NewDocument(id, text.encode()) for id, text in DOCUMENTS.items()]
    news = [news async for news in client.ingest(corpus, documents)]
    return [result.outcome for result in news if isinstance(result, Ingested)]


async def finds_all(client: Client, corpus: str) -> None:
    for mode in MODES:
        for id, question in QUESTIONS.items():
            best, *_ = await client.search(question, corpus, mode=mode)
            assert (best.document, best.text) == (id, DOCUMENTS[id])


async def is_away(retrieval: RetrievalServiceStub) -> None:
    """Searches fail soon, and say why."""
    started = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await retrieval.Search(pb.SearchRequest(corpus="c", query="owls"), timeout=LIMIT)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    info = error_info(error.value)
    assert info is not None and info.reason == "STORE_UNAVAILABLE"
    assert time.monotonic() - started < NOTICED_SECONDS


async def comes_back(retrieval: RetrievalServiceStub) -> None:
    """Calls are answered again before long; until then they are refused."""
    async with asyncio.timeout(LIMIT):
        while True:
            try:
                await retrieval.ListCorpora(pb.ListCorporaRequest(), timeout=LIMIT)
                return
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.UNAVAILABLE
                await asyncio.sleep(0.1)


async def test_documents_are_ingested_and_found_in_every_mode(stack: Stack) -> None:
    assert await ingest(stack.client, "c") == ["indexed"] * 3
    await finds_all(stack.client, "c")
    assert await ingest(stack.client, "c") == ["unchanged"] * 3


async def test_a_killed_weaviate_is_started_again_and_has_lost_nothing(stack: Stack) -> None:
    await ingest(stack.client, "c")
    states = stack.supervised.states
    pids = {name: state.pid for name, state in states.items()}
    os.kill(states["weaviate"].pid or 0, signal.SIGKILL)
    await until(lambda: stack.supervised.states["weaviate"].status == "down")
    await is_away(stack.retrieval)
    with pytest.raises(TworoadsError) as error:
        await stack.client.search("owls", "c")
    assert error.value.code is grpc.StatusCode.UNAVAILABLE
    await comes_back(stack.retrieval)
    await finds_all(stack.client, "c")
    now = {name: state.pid for name, state in stack.supervised.states.items()}
    assert {name for name in pids if pids[name] != now[name]} == {"weaviate"}


async def test_retrieval_starts_while_weaviate_is_away_and_works_once_it_is_there(
    stack: Stack, tmp_path: Path
) -> None:
    server = WeaviateServer(await find_binary(), tmp_path / "weaviate")
    key_file = tmp_path / "key"
    key_file.write_text(server.api_key)
    address = f"{server.http_address},{server.grpc_address.rpartition(':')[2]}"
    planned = plan(tmp_path, "weaviate", address, key_file, "", _free_port())
    children = {child.name: child for child in planned.children}
    retrieval, gateway = children["retrieval"], children["gateway"]
    embedding = {"TWOROADS_RETRIEVAL_EMBEDDING": stack.address("embedding")}
    retrieval = replace(retrieval, env={**retrieval.env, **embedding})
    try:
        async with (
            supervised([retrieval, gateway], tmp_path),
            grpc.aio.insecure_channel(retrieval.address) as channel,
            Client(planned.address) as client,
        ):
            stub = RetrievalServiceStub(channel)
            await is_away(stub)
            await server.start()
            await comes_back(stub)
            assert await ingest(client, "c") == ["indexed"] * 3
            await finds_all(client, "c")
    finally:
        await server.stop()
