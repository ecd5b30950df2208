import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc import StatusCode
from tworoads.v1 import embedding_pb2 as pb
from tworoads.v1.embedding_pb2_grpc import (
    EmbeddingServiceStub,
    add_EmbeddingServiceServicer_to_server,
)

from services.embedding.__main__ import NAME
from services.embedding.batcher import Batcher, Kind
from services.embedding.service import MAX_CODE_POINTS, MAX_TEXTS, EmbeddingService
from services.runtime.channel import connect
from services.runtime.errors import error_info
from services.runtime.server import running
from services.runtime.settings import ServerSettings
from tests.test_batcher import FakeModel, busy, until

QUERY, DOCUMENT = pb.EMBED_KIND_QUERY, pb.EMBED_KIND_DOCUMENT


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
async def batcher(model: FakeModel) -> AsyncIterator[Batcher]:
    async with Batcher(model, max_tokens=64, max_texts=MAX_TEXTS) as batcher:
        yield batcher


@pytest.fixture
async def embedding(model: FakeModel, batcher: Batcher) -> AsyncIterator[EmbeddingServiceStub]:
    settings = ServerSettings(listen="127.0.0.1:0", grace_seconds=0)
    async with running(settings, [NAME]) as server:
        service = EmbeddingService(model, batcher)
        await server.serve(lambda s: add_EmbeddingServiceServicer_to_server(service, s))
        async with connect(f"127.0.0.1:{server.port}", NAME) as channel:
            yield EmbeddingServiceStub(channel)


async def test_returns_one_vector_per_text_in_order_and_the_hash(
    embedding: EmbeddingServiceStub,
) -> None:
    response = await embedding.Embed(pb.EmbedRequest(texts=["a", "bbb"], kind=QUERY))
    assert [list(vector.values) for vector in response.vectors] == [[1.0], [3.0]]
    assert response.model_hash == FakeModel.hash


@pytest.mark.parametrize(("kind", "seen"), [(QUERY, Kind.QUERY), (DOCUMENT, Kind.DOCUMENT)])
async def test_tells_the_model_what_a_text_is_for(
    embedding: EmbeddingServiceStub, model: FakeModel, kind: pb.EmbedKind.ValueType, seen: Kind
) -> None:
    await embedding.Embed(pb.EmbedRequest(texts=["a"], kind=kind))
    assert model.batches == [(seen, ["a"])]


async def test_takes_the_most_texts_and_the_longest_one(embedding: EmbeddingServiceStub) -> None:
    request = pb.EmbedRequest(texts=["é" * MAX_CODE_POINTS, *["a"] * (MAX_TEXTS - 1)], kind=QUERY)
    assert len((await embedding.Embed(request)).vectors) == MAX_TEXTS


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (pb.EmbedRequest(kind=QUERY), "TEXTS_EMPTY"),
        (pb.EmbedRequest(texts=["a"] * (MAX_TEXTS + 1), kind=QUERY), "TOO_MANY_TEXTS"),
        (pb.EmbedRequest(texts=["a", ""], kind=QUERY), "TEXT_EMPTY"),
        (pb.EmbedRequest(texts=["é" * (MAX_CODE_POINTS + 1)], kind=QUERY), "TEXT_TOO_LONG"),
        (pb.EmbedRequest(texts=["a"]), "KIND_UNKNOWN"),
        (pb.EmbedRequest(texts=["a"], kind=7), "KIND_UNKNOWN"),  # type: ignore[arg-type]
    ],
)
async def test_refuses(
    embedding: EmbeddingServiceStub, model: FakeModel, request_: pb.EmbedRequest, reason: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await embedding.Embed(request_)
    assert error.value.code() == StatusCode.INVALID_ARGUMENT
    info = error_info(error.value)
    assert info is not None and info.reason == reason
    assert not model.batches


async def test_a_full_queue_is_resource_exhausted(
    embedding: EmbeddingServiceStub, model: FakeModel, batcher: Batcher
) -> None:
    async with busy(model, batcher):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await embedding.Embed(pb.EmbedRequest(texts=["a"] * MAX_TEXTS, kind=QUERY))
    assert error.value.code() == StatusCode.RESOURCE_EXHAUSTED
    info = error_info(error.value)
    assert info is not None and info.reason == "QUEUE_FULL"


async def test_a_call_that_is_cancelled_leaves_the_queue(
    embedding: EmbeddingServiceStub, model: FakeModel, batcher: Batcher
) -> None:
    async with busy(model, batcher):
        call = embedding.Embed(pb.EmbedRequest(texts=["gone"], kind=QUERY))
        waits = asyncio.ensure_future(call)
        await until(lambda: batcher.waiting == 1)
        call.cancel()
        await asyncio.wait([waits])
        await until(lambda: batcher.waiting == 0)
    await embedding.Embed(pb.EmbedRequest(texts=["stays"], kind=QUERY))
    assert model.batches == [(Kind.QUERY, ["stays"])]


async def test_a_failure_of_the_model_does_not_leak(
    embedding: EmbeddingServiceStub, model: FakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    model.error = RuntimeError("secret")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await embedding.Embed(pb.EmbedRequest(texts=["a"], kind=QUERY))
    assert error.value.code() == StatusCode.INTERNAL
    assert "secret" not in (error.value.details() or "")
    assert "secret" in caplog.text


async def test_says_which_model_it_runs(embedding: EmbeddingServiceStub) -> None:
    response = await embedding.GetModel(pb.EmbeddingServiceGetModelRequest())
    assert response.model == pb.EmbeddingModel(
        name="fake", hash=FakeModel.hash, dimension=1, max_tokens=8, normalized=True
    )
    assert response.tokenizer == b""


async def test_adds_the_tokenizer_when_asked(embedding: EmbeddingServiceStub) -> None:
    request = pb.EmbeddingServiceGetModelRequest(include_tokenizer=True)
    assert (await embedding.GetModel(request)).tokenizer == FakeModel.tokenizer
