"""TUNED and HYBRID answers, and the forwarded methods of tuning, with fakes behind the gateway."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from tworoads.v1 import answer_pb2, retrieval_pb2
from tworoads.v1 import tuning_pb2 as pb
from tworoads.v1.answer_pb2_grpc import AnswerServiceStub
from tworoads.v1.retrieval_pb2 import PATH_BASE, PATH_HYBRID, PATH_RAG, PATH_TUNED
from tworoads.v1.tuning_pb2_grpc import TuningServiceStub

from services.gateway import adapters
from services.gateway.adapters import Adapters
from services.gateway.forward import PUBLIC
from services.prompts import words
from services.runtime import interceptors
from services.runtime.call import Call, current
from services.runtime.channel import connect
from services.runtime.errors import (
    InvalidInput,
    NotFound,
    NotReady,
    Overloaded,
    TooLate,
    Unavailable,
)
from services.runtime.status import real_status
from tests.fake_tuning import TUNING, FakeTuning, serving
from tests.small_stack import ANSWERS, SmallStack, small_stack
from tests.test_gateway import events, kinds, reason_of
from tests.test_retrieval import END, document, start

LEAVE = "Employees get 27 days of paid leave. Ask for leave ten days ahead."
PATHS = {"base": PATH_BASE, "rag": PATH_RAG, "tuned": PATH_TUNED, "hybrid": PATH_HYBRID}
DEGRADABLE = answer_pb2.AnswerOptions(allow_degraded=True)
MEBIBYTE = 1024 * 1024


class Tuning(FakeTuning):
    """Refuses the third chunk of an upload; downloads 64 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0  # chunks of a download
        self.meeting: asyncio.Barrier | None = None  # another call that must be under way too

    async def GetAdapter(self, request, context):
        if self.meeting:
            await self.meeting.wait()
        return await super().GetAdapter(request, context)

    async def DeleteAdapter(self, request, context):
        found = self._find(request.adapter)
        self.kept.remove(found)
        return pb.DeleteAdapterResponse()

    async def CreateJob(self, requests, context):
        received = 0
        async for _ in requests:
            received += 1
            yield pb.CreateJobResponse(progress=pb.CheckProgress(received=received))
            if received == 3:
                raise InvalidInput("EXAMPLES_INVALID", "line 3 is wrong")

    async def ImportAdapter(self, requests, context):
        received = 0
        async for _ in requests:
            received += 1
            if received == 3:
                raise InvalidInput("FILE_TOO_LARGE", "too large")
        return pb.ImportAdapterResponse()

    async def DownloadAdapter(self, request, context):
        for index in range(64):
            self.sent += 1
            chunk = pb.DownloadChunk(offset=index * MEBIBYTE, data=bytes(MEBIBYTE))
            yield pb.DownloadAdapterResponse(chunk=chunk)


@pytest.fixture
async def stack(tmp_path) -> AsyncIterator[SmallStack]:
    async with small_stack(tmp_path, Tuning()) as running:
        for name in ("c", "empty"):
            await running.retrieval.CreateCorpus(retrieval_pb2.CreateCorpusRequest(name=name))
        parts = [start(), *document("leave", LEAVE, title="Leave"), END]
        async for _ in running.retrieval.PutDocuments(iter(parts)):
            pass
        yield running


@pytest.fixture
async def channel(stack) -> AsyncIterator[grpc.aio.Channel]:
    async with connect(stack.address, ANSWERS, TUNING) as opened:
        yield opened


@pytest.fixture
def answers(channel) -> AnswerServiceStub:
    return AnswerServiceStub(channel)


@pytest.fixture
def tuning(channel) -> TuningServiceStub:
    return TuningServiceStub(channel)


async def started(answers: AnswerServiceStub, **fields) -> answer_pb2.AnswerStarted:
    return (await events(answers, **fields))[0].started


