"""What a principal may use, what they are told when it is used up, and what is noted of writes."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from tworoads.v1 import answer_pb2, retrieval_pb2
from tworoads.v1.answer_pb2_grpc import AnswerServiceStub
from tworoads.v1.embedding_pb2 import EmbedRequest, EmbedResponse
from tworoads.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub

from services.gateway import keys
from services.gateway.audit import Audit
from services.gateway.gate import Identified
from services.gateway.identity import Role
from services.gateway.keys import Keys
from services.gateway.quotas import MINUTE, Bucket, Limits, Quotas
from services.runtime.call import Call
from services.runtime.channel import connect
from services.runtime.errors import Overloaded, error_info
from services.runtime.gate import Caller
from tests.probe import Probe, failure, probe, retry_seconds, soon
from tests.small_stack import ANSWERS, EMBEDDING, RETRIEVAL, SmallStack, small_stack


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Given:
    """A gate with limits, and the metadata of callers, each with a key."""

    def __init__(
        self, folder: Path, limits: Limits, audit: Path | None = None, others: int = 0
    ) -> None:
        self.clock = Clock()
        self.file = folder / "keys.json"
        self.ann, self.bob = self.add("ann"), self.add("bob")
        self.reader = self.add("carl", "reader")
        self.others = [self.add(f"other{number}") for number in range(others)]
        self.quotas = Quotas(limits, self.clock)
        self.gate = Identified(Keys(self.file), None, self.quotas, Audit(audit))

    def add(self, principal: str, role: Role = "writer") -> dict[str, Any]:
        _, text = keys.add(self.file, "acme", principal, role)
        return {"metadata": (("authorization", f"Bearer {text}"),)}


def reason_of(error: grpc.aio.AioRpcError) -> str:
    info = error_info(error)
    assert info
    return info.reason


def bucket(size: int, clock: Clock) -> Bucket:
    return Bucket("QUOTA_REQUESTS", "requests", size, clock)


def test_a_bucket_refills_evenly_and_says_when_there_is_room() -> None:
    clock = Clock()
    quota = bucket(30, clock)
    for _ in range(30):
        quota.check()
        quota.use(1)
    with pytest.raises(Overloaded, match="30 requests a minute.*try again in 2 s") as caught:
        quota.check()
    assert caught.value.retry_after == pytest.approx(2.0)
    clock.now += 1.9
    with pytest.raises(Overloaded) as caught:
        quota.check()
    assert caught.value.retry_after == pytest.approx(0.1, abs=0.002)
    clock.now += caught.value.retry_after
    quota.check()  # to the millisecond when it was told
    quota.use(1)
    clock.now += 10 * MINUTE
    assert quota.full()
    for _ in range(30):  # not more than a minute's worth, however long it was idle
        quota.check()
        quota.use(1)
    with pytest.raises(Overloaded):
        quota.check()


def test_what_was_used_beyond_the_quota_has_to_be_made_up_for() -> None:
    clock = Clock()
    quota = bucket(60, clock)
    quota.check()
    quota.use(180)
    with pytest.raises(Overloaded) as caught:
        quota.check()
    assert caught.value.retry_after == pytest.approx(121)
    clock.now += 120.5
    with pytest.raises(Overloaded):
        quota.check()
    clock.now += 0.5
    quota.check()


def test_no_limit_is_no_limit() -> None:
    clock = Clock()
    quota = bucket(0, clock)
    quota.use(10**12)
    quota.check()
    assert quota.full()


def test_principals_that_are_idle_are_forgotten_and_others_are_not() -> None:
    clock = Clock()
    quotas = Quotas(Limits(requests=60), clock)
    held = Caller("acme", "watcher")
    quotas.of(held).open_stream()
    for number in range(10_000):
        quotas.of(Caller("acme", f"p{number}")).requests.use(1)
        clock.now += 0.01  # each is idle again a second later
    assert len(quotas) < 250
    busy = Caller("acme", "busy")
    quotas.of(busy).requests.use(120)
    clock.now += 30
    for number in range(1000):
        quotas.of(Caller("acme", f"q{number}"))
    with pytest.raises(Overloaded):
        quotas.of(busy).requests.check()
    quotas.of(held).close_stream()
    clock.now += 10 * MINUTE
    for _ in range(1000):
        quotas.of(Caller("acme", "last"))
    assert len(quotas) == 1


def test_the_same_name_in_two_tenants_is_two_principals() -> None:
    quotas = Quotas(Limits(requests=1), Clock())
    quotas.of(Caller("a", "ann")).requests.use(1)
    quotas.of(Caller("b", "ann")).requests.check()
    with pytest.raises(Overloaded):
        quotas.of(Caller("a", "ann")).requests.check()


async def until_refused(server: Probe, caller: dict[str, Any]) -> tuple[int, Any]:
    for count in range(1000):
        try:
            await server.embed(**caller)
        except grpc.aio.AioRpcError as error:
            return count, error
    raise AssertionError("never refused")


async def test_requests_are_limited_by_principal(tmp_path: Path) -> None:
    given = Given(tmp_path, Limits(requests=20))
    async with probe(gate=given.gate) as server:
        count, error = await until_refused(server, given.ann)
        assert count == 20 and error.code() == StatusCode.RESOURCE_EXHAUSTED
        assert reason_of(error) == "QUOTA_REQUESTS" and retry_seconds(error) == 3.0
        await server.embed(**given.bob)
        given.clock.now += 3.0
        await server.embed(**given.ann)
        assert reason_of(await failure(server.embed(**given.ann))) == "QUOTA_REQUESTS"


async def test_streams_are_limited_while_they_are_open(tmp_path: Path) -> None:
    given = Given(tmp_path, Limits(streams=2))
    stop = asyncio.Event()

    async def watch(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"a"
        await stop.wait()

    async with probe(gate=given.gate, watch=watch) as server:
        held = [server.watch(b"", **given.ann) for _ in range(2)]
        for call in held:
            await call.read()
        error = await failure(server.watch(b"", **given.ann))
        assert reason_of(error) == "QUOTA_STREAMS" and retry_seconds(error)
        await server.embed(**given.ann)  # is none
        other = server.watch(b"", **given.bob)
        await other.read()
        held[0].cancel()
        await _until(lambda: _opens(server, given.ann, held))
        error = await failure(server.watch(b"", **given.ann))
        assert reason_of(error) == "QUOTA_STREAMS"
        stop.set()
        assert await soon(held[1].read()) == grpc.aio.EOF
        other.cancel()


async def _opens(server: Probe, caller: dict[str, Any], held: list[Any]) -> bool:
    call = server.watch(b"", **caller)
    try:
        await call.read()
    except grpc.aio.AioRpcError:
        return False
    held.append(call)
    return True


async def _until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not await condition():
            await asyncio.sleep(0.01)


async def test_uploads_are_limited_by_their_bytes(tmp_path: Path) -> None:
    given = Given(tmp_path, Limits(bytes=10_000))

    async def parts(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield bytes(1000)

    async with probe(gate=given.gate) as server:
        assert len(await server.upload(parts(10), **given.ann)) == 10_000
        await server.embed("a" * 20_000, **given.ann)  # is no upload
        error = await failure(server.upload(parts(3), **given.ann))
        assert reason_of(error) == "QUOTA_BYTES"
        assert retry_seconds(error) == pytest.approx(MINUTE / 10_000, abs=0.001)
        assert len(await server.upload(parts(10), **given.bob)) == 10_000
        given.clock.now += 12  # 2,000 bytes, so the third message is one too many
        error = await failure(server.upload(parts(4), **given.ann))
        assert reason_of(error) == "QUOTA_BYTES"
        given.clock.now += MINUTE
        assert len(await server.upload(parts(10), **given.ann)) == 10_000


async def test_many_small_messages_are_work_too(tmp_path: Path) -> None:
    given = Given(tmp_path, Limits(bytes=10_000))

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield b""

    async with probe(gate=given.gate) as server:
        assert reason_of(await failure(server.upload(parts(), **given.ann))) == "QUOTA_BYTES"


@asynccontextmanager
async def answering(folder: Path, given: Given) -> AsyncIterator[tuple[SmallStack, Any]]:
    async with (
        small_stack(folder / "store", gate=given.gate) as stack,
        connect(stack.address, ANSWERS, RETRIEVAL, EMBEDDING) as channel,
    ):
        yield stack, channel


def question(text: str = "Who?", **fields: Any) -> answer_pb2.AnswerRequest:
    return answer_pb2.AnswerRequest(question=text, path=retrieval_pb2.PATH_BASE, **fields)


async def left(given: Given, answers: AnswerServiceStub) -> float:
    """Return how many seconds ann has to wait, by the bucket's own word: 1,000 tokens a second."""
    error = await failure(answers.Answer(question(), **given.ann))
    assert reason_of(error) == "QUOTA_TOKENS"
    return retry_seconds(error) or 0.0


