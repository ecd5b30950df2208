"""Uploads side by side: none keeps what it held, and no tenant keeps out another."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from tworoads.v1 import retrieval_pb2 as pb

from services.retrieval import sharing
from services.retrieval.sharing import Room, Share
from services.runtime.call import TENANT
from services.runtime.errors import Unavailable
from tests.small_stack import SmallStack, small_stack

END = pb.PutDocumentsRequest(end=pb.PutDocumentsEnd())
ROOM = 100_000
MEBIBYTE = 1024 * 1024


@pytest.fixture
async def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SmallStack]:
    monkeypatch.setattr(sharing, "BYTES_AT_ONCE", ROOM)
    async with small_stack(tmp_path) as running:
        await corpora(running)
        yield running


async def corpora(stack: SmallStack) -> None:
    for tenant in ("a", "b"):
        request = pb.CreateCorpusRequest(name="c")
        await stack.retrieval.CreateCorpus(request, metadata=((TENANT, tenant),))


def documents(*contents: bytes) -> list[pb.PutDocumentsRequest]:
    parts = []
    for number, content in enumerate(contents):
        header = pb.PutDocumentsDocument(id=f"d{number}", media_type="text/plain")
        parts.append(pb.PutDocumentsRequest(document=header))
        parts += [
            pb.PutDocumentsRequest(chunk=content[at : at + MEBIBYTE])
            for at in range(0, len(content), MEBIBYTE)
        ]
    return parts


class Stream:
    """An upload of a tenant, and the ids that have results; without an `end` it stays open."""

    def __init__(self, stack: SmallStack, tenant: str, *contents: bytes, end: bool = True) -> None:
        self.done: list[str] = []
        self._parts = [
            pb.PutDocumentsRequest(start=pb.PutDocumentsStart(corpus="c")),
            *documents(*contents),
            *([END] if end else []),
        ]
        self._end = end
        self._call = stack.retrieval.PutDocuments(self._requests(), metadata=((TENANT, tenant),))
        self.task = asyncio.create_task(self._read())

    async def _requests(self) -> AsyncIterator[pb.PutDocumentsRequest]:
        for part in self._parts:
            yield part
        if not self._end:
            await asyncio.Event().wait()

    async def _read(self) -> None:
        async for response in self._call:
            if response.HasField("result"):
                self.done.append(response.result.id)

    async def leave(self) -> None:
        self._call.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def test_a_tenant_has_half_of_the_room_and_gets_what_is_given_back() -> None:
    room = Room(100)
    mine = Share(room, "a")
    await mine.take(30)
    await mine.take(20)
    waiting = asyncio.create_task(mine.take(1))
    await room.take("b", 40)
    large = asyncio.create_task(room.take("c", 80))  # more than half, so alone of its tenant
    await asyncio.sleep(0.01)
    assert not waiting.done() and not large.done()
    room.give("b", 40)
    mine.give(20)
    await waiting
    await asyncio.sleep(0.01)
    assert not large.done()
    mine.close()
    await asyncio.wait_for(large, 10)


async def test_what_is_larger_than_all_of_the_room_goes_alone() -> None:
    room = Room(100)
    await room.take("a", 1000)
    waiting = asyncio.create_task(room.take("b", 1))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    room.give("a", 1000)
    await asyncio.wait_for(waiting, 10)


@pytest.mark.parametrize("how", ["left", "failed", "broken off"])
async def test_an_upload_that_does_not_end_well_gives_its_room_back(
    stack: SmallStack, how: str
) -> None:
    for number in range(3):
        # A third of the room: two are more than a tenant's half.
        content, other = (b"%s %d " % (word, number) * (ROOM // 21) for word in (b"owl", b"elk"))
        stack.embedding.meeting = meeting = asyncio.Barrier(99)
        if how == "failed":
            stack.embedding.meeting = None
            stack.embedding.error = Unavailable("ENGINE_DEAD", "it is away")
        stream = Stream(stack, "a", content, end=how != "broken off")
        if how == "left":
            async with asyncio.timeout(20):
                while not meeting.n_waiting:
                    await asyncio.sleep(0.01)
        if how == "failed":
            with pytest.raises(grpc.aio.AioRpcError):
                await asyncio.wait_for(stream.task, 20)
        await stream.leave()
        stack.embedding.meeting = stack.embedding.error = None
        for tenant in ("a", "b"):
            well = Stream(stack, tenant, other)
            await asyncio.wait_for(well.task, 20)
            assert well.done == ["d0"]


async def test_slow_documents_of_one_tenant_do_not_hold_up_another(tmp_path: Path) -> None:
    async with small_stack(tmp_path, module="tests.slow_parsing", seconds=0.5) as stack:
        await corpora(stack)
        slow = Stream(stack, "a", *[b"hang"] * 40)
        async with asyncio.timeout(30):
            while not slow.done:
                await asyncio.sleep(0.01)
        quick = Stream(stack, "b", b"hello")
        await asyncio.wait_for(quick.task, 30)
        assert len(slow.done) < 20
        await slow.leave()


async def test_of_a_tenant_one_large_document_arrives_at_a_time(tmp_path: Path) -> None:
    async with small_stack(tmp_path) as stack:
        await corpora(stack)
        content = b"owls " * (MEBIBYTE // 4)
        first = Stream(stack, "a", content, end=False)
        async with asyncio.timeout(30):
            other = Stream(stack, "b", content)
            await other.task
        second, small = Stream(stack, "a", content), Stream(stack, "a", b"larks")
        await asyncio.wait_for(small.task, 30)
        assert (other.done, small.done, second.done) == (["d0"], ["d0"], [])
        await first.leave()
        await asyncio.wait_for(second.task, 30)
        assert second.done == ["d0"]