async def set_policy(stack: SmallStack, path: str, adapter: str) -> None:
    request = retrieval_pb2.SetPolicyRequest(corpus="c", path=PATHS[path], adapter=adapter)
    await stack.retrieval.SetPolicy(request)


async def test_tuned_asks_the_adapter_alone_and_says_which(stack, answers):
    adapter = stack.tuning.add("style")
    found = await events(answers, path=PATH_TUNED, adapter="style")
    assert kinds(found) == ["started", "text", "finished"]
    begun = found[0].started
    assert (begun.path, begun.reason, begun.adapter) == (PATH_TUNED, "ASKED", adapter.id)
    [request] = stack.generation.requests
    assert request.adapter == adapter.id
    assert not any(part.droppable for message in request.messages for part in message.parts)
    assert not list(found[-1].finished.degraded)


async def test_hybrid_shows_passages_to_the_adapter_and_cites_as_rag_does(stack, answers):
    adapter = stack.tuning.add("style", context=pb.TRAINING_CONTEXT_RETRIEVED)
    stack.generation.answer = "Employees get 27 days of paid leave. They get 99 days of holiday."
    asked = {"corpus": "c", "adapter": "style"}
    hybrid = await events(answers, path=PATH_HYBRID, **asked)
    rag = await events(answers, path=PATH_RAG, **asked)
    assert hybrid[0].started.adapter == adapter.id and hybrid[0].started.corpus_version
    assert kinds(hybrid) == kinds(rag)
    assert [e for e in hybrid if e.HasField("citation") or e.HasField("unsupported")] == [
        e for e in rag if e.HasField("citation") or e.HasField("unsupported")
    ]
    assert [request.adapter for request in stack.generation.requests] == [adapter.id, ""]
    assert stack.tuning.asked == ["style"]  # RAG asks for none


async def test_hybrid_without_evidence_writes_nothing(stack, answers):
    stack.tuning.add("style")
    found = await events(answers, path=PATH_HYBRID, corpus="empty", adapter="style")
    assert kinds(found) == ["started", "passages", "finished"]
    assert found[-1].finished.reason == answer_pb2.ANSWER_FINISH_REASON_NO_EVIDENCE
    assert not stack.generation.requests


async def test_the_adapter_is_looked_up_while_the_corpus_is_searched(stack, answers):
    stack.tuning.add("style")
    stack.tuning.meeting = stack.embedding.meeting = asyncio.Barrier(2)
    found = await events(answers, path=PATH_HYBRID, corpus="c", adapter="style")
    assert not list(found[-1].finished.degraded)


async def test_a_name_means_its_newest_version_at_every_question(stack, answers):
    first = stack.tuning.add("style")
    assert (await started(answers, path=PATH_TUNED, adapter="style")).adapter == first.id
    second = stack.tuning.add("style")
    assert (await started(answers, path=PATH_TUNED, adapter="style")).adapter == second.id
    assert (await started(answers, path=PATH_TUNED, adapter=first.id)).adapter == first.id


async def test_an_adapter_is_asked_in_the_words_that_it_was_trained_with(
    stack, answers, monkeypatch
):
    older = {**words._words("v1"), "question": {"before": "Q> "}, "stop": ["\nQ>"]}
    newest = words._words
    monkeypatch.setattr(words, "_words", lambda name: older if name == "v0" else newest(name))
    monkeypatch.setattr(adapters, "VERSIONS", ("v1", "v0"))
    stack.tuning.add("style", prompt_version="v0")
    await events(answers, path=PATH_TUNED, adapter="style")
    await events(answers, path=PATH_BASE)
    tuned, base = stack.generation.requests
    assert tuned.messages[-1].parts[-1].text == "Q> How many days of leave?"
    assert list(tuned.options.stop) == ["\nQ>"]
    assert base.messages[-1].parts[-1].text == "Question: How many days of leave?"


