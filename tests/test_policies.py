"""Policies by type of question: what may be set, and how AUTO follows them."""

from collections.abc import AsyncIterator

import grpc
import pytest
from tworoads.v1 import answer_pb2 as pb
from tworoads.v1 import retrieval_pb2
from tworoads.v1.answer_pb2_grpc import AnswerServiceStub
from tworoads.v1.retrieval_pb2 import (
    PATH_AUTO,
    PATH_BASE,
    PATH_HYBRID,
    PATH_RAG,
    PATH_TUNED,
    Router,
    RouterClass,
    TypePath,
)

from services.runtime.channel import connect
from services.runtime.errors import Unavailable
from tests.small_stack import ANSWERS, DIMENSION, SmallStack, small_stack, vector
from tests.test_gateway import events, reason_of
from tests.test_retrieval import END, document, start

FACTS, LABELS = "How many days of leave are there?", "Classify this message for me"


def router(embedder_hash: str = "fake-1") -> Router:
    """Tell the two questions apart by their own vectors."""
    return Router(
        embedder_hash=embedder_hash,
        classes=[
            RouterClass(type="facts", weights=vector(FACTS), bias=0.1),
            RouterClass(type="labels", weights=vector(LABELS), bias=0.1),
        ],
    )


@pytest.fixture
async def stack(tmp_path) -> AsyncIterator[SmallStack]:
    async with small_stack(tmp_path) as running:
        await running.retrieval.CreateCorpus(retrieval_pb2.CreateCorpusRequest(name="c"))
        parts = [start(), *document("leave", "There are 27 days of leave a year."), END]
        async for _ in running.retrieval.PutDocuments(iter(parts)):
            pass
        yield running


@pytest.fixture
async def answers(stack) -> AsyncIterator[AnswerServiceStub]:
    async with connect(stack.address, ANSWERS) as channel:
        yield AnswerServiceStub(channel)


async def set_policy(stack: SmallStack, **fields) -> retrieval_pb2.Policy:
    request = retrieval_pb2.SetPolicyRequest(corpus="c", **fields)
    return (await stack.retrieval.SetPolicy(request)).policy


async def started(answers: AnswerServiceStub, question: str) -> pb.AnswerStarted:
    return (await events(answers, question, corpus="c"))[0].started


async def test_a_policy_by_type_is_kept_as_it_was_set(stack):
    types = [TypePath(type="labels", path=PATH_TUNED, adapter="style@1")]
    await set_policy(stack, path=PATH_RAG, comparison="k1", types=types, router=router())
    request = retrieval_pb2.GetPolicyRequest(corpus="c")
    policy = (await stack.retrieval.GetPolicy(request)).policy
    assert list(policy.types) == types
    assert policy.router == router()


async def test_auto_takes_the_path_of_the_type_of_question(stack, answers):
    types = [TypePath(type="labels", path=PATH_BASE)]
    await set_policy(stack, path=PATH_RAG, comparison="k1", types=types, router=router())
    labels, facts = await started(answers, LABELS), await started(answers, FACTS)
    assert (labels.path, labels.reason) == (PATH_BASE, "POLICY_TYPE")
    assert "labels" in labels.explanation and "k1" in labels.explanation
    assert (facts.path, facts.reason) == (PATH_RAG, "POLICY")
    assert "facts" in facts.explanation


@pytest.mark.parametrize("trouble", ["other_model", "away", "dimension"])
async def test_auto_takes_the_policy_s_own_path_when_types_cannot_be_told(stack, answers, trouble):
    made = router("other" if trouble == "other_model" else "fake-1")
    if trouble == "dimension":
        for entry in made.classes:
            entry.weights.append(1.0)
    if trouble == "away":
        stack.embedding.error = Unavailable("STOPPING", "away")
    types = [TypePath(type="labels", path=PATH_RAG)]
    await set_policy(stack, path=PATH_BASE, types=types, router=made)
    found = await started(answers, LABELS)
    assert (found.path, found.reason) == (PATH_BASE, "POLICY")
    assert "cannot be told" in found.explanation