async def test_an_answer_is_paid_for_when_its_tokens_are_known(tmp_path: Path) -> None:
    given = Given(tmp_path, Limits(tokens=60))
    async with answering(tmp_path, given) as (stack, channel):
        answers = AnswerServiceStub(channel)
        events = [event async for event in answers.Answer(question(), **given.ann)]
        finished = events[-1].finished
        used = finished.input_tokens + finished.output_tokens
        assert used == 104  # of the fake
        assert await left(given, answers) == pytest.approx(used - 60 + 1)
        given.clock.now += used - 60 + 1
        async for _ in answers.Answer(question(), **given.ann):
            pass
        async for _ in answers.Answer(question(), **given.bob):
            pass
        assert "a minute is used up" in (
            (await failure(answers.Answer(question(), **given.ann))).details() or ""
        )
        await RetrievalServiceStub(channel).ListCorpora(
            retrieval_pb2.ListCorporaRequest(), **given.ann
        )  # needs no tokens


async def test_a_rewritten_query_is_paid_for_too(tmp_path: Path) -> None:
    given = Given(tmp_path, Limits(tokens=60))
    async with answering(tmp_path, given) as (stack, channel):
        await RetrievalServiceStub(channel).CreateCorpus(
            retrieval_pb2.CreateCorpusRequest(name="c"), **given.ann
        )
        request = answer_pb2.AnswerRequest(
            question="And then?",
            path=retrieval_pb2.PATH_RAG,
            corpus="c",
            history=[answer_pb2.Turn(question="Who?", answer="Ann.")],
            options=answer_pb2.AnswerOptions(rewrite_query=True),
        )
        answers = AnswerServiceStub(channel)
        async for _ in answers.Answer(request, **given.ann):
            pass
        assert len(stack.generation.requests) == 1  # the corpus is empty: nothing else was written
        assert await left(given, answers) == pytest.approx(104 - 60 + 1)