async def test_words_that_this_server_does_not_know_are_refused(stack, answers):
    stack.tuning.add("style", prompt_version="v99")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await events(answers, path=PATH_TUNED, adapter="style")
    expected = (grpc.StatusCode.FAILED_PRECONDITION, "PROMPT_VERSION_UNKNOWN")
    assert reason_of(error) == expected


AWAY = [Unavailable("GONE", "secret"), Overloaded("QUEUE_FULL", ""), TooLate("DEADLINE", "")]


@pytest.mark.parametrize("error", AWAY, ids=lambda error: error.reason)
async def test_with_tuning_away_an_adapter_that_was_seen_goes_on(stack, answers, error):
    adapter = stack.tuning.add("style")
    await events(answers, path=PATH_TUNED, adapter="style")
    stack.tuning.error = error
    for path, corpus in ((PATH_TUNED, ""), (PATH_HYBRID, "c"), (PATH_HYBRID, "empty")):
        by_name = await events(answers, path=path, corpus=corpus, adapter="style")
        assert by_name[0].started.adapter == adapter.id
        assert list(by_name[-1].finished.degraded) == ["TUNING"]
    by_id = await events(answers, path=PATH_TUNED, adapter=adapter.id)
    assert by_id[0].started.adapter == adapter.id
    assert not list(by_id[-1].finished.degraded)


@pytest.mark.parametrize("error", AWAY, ids=lambda error: error.reason)
async def test_with_tuning_away_an_adapter_that_was_never_seen_is_unavailable(
    stack, answers, error
):
    adapter = stack.tuning.add("style")
    stack.tuning.error = error
    for asked in ("style", adapter.id):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await events(answers, path=PATH_TUNED, adapter=asked)
        assert reason_of(raised) == (grpc.StatusCode.UNAVAILABLE, "TUNING_UNAVAILABLE")
        assert "secret" not in raised.value.details()


@pytest.mark.parametrize("by_name", [True, False])
async def test_a_deleted_adapter_is_forgotten(stack, answers, by_name):
    adapter = stack.tuning.add("style")
    await events(answers, path=PATH_TUNED, adapter="style")
    stack.tuning.kept.clear()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await events(answers, path=PATH_TUNED, adapter="style" if by_name else adapter.id)
    assert reason_of(error) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")
    stack.servers["tuning"]._calls.serving = False
    for asked in ("style", adapter.id):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await events(answers, path=PATH_TUNED, adapter=asked)
        assert reason_of(error) == (grpc.StatusCode.UNAVAILABLE, "TUNING_UNAVAILABLE")


async def test_an_adapter_that_is_deleted_here_is_forgotten_though_tuning_goes_away(
    stack, answers, tuning
):
    deleted, other = stack.tuning.add("style"), stack.tuning.add("other")
    for name in ("style", "other"):
        await events(answers, path=PATH_TUNED, adapter=name)
    await tuning.DeleteAdapter(pb.DeleteAdapterRequest(adapter=deleted.id))
    stack.tuning.error = Unavailable("GONE", "")
    with pytest.raises(grpc.aio.AioRpcError):  # what was not deleted is not forgotten
        await tuning.DeleteAdapter(pb.DeleteAdapterRequest(adapter=other.id))
    for asked in ("style", deleted.id):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await events(answers, path=PATH_TUNED, adapter=asked)
        assert reason_of(error) == (grpc.StatusCode.UNAVAILABLE, "TUNING_UNAVAILABLE")
    assert (await started(answers, path=PATH_TUNED, adapter="other")).adapter == other.id


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotReady("ADAPTER_VERIFYING", "it is being measured"), "FAILED_PRECONDITION"),
        (NotReady("ADAPTER_NOT_ACCEPTED", "accept it first"), "FAILED_PRECONDITION"),
        (NotReady("ADAPTER_INCOMPATIBLE", "of another model"), "FAILED_PRECONDITION"),
        (NotFound("ADAPTER_NOT_FOUND", "it is gone"), "NOT_FOUND"),
        (Overloaded("ADAPTERS_FULL", "all places are in use"), "RESOURCE_EXHAUSTED"),
    ],
)
async def test_what_generation_says_of_an_adapter_comes_after_started_as_it_is(
    stack, answers, error, code
):
    adapter = stack.tuning.add("style", pb.ADAPTER_STATE_VERIFYING)
    await events(answers, path=PATH_BASE)  # the model's name is known from here on
    stack.generation.error = error
    request = answer_pb2.AnswerRequest(question="What?", path=PATH_TUNED, adapter="style")
    found = []
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async for response in answers.Answer(request):
            found.append(response)
    assert [response.started.adapter for response in found] == [adapter.id]
    assert reason_of(raised) == (grpc.StatusCode[code], error.reason)
    assert raised.value.details() == str(error)