async def test_the_adapter_of_a_type_that_is_gone_closes_the_policy(stack, answers):
    types = [TypePath(type="labels", path=PATH_TUNED, adapter="gone@1")]
    await set_policy(stack, path=PATH_BASE, types=types, router=router())
    found = await started(answers, LABELS)
    assert (found.path, found.reason) == (PATH_RAG, "POLICY_CLOSED")


async def test_auto_searches_by_words_when_the_corpus_s_embedder_is_gone(stack, answers):
    adapter = stack.tuning.add("style").id
    await set_policy(stack, path=PATH_HYBRID, adapter=adapter)
    stack.embedding.hash = "fake-2"
    found = await events(answers, FACTS, corpus="c")
    assert (found[0].started.path, found[0].started.reason) == (PATH_RAG, "POLICY_CLOSED")
    assert found[0].started.adapter == ""
    assert found[1].passages.passages
    assert list(found[-1].finished.degraded) == ["VECTOR_SEARCH"]


async def test_the_path_that_a_caller_asks_for_is_refused_when_the_embedder_is_gone(stack, answers):
    stack.embedding.hash = "fake-2"
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await events(answers, FACTS, corpus="c", path=PATH_RAG)
    assert reason_of(error) == (grpc.StatusCode.FAILED_PRECONDITION, "EMBEDDER_MISMATCH")


async def test_auto_answers_alone_while_the_corpus_is_empty(stack, answers):
    await stack.retrieval.CreateCorpus(retrieval_pb2.CreateCorpusRequest(name="empty"))
    found = (await events(answers, FACTS, corpus="empty"))[0].started
    assert (found.path, found.reason) == (PATH_BASE, "CORPUS_EMPTY")


def classes(*weights: list[float]) -> list[RouterClass]:
    return [RouterClass(type=f"t{n}", weights=values) for n, values in enumerate(weights)]


ONE = [1.0] * DIMENSION
T0 = [TypePath(type="t0", path=PATH_RAG)]


@pytest.mark.parametrize(
    ("types", "made", "reason"),
    [
        (T0, None, "ROUTER_INVALID"),
        ([], Router(embedder_hash="h", classes=classes(ONE, ONE)), "ROUTER_INVALID"),
        (T0, Router(embedder_hash="", classes=classes(ONE, ONE)), "ROUTER_INVALID"),
        (T0, Router(embedder_hash="h", classes=classes(ONE)), "ROUTER_INVALID"),
        (T0, Router(embedder_hash="h", classes=classes(ONE, ONE[1:])), "ROUTER_INVALID"),
        (T0, Router(embedder_hash="h", classes=classes([], [])), "ROUTER_INVALID"),
        (T0, Router(embedder_hash="h", classes=classes([float("nan")], [0.0])), "ROUTER_INVALID"),
        (T0 * 2, Router(embedder_hash="h", classes=classes(ONE, ONE)), "ROUTER_INVALID"),
        (T0, Router(embedder_hash="h", classes=classes(ONE, ONE)[:1] * 2), "ROUTER_INVALID"),
        (
            [TypePath(type="t9", path=PATH_RAG)],
            Router(embedder_hash="h", classes=classes(ONE, ONE)),
            "ROUTER_INVALID",
        ),
        (
            [TypePath(type="t0", path=PATH_AUTO)],
            Router(embedder_hash="h", classes=classes(ONE, ONE)),
            "PATH_INVALID",
        ),
        (
            [TypePath(type="t0", path=PATH_TUNED)],
            Router(embedder_hash="h", classes=classes(ONE, ONE)),
            "ADAPTER_INVALID",
        ),
    ],
)
async def test_a_bad_policy_by_type_is_refused(stack, types, made, reason):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await set_policy(stack, path=PATH_RAG, types=types, router=made)
    assert reason_of(error) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
