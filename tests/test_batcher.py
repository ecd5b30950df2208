import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from services.embedding.batcher import CODE_POINTS, QUERY_BATCHES, Batcher, Kind, Vector
from services.runtime.errors import Overloaded

QUERY, DOCUMENT = Kind.QUERY, Kind.DOCUMENT


class FakeModel:
    """Embeds a text as [its length]; works while `go` is set."""

    name = "fake"
    hash = "f" * 64
    dimension = 1
    max_tokens = 8
    tokenizer = b"tokenizer"

    def __init__(self) -> None:
        self.batches: list[tuple[Kind, list[str]]] = []
        self.error: Exception | None = None
        self.go = threading.Event()
        self.go.set()
        self.busy = threading.Event()

    def encode(self, kind: Kind, texts: Sequence[str]) -> list[Vector]:
        self.batches.append((kind, list(texts)))
        self.busy.set()
        assert self.go.wait(10)
        if self.error:
            raise self.error
        return [[float(len(text))] for text in texts]


@asynccontextmanager
async def busy(model: FakeModel, batcher: Batcher) -> AsyncIterator[None]:
    """Keep the model busy with one text while the block runs, then let it go."""
    model.go.clear()
    first = asyncio.create_task(batcher.embed(QUERY, ["first"]))
    assert await asyncio.to_thread(model.busy.wait, 10)
    try:
        yield
    finally:
        model.go.set()
        await first
        assert model.batches.pop(0) == (QUERY, ["first"])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


async def embeds(batcher: Batcher, kind: Kind, *texts: str) -> "asyncio.Task[list[Vector]]":
    """Start a call and return once all its texts wait."""
    waiting = batcher.waiting + len(texts)
    task = asyncio.create_task(batcher.embed(kind, texts))
    await until(lambda: batcher.waiting == waiting)
    return task


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


async def test_an_idle_model_takes_a_text_at_once(model: FakeModel) -> None:
    async with Batcher(model, max_tokens=9, max_texts=9) as batcher:
        assert await batcher.embed(QUERY, ["abc"]) == [[3.0]]
    assert model.batches == [(QUERY, ["abc"])]


async def test_texts_that_wait_share_a_batch_up_to_the_budget(model: FakeModel) -> None:
    short, long, huge = "s", "l" * CODE_POINTS, "h" * CODE_POINTS * 3
    async with Batcher(model, max_tokens=3, max_texts=9) as batcher:
        async with busy(model, batcher):
            calls = [await embeds(batcher, QUERY, text) for text in (short, long, short, huge)]
        await asyncio.gather(*calls)
    assert model.batches == [(QUERY, [short, long]), (QUERY, [short]), (QUERY, [huge])]


async def test_a_text_counts_for_no_more_tokens_than_reach_the_vector(model: FakeModel) -> None:
    texts = ["x" * 9999, "y" * 9999]
    async with Batcher(model, max_tokens=2 * model.max_tokens, max_texts=9) as batcher:
        await batcher.embed(QUERY, texts)
    assert model.batches == [(QUERY, texts)]


async def test_a_call_of_many_texts_spreads_over_batches_and_keeps_their_order(
    model: FakeModel,
) -> None:
    texts = ["w" * (i % 5 + 1) for i in range(99)]
    async with Batcher(model, max_tokens=10, max_texts=len(texts)) as batcher:
        assert await batcher.embed(DOCUMENT, texts) == [[i % 5 + 1.0] for i in range(99)]
    assert len(model.batches) > 9


async def test_a_caller_that_left_costs_the_model_nothing(model: FakeModel) -> None:
    async with Batcher(model, max_tokens=9, max_texts=9) as batcher:
        async with busy(model, batcher):
            gone = await embeds(batcher, QUERY, "gone", "gone too")
            stays = await embeds(batcher, QUERY, "stays")
            gone.cancel()
            await asyncio.wait([gone])
            assert batcher.waiting == 1
        await stays
    assert model.batches == [(QUERY, ["stays"])]


async def test_queries_go_before_documents_that_came_earlier(model: FakeModel) -> None:
    async with Batcher(model, max_tokens=1, max_texts=9) as batcher:
        async with busy(model, batcher):
            documents = await embeds(batcher, DOCUMENT, "d1", "d2")
            query = await embeds(batcher, QUERY, "q")
        await asyncio.gather(documents, query)
    assert model.batches == [(QUERY, ["q"]), (DOCUMENT, ["d1"]), (DOCUMENT, ["d2"])]


async def test_documents_do_not_starve_behind_queries(model: FakeModel) -> None:
    async with Batcher(model, max_tokens=1, max_texts=99) as batcher:
        async with busy(model, batcher):
            queries = await embeds(batcher, QUERY, *"qqqqqqqqqq")
            document = await embeds(batcher, DOCUMENT, "d")
        await asyncio.gather(queries, document)
    kinds = [kind for kind, _ in model.batches]
    assert kinds.index(DOCUMENT) == QUERY_BATCHES - 1  # the one that kept the model busy counts
    assert len(kinds) == 11


async def test_a_full_queue_refuses_at_once_and_opens_again(model: FakeModel) -> None:
    async with Batcher(model, max_tokens=9, max_texts=2) as batcher:
        async with busy(model, batcher):
            waits = await embeds(batcher, QUERY, "a")
            with pytest.raises(Overloaded) as error:
                await batcher.embed(QUERY, ["z"])
            assert error.value.reason == "QUEUE_FULL"
        await waits
        assert await batcher.embed(QUERY, ["a", "b"]) == [[1.0], [1.0]]


async def test_a_bulk_load_does_not_fill_the_queue_of_the_queries(model: FakeModel) -> None:
    async with Batcher(model, max_tokens=9, max_texts=2) as batcher:
        async with busy(model, batcher):
            documents = await embeds(batcher, DOCUMENT, "d", "d")
            query = await embeds(batcher, QUERY, "q")
        assert list(map(len, await asyncio.gather(documents, query))) == [2, 1]


async def test_a_failed_batch_fails_its_callers_and_the_next_one_works(model: FakeModel) -> None:
    model.error = ValueError("broken")
    async with Batcher(model, max_tokens=2, max_texts=9) as batcher:
        calls = [batcher.embed(QUERY, ["a"]), batcher.embed(QUERY, ["b"])]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in results] == [ValueError, ValueError]
        model.error = None
        assert await batcher.embed(QUERY, ["cc"]) == [[2.0]]


async def test_a_failed_call_leaves_no_texts_behind(model: FakeModel) -> None:
    async with Batcher(model, max_tokens=1, max_texts=9) as batcher:
        model.go.clear()
        call = asyncio.create_task(batcher.embed(DOCUMENT, ["a", "b", "c"]))
        await until(lambda: batcher.waiting == 2)
        model.error = ValueError("broken")
        model.go.set()
        await asyncio.wait([call])
        assert isinstance(call.exception(), ValueError)
        await until(lambda: batcher.waiting == 0)
        model.error = None
        assert len(await batcher.embed(DOCUMENT, list("abcdefghi"))) == 9