@pytest.mark.parametrize(
    ("path", "context", "warnings"),
    [
        (PATH_TUNED, pb.TRAINING_CONTEXT_NONE, []),
        (PATH_TUNED, pb.TRAINING_CONTEXT_MIXED, []),
        (PATH_TUNED, pb.TRAINING_CONTEXT_UNSPECIFIED, []),
        (PATH_TUNED, pb.TRAINING_CONTEXT_RETRIEVED, ["ADAPTER_NEEDS_CONTEXT"]),
        (PATH_HYBRID, pb.TRAINING_CONTEXT_NONE, ["ADAPTER_WITHOUT_CONTEXT"]),
        (PATH_HYBRID, pb.TRAINING_CONTEXT_MIXED, []),
        (PATH_HYBRID, pb.TRAINING_CONTEXT_UNSPECIFIED, []),
        (PATH_HYBRID, pb.TRAINING_CONTEXT_RETRIEVED, []),
    ],
)
async def test_started_warns_of_an_adapter_on_a_path_that_it_was_not_trained_for(
    stack, answers, path, context, warnings
):
    stack.tuning.add("style", context=context)
    begun = await started(answers, path=path, corpus="c", adapter="style")
    assert list(begun.warnings) == warnings
    assert ("in training" in begun.explanation) == bool(warnings)


async def test_auto_follows_a_policy_that_names_an_adapter(stack, answers):
    adapter = stack.tuning.add("style")
    await set_policy(stack, "tuned", adapter.id)
    embedded = len(stack.embedding.embedded)
    found = await events(answers, corpus="c")
    begun = found[0].started
    assert (begun.path, begun.reason, begun.adapter) == (PATH_TUNED, "POLICY", adapter.id)
    assert kinds(found) == ["started", "text", "finished"]
    assert len(stack.embedding.embedded) == embedded  # nothing was searched
    await set_policy(stack, "hybrid", adapter.id)
    begun = await started(answers, corpus="c")
    assert (begun.path, begun.reason, begun.adapter) == (PATH_HYBRID, "POLICY", adapter.id)
    stack.servers["tuning"]._calls.serving = False
    found = await events(answers, corpus="c")
    assert (found[0].started.path, found[0].started.reason) == (PATH_HYBRID, "POLICY")
    assert not list(found[-1].finished.degraded)


@pytest.mark.parametrize("path", ["tuned", "hybrid"])
@pytest.mark.parametrize(
    ("why", "said"),
    [
        ("deleted", "no adapter of this name"),
        ("away", "is away"),
        ("broken", "failed"),
        ("measured", "still being measured"),
        ("unknown words", "prompt version"),
    ],
)
async def test_auto_searches_when_the_adapter_of_its_policy_cannot_be_used(
    stack, answers, path, why, said
):
    state = pb.ADAPTER_STATE_VERIFYING if why == "measured" else pb.ADAPTER_STATE_READY
    version = "v99" if why == "unknown words" else "v1"
    adapter = stack.tuning.add("style", state, prompt_version=version)
    await set_policy(stack, path, adapter.id)
    if why == "deleted":
        stack.tuning.kept.clear()
    if why == "away":
        stack.servers["tuning"]._calls.serving = False
    if why == "broken":
        stack.tuning.error = RuntimeError("secret")
    found = await events(answers, corpus="c")
    begun = found[0].started
    assert (begun.path, begun.reason, begun.adapter) == (PATH_RAG, "POLICY_CLOSED", "")
    assert said in begun.explanation
    assert found[1].passages.passages[0].document_id == "leave"
    assert stack.generation.requests[0].adapter == ""