@pytest.mark.parametrize("how", ["is cancelled", "breaks off"])
async def test_an_answer_that_does_not_end_is_paid_for_as_far_as_it_came(
    how: str, tmp_path: Path
) -> None:
    given = Given(tmp_path, Limits(tokens=60))
    async with answering(tmp_path, given) as (stack, channel):
        stack.generation.answer = "word " * 40 + "end"
        stack.generation.hold_after = 40
        answers = AnswerServiceStub(channel)
        call = answers.Answer(question(), **given.ann)
        text = ""
        while len(text) < 40 * 5 - 1:
            text += (await soon(call.read())).text
        if how == "is cancelled":
            call.cancel()
        else:
            await stack.servers["generation"].drain()
            with pytest.raises(grpc.aio.AioRpcError):
                await soon(call.read())
        await _until(lambda: _refused(answers, given))
        assert await left(given, answers) == pytest.approx(100 + len(text) // 4 - 60 + 1)


async def _refused(answers: AnswerServiceStub, given: Given) -> bool:
    call = answers.Answer(question(), **given.ann)
    try:
        await call.read()
    except grpc.aio.AioRpcError as error:
        return bool(reason_of(error) == "QUOTA_TOKENS")
    finally:
        call.cancel()
    raise AssertionError("the answer cost nothing")


async def test_one_abusive_client_harms_nobody_else(tmp_path: Path) -> None:
    most = 30
    given = Given(tmp_path, Limits(requests=most), others=10)
    async with answering(tmp_path, given) as (stack, channel):
        embedding = EmbeddingServiceStub(channel)
        refused = 0

        async def abuse() -> None:
            nonlocal refused
            for _ in range(10 * most):
                try:
                    await _embed(embedding, given.ann)
                except grpc.aio.AioRpcError as error:
                    assert error.code() == StatusCode.RESOURCE_EXHAUSTED
                    assert reason_of(error) == "QUOTA_REQUESTS" and retry_seconds(error)
                    refused += 1

        async def behave(caller: dict[str, Any]) -> None:
            for _ in range(most):
                await _embed(embedding, caller)

        await asyncio.gather(abuse(), *map(behave, given.others))
        assert refused == 9 * most
        assert len(stack.embedding.embedded) == 11 * most


async def _embed(embedding: EmbeddingServiceStub, caller: dict[str, Any]) -> EmbedResponse:

    return await embedding.Embed(EmbedRequest(texts=["a"]), **caller)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_each_write_leaves_a_line_and_no_read_does(tmp_path: Path) -> None:
    audit = tmp_path / "audit.jsonl"
    given = Given(tmp_path, Limits(), audit)
    async with answering(tmp_path, given) as (_, channel):
        retrieval = RetrievalServiceStub(channel)
        create = retrieval_pb2.CreateCorpusRequest(name="c")
        metadata = (*given.ann["metadata"], ("x-request-id", "r1"))
        await retrieval.CreateCorpus(create, metadata=metadata)
        await retrieval.GetCorpus(retrieval_pb2.GetCorpusRequest(name="c"), **given.ann)
        await failure(retrieval.CreateCorpus(create, **given.bob))
        await failure(retrieval.CreateCorpus(create, **given.reader))
        await failure(retrieval.CreateCorpus(create))
        await _until(lambda: _has(audit, 3))
    first, *others = lines_of(audit)
    assert first["peer"].startswith("ipv4:127.0.0.1:")
    assert set(first) == {
        *("time", "request", "peer", "tenant", "principal", "method", "code", "seconds")
    }
    assert (first["request"], first["tenant"], first["principal"]) == ("r1", "acme", "ann")
    assert first["method"] == f"/{RETRIEVAL}/CreateCorpus" and first["code"] == "OK"
    assert [(line["principal"], line["code"]) for line in others] == [
        ("bob", "ALREADY_EXISTS"),
        ("carl", "PERMISSION_DENIED"),
    ]
    assert audit.stat().st_mode & 0o777 == 0o600


async def test_who_may_not_write_cannot_fill_the_audit(tmp_path: Path) -> None:
    audit = tmp_path / "audit.jsonl"
    given = Given(tmp_path, Limits(requests=5), audit)
    async with probe(gate=given.gate) as server:
        errors = [await failure(server.create(**given.reader)) for _ in range(20)]
    assert [reason_of(error) for error in errors[4:6]] == ["ROLE_MISSING", "QUOTA_REQUESTS"]
    assert [line["code"] for line in lines_of(audit)] == ["PERMISSION_DENIED"] * 5


async def test_a_write_that_was_left_is_noted(tmp_path: Path) -> None:
    audit = tmp_path / "audit.jsonl"
    given = Given(tmp_path, Limits(), audit)
    begun = asyncio.Event()

    async def create(request: Any, context: Any) -> Any:
        begun.set()
        await asyncio.Event().wait()

    async with probe(gate=given.gate, create=create) as server:
        call = server.create(**given.ann)
        await soon(begun.wait())
        call.cancel()
        await _until(lambda: _has(audit, 1))
    assert lines_of(audit)[0]["code"] == "CANCELLED"


async def _has(path: Path, count: int) -> bool:
    return len(lines_of(path)) == count


def written(audit: Audit) -> None:
    call = Call("r1", peer="ipv4:192.0.2.2:50000")
    audit.write(Caller("acme", "ann"), call, f"/{RETRIEVAL}/CreateCorpus", "OK", 0.1)


def test_an_audit_file_that_was_moved_away_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    audit = Audit(path)
    written(audit)
    path.rename(tmp_path / "audit.1")
    written(audit)
    assert len(lines_of(path)) == len(lines_of(tmp_path / "audit.1")) == 1


def test_what_a_full_disk_does_not_take_is_in_the_error_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    written(Audit(Path("/dev/full")))
    (record,) = caplog.records
    assert record.levelno == logging.ERROR and "No space left" in record.getMessage()
    assert '"principal": "ann"' in record.getMessage()


async def test_a_full_disk_stops_no_call(tmp_path: Path) -> None:
    given = Given(tmp_path, Limits(), Path("/dev/full"))
    async with probe(gate=given.gate) as server:
        await server.create(**given.ann)


def test_an_audit_file_that_cannot_be_opened_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        Audit(tmp_path / "none" / "audit.jsonl")


def test_without_a_file_the_log_has_the_lines_whatever_its_level(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.ERROR):
        caplog.handler.setLevel(logging.NOTSET)
        written(Audit())
    (record,) = caplog.records
    assert record.name == "audit" and json.loads(record.getMessage())["principal"] == "ann"