@pytest.mark.parametrize("path", ["tuned", "hybrid"])
@pytest.mark.parametrize(
    "error",
    [
        NotFound("ADAPTER_NOT_FOUND", "it is gone"),
        NotReady("ADAPTER_VERIFYING", "it is being measured"),
        NotReady("ADAPTER_NOT_ACCEPTED", "accept it first"),
        NotReady("ADAPTER_ALTERED", "its files were altered"),
        NotReady("ADAPTER_INCOMPATIBLE", "of another model"),
        Overloaded("ADAPTERS_FULL", "all places are in use"),
        Overloaded("STORE_FULL", "the disk is full"),
        Unavailable("TUNING_UNAVAILABLE", "cannot answer now"),
    ],
    ids=lambda error: error.reason,
)
async def test_auto_searches_when_generation_refuses_the_adapter_of_the_policy(
    stack, answers, path, error
):
    await set_policy(stack, path, stack.tuning.add("style").id)
    stack.generation.adapter_error = error
    embedded = len(stack.embedding.embedded)
    found = await events(answers, corpus="c")
    assert kinds(found)[:3] == ["started", "passages", "text"] and kinds(found)[-1] == "finished"
    assert kinds(found).count("started") == kinds(found).count("passages") == 1
    begun = found[0].started
    assert (begun.path, begun.reason, begun.adapter) == (PATH_RAG, "POLICY_CLOSED", "")
    assert str(error) in begun.explanation and begun.corpus_version
    assert [request.adapter for request in stack.generation.requests] == [""]
    assert len(stack.embedding.embedded) == embedded + 1  # searched once


async def test_auto_with_neither_adapter_nor_retrieval_degrades_if_the_caller_allows_it(
    stack, answers
):
    await set_policy(stack, "tuned", stack.tuning.add("style").id)
    stack.generation.adapter_error = Overloaded("ADAPTERS_FULL", "all places are in use")
    stack.embedding.error = Unavailable("STOPPING", "")
    by_vector = answer_pb2.AnswerOptions(
        allow_degraded=True, search_mode=retrieval_pb2.SEARCH_MODE_VECTOR
    )
    begun = await started(answers, corpus="c", options=by_vector)
    assert (begun.path, begun.reason) == (PATH_BASE, "DEGRADED")


async def test_what_generation_fails_with_otherwise_does_not_close_a_policy(stack, answers):
    await set_policy(stack, "hybrid", stack.tuning.add("style").id)
    stack.generation.adapter_error = Overloaded("QUEUE_FULL", "try again later")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await events(answers, corpus="c")
    assert reason_of(error) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")


async def test_an_unfaithful_adapter_that_was_accepted_keeps_its_policy(stack, answers):
    adapter = stack.tuning.add("style", pb.ADAPTER_STATE_UNFAITHFUL, accepted_by="me")
    await set_policy(stack, "tuned", adapter.id)
    assert (await started(answers, corpus="c")).reason == "POLICY"


async def test_retrieval_away_makes_hybrid_tuned_if_the_caller_allows_it(stack, answers):
    adapter = stack.tuning.add("style", context=pb.TRAINING_CONTEXT_RETRIEVED)
    stack.servers["retrieval"]._calls.serving = False
    asked = {"path": PATH_HYBRID, "corpus": "c", "adapter": "style"}
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await events(answers, **asked)
    assert reason_of(error) == (grpc.StatusCode.UNAVAILABLE, "RETRIEVAL_UNAVAILABLE")
    found = await events(answers, **asked, options=DEGRADABLE)
    begun = found[0].started
    assert (begun.path, begun.reason, begun.adapter) == (PATH_TUNED, "DEGRADED", adapter.id)
    assert list(begun.warnings) == ["ADAPTER_NEEDS_CONTEXT"]
    assert list(found[-1].finished.degraded) == ["RETRIEVAL"]
    assert stack.generation.requests[0].adapter == adapter.id


async def test_what_is_known_of_adapters_is_kept_by_tenant_and_bounded(monkeypatch):
    monkeypatch.setattr(adapters, "MOST_KNOWN", 4)  # two adapters, each by name and by id
    fake = FakeTuning()
    theirs = fake.add("style", tenant="theirs")
    for name in ("one", "two", "style"):
        fake.add(name, tenant="mine")
    async with serving(fake) as address, connect(address, TUNING) as channel:
        looked_up = Adapters(TuningServiceStub(channel))
        current.set(Call(tenant="mine"))
        for name in ("one", "two", "style"):
            await looked_up.resolve(name)
        fake.error = Unavailable("GONE", "")
        current.set(Call(tenant="theirs"))
        looked_up.forget("two")  # not theirs to forget
        current.set(Call(tenant="mine"))
        assert not (await looked_up.resolve("two")).newest
        with pytest.raises(Unavailable):
            await looked_up.resolve("one")  # put out by the others
        current.set(Call(tenant="theirs"))
        with pytest.raises(Unavailable):
            await looked_up.resolve("style")
        fake.error = None
        assert (await looked_up.resolve("style")).id == theirs.id


def test_all_methods_of_tuning_are_public():
    methods = pb.DESCRIPTOR.services_by_name["TuningService"].methods
    assert sorted(PUBLIC[TUNING]) == sorted(method.name for method in methods)


@pytest.mark.parametrize("size", [10, 64 * 1024])
@pytest.mark.parametrize("ends", [True, False])
async def test_an_upload_that_is_refused_half_way_fails_with_the_reason(tuning, size, ends):
    left = asyncio.Event()

    async def parts(message):
        for index in range(100):
            yield message
            if not ends and index == 3:
                await left.wait()

    for _ in range(20):  # gRPC loses the reason in a race, about every second time
        job = tuning.CreateJob(parts(pb.CreateJobRequest(examples=bytes(size))))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            async with real_status(job):
                assert [r.progress.received async for r in job] == [1, 2, 3]
        assert reason_of(error) == (grpc.StatusCode.INVALID_ARGUMENT, "EXAMPLES_INVALID")
        imported = tuning.ImportAdapter(parts(pb.ImportAdapterRequest(chunk=bytes(size))))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            async with real_status(imported):
                await imported
        assert reason_of(error) == (grpc.StatusCode.INVALID_ARGUMENT, "FILE_TOO_LARGE")
    left.set()


async def test_an_import_that_falls_silent_is_ended_with_its_reason(tuning, monkeypatch):
    monkeypatch.setattr(interceptors, "IDLE_SECONDS", 0.2)

    async def parts():
        yield pb.ImportAdapterRequest()
        await asyncio.Event().wait()

    with pytest.raises(grpc.aio.AioRpcError) as error:
        await tuning.ImportAdapter(parts())
    assert reason_of(error) == (grpc.StatusCode.DEADLINE_EXCEEDED, "IDLE")


async def test_a_download_goes_no_faster_than_it_is_taken(stack, tuning):
    call = tuning.DownloadAdapter(pb.DownloadAdapterRequest(adapter="style"))
    await call.read()
    before = -1
    while stack.tuning.sent > before:  # until what is on the way is full
        before = stack.tuning.sent
        await asyncio.sleep(0.5)
    assert stack.tuning.sent < 32
    taken = 1
    while await call.read() is not grpc.aio.EOF:
        taken += 1
    assert taken == 64
