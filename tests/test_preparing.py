"""What examples are shown and how they are rendered, over real retrieval with a fake embedder."""

import asyncio
import errno
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tworoads.v1 import generation_pb2, retrieval_pb2
from tworoads.v1.answer_pb2 import AnswerRequest, Turn
from tworoads.v1.answer_pb2_grpc import AnswerServiceStub
from tworoads.v1.generation_pb2_grpc import GenerationServiceStub

from services.generation.checks import conversation as received
from services.prompts.rendering import Renderer
from services.prompts.words import Message, conversation
from services.runtime.channel import connect
from services.runtime.errors import InvalidInput, NotFound, Overloaded, Unavailable
from services.tuning.data import retrieval as asking
from services.tuning.data.examples import Example
from services.tuning.data.preparing import check_references, prepare
from services.tuning.job import Options, Probe
from tests.fake_engine import NAME, FakeEngine, serving
from tests.small_stack import ANSWERS, SmallStack, small_stack
from tests.test_retrieval import END, document, start
from tests.tiny_tokenizer import TinyTokenizer

CONTEXT = 4000  # the tiny tokenizer has a token a byte
RENDERER = Renderer(TinyTokenizer())
ROLES = {
    "system": generation_pb2.ROLE_SYSTEM,
    "user": generation_pb2.ROLE_USER,
    "assistant": generation_pb2.ROLE_ASSISTANT,
}
RETRIEVED = Options(context="retrieved")


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[SmallStack]:
    """Corpus "c" has twelve documents about boxes, "other" has one."""
    async with small_stack(tmp_path / "store") as running:
        for corpus, count in (("c", 12), ("other", 1)):
            request = retrieval_pb2.CreateCorpusRequest(name=corpus)
            await running.retrieval.CreateCorpus(request)
            parts = [start(corpus)]
            for i in range(count):
                text = f"The box of number {i} holds {i * 7} owls. It stands in room {i % 3}."
                parts += document(f"box{i}", text, title=f"Box {i}")
            async for _ in running.retrieval.PutDocuments(iter([*parts, END])):
                pass
        yield running


def boxes(count: int = 12, relevant: bool = True) -> list[Example]:
    return [
        Example(
            i + 1,
            f"How many owls are in the box of number {i}?",
            str(i * 7),
            relevant=(f"box{i}",) if relevant else (),
        )
        for i in range(count)
    ]


async def prepared(
    stack: SmallStack | None,
    folder: Path,
    examples: Sequence[Example],
    options: Options = RETRIEVED,
    held_out: Sequence[int] = (),
    context_length: int = CONTEXT,
) -> tuple[list[dict[str, Any]], list[Probe]]:
    retrieval = stack.retrieval if stack else None
    probes = await prepare(
        folder, examples, held_out, options, "c", "v1", RENDERER, context_length, retrieval
    )
    return [json.loads(line) for line in (folder / "training.jsonl").open()], probes


def text(line: dict[str, Any]) -> str:
    return TinyTokenizer().text(line["prompt"])


def shown(messages: Sequence[Message]) -> list[str]:
    """The numbers of the boxes whose passages are shown, in order."""
    parts = [part.text for part in messages[-1].parts if part.droppable]
    return [part.split("number ")[1].split()[0] for part in parts]


def sent(messages: Sequence[Message]) -> list[generation_pb2.Message]:
    return [
        generation_pb2.Message(
            role=ROLES[message.role],
            parts=[
                generation_pb2.Part(text=part.text, id=part.id, droppable=part.droppable)
                for part in message.parts
            ],
        )
        for message in messages
    ]


async def test_without_context_each_example_is_asked_as_tuned_answers_are(tmp_path):
    lines, probes = await prepared(None, tmp_path, boxes(), Options(), held_out=[3, 5])
    assert len(lines) == len(probes) == 12  # all are probes: there are fewer than 16
    for example, line, probe in zip(boxes(), lines, probes, strict=True):
        prompt, answer = RENDERER.exchange(conversation(example.question), example.answer, CONTEXT)
        assert (line["prompt"], line["answer"]) == (prompt.token_ids, answer)
        assert probe.continuation == example.answer
    assert [index for index, line in enumerate(lines) if line["held_out"]] == [3, 5]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["training.jsonl"]


async def test_with_context_the_gold_passage_is_among_three_in_any_place(stack, tmp_path):
    _, probes = await prepared(stack, tmp_path, boxes())
    places = set()
    for i, probe in enumerate(probes):
        numbers = shown(probe.messages)
        assert len(set(numbers)) == len(numbers) == 3
        places.add(numbers.index(str(i)))
    assert places == {0, 1, 2}


async def test_gold_that_the_search_misses_replaces_the_last_distractors(stack, tmp_path):
    question = "How many owls are in the box of number 1?"
    plain, missed, two = (
        Example(1, question, "x"),
        Example(2, question, "x", relevant=("box9",)),
        Example(3, question, "x", relevant=("box9", "box8")),
    )
    _, probes = await prepared(stack, tmp_path, [plain, missed, two])
    found, one_gold, two_gold = (shown(probe.messages) for probe in probes)
    assert not {"8", "9"} & set(found)
    assert sorted(one_gold) == sorted([*found[:2], "9"])
    assert sorted(two_gold) == sorted([*found[:1], "8", "9"])


@pytest.mark.parametrize("history", [(), (("Which box of number 3?", "The red one."),)])
async def test_an_example_without_gold_sees_what_the_gateway_shows(stack, tmp_path, history):
    example = Example(1, "And how many owls does it hold?", "21", history)
    [line], [probe] = await prepared(stack, tmp_path, [example])
    async with connect(stack.address, ANSWERS) as channel:
        request = AnswerRequest(
            question=example.question,
            path=retrieval_pb2.PATH_RAG,
            corpus="c",
            history=[Turn(question=asked, answer=answered) for asked, answered in history],
        )
        _ = [event async for event in AnswerServiceStub(channel).Answer(request)]
    [asked] = stack.generation.requests
    assert received(asked.messages) == list(probe.messages)
    assert RENDERER.render(received(asked.messages), CONTEXT).token_ids == line["prompt"]


async def test_the_tokens_trained_on_are_those_that_score_renders(stack, tmp_path):
    engine = FakeEngine()
    engine.model = replace(engine.model, context_length=900)
    mixed = Options(context="mixed")
    lines, probes = await prepared(stack, tmp_path, boxes(), mixed, context_length=900)
    nobody = stack.address  # no adapter is asked for
    async with (
        serving(engine, tmp_path / "adapters", nobody) as (_, address),
        connect(address, NAME) as channel,
    ):
        for probe in probes:
            response = await GenerationServiceStub(channel).Score(
                generation_pb2.ScoreRequest(
                    messages=sent(probe.messages), continuation=probe.continuation
                )
            )
            assert response.prompt_hash == probe.prompt_hash != ""
    assert [(line["prompt"], line["answer"]) for line in lines] == [
        (prompt, answer) for prompt, answer, _ in engine.scored
    ]


async def test_what_does_not_fit_goes_before_the_gold_passage_does(stack, tmp_path):
    whole, _ = await prepared(stack, tmp_path, boxes())
    longest = max(len(line["prompt"]) + len(line["answer"]) for line in whole) + 1
    most = []
    for less in (0, 20, 100, 180):  # a passage has about 70 tokens
        length = longest - less
        lines, probes = await prepared(stack, tmp_path, boxes(), context_length=length)
        numbers = [shown(probe.messages) for probe in probes]
        for i, (line, probe) in enumerate(zip(lines, probes, strict=True)):
            assert len(line["prompt"]) + len(line["answer"]) < length
            assert str(i) in numbers[i] or not numbers[i]
            if not numbers[i]:  # nothing fits: asked as one that is shown nothing
                assert probe.messages == tuple(conversation(boxes()[i].question))
        most.append(max(map(len, numbers)))
    assert most == [3, 2, 1, 0]


async def test_a_third_of_the_mixed_examples_sees_no_passages(stack, tmp_path):
    examples = boxes() + [replace(e, line=e.line + 12) for e in boxes(relevant=False)]
    lines, _ = await prepared(stack, tmp_path, examples, Options(context="mixed"))
    plain = [index for index, line in enumerate(lines) if "Passages:" not in text(line)]
    assert len(plain) == 8
    again, _ = await prepared(stack, tmp_path, examples, Options(context="mixed"))
    assert again == lines
    other, _ = await prepared(stack, tmp_path, examples, Options(context="mixed", seed=1))
    assert plain != [i for i, line in enumerate(other) if "Passages:" not in text(line)]


@pytest.mark.parametrize(
    ("count", "held_out", "probes", "of_these_held_out"),
    [(100, 40, 32, 32), (100, 20, 20, 20), (100, 3, 16, 3), (100, 0, 16, 0), (8, 1, 8, 1)],
)
async def test_probes_are_held_out_answers_and_others_only_where_these_are_few(
    tmp_path, count, held_out, probes, of_these_held_out
):
    examples = [Example(i + 1, f"Question {i}?", f"Answer {i}.") for i in range(count)]
    lines, found = await prepared(
        None, tmp_path, examples, Options(), held_out=range(0, 2 * held_out, 2)
    )
    chosen = [index for index, line in enumerate(lines) if line["probe"]]
    assert [probe.continuation for probe in found] == [f"Answer {i}." for i in chosen]
    assert len(found) == probes
    assert sum(lines[index]["held_out"] for index in chosen) == of_these_held_out


async def test_an_example_s_own_corpus_is_searched(stack, tmp_path):
    example = Example(1, "How many owls?", "0", corpus="other")
    _, [probe] = await prepared(stack, tmp_path, [example])
    assert shown(probe.messages) == ["0"]


async def test_where_nothing_is_found_nothing_is_shown(stack, tmp_path):
    await stack.retrieval.CreateCorpus(retrieval_pb2.CreateCorpusRequest(name="empty"))
    example = Example(1, "How many owls?", "0", corpus="empty")
    _, [probe] = await prepared(stack, tmp_path, [example])
    assert probe.messages == tuple(conversation(example.question))


async def test_progress_is_told_after_every_few_examples(tmp_path):
    told = []
    examples = boxes() * 12
    await prepare(
        tmp_path, examples, (), Options(), "", "v1", RENDERER, CONTEXT, None,
        lambda done, of: told.append((done, of)),
    )  # fmt: skip
    assert told == [(64, 144), (128, 144), (144, 144)]


async def test_with_retrieval_away_it_says_so_and_leaves_nothing(stack, tmp_path):
    await stack.servers["retrieval"].drain()
    for work in (
        prepared(stack, tmp_path, boxes()),
        check_references(stack.retrieval, boxes(), "c", "mixed"),
    ):
        with pytest.raises(Unavailable) as error:
            await work
        assert error.value.reason == "RETRIEVAL_UNAVAILABLE"
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


async def test_a_corpus_that_is_gone_is_an_error_and_what_was_written_before_stands(
    stack, tmp_path
):
    await prepared(stack, tmp_path, boxes())
    before = (tmp_path / "training.jsonl").read_bytes()
    with pytest.raises(NotFound) as error:
        await prepared(stack, tmp_path, [Example(1, "Who?", "x", corpus="gone")])
    assert error.value.reason == "CORPUS_NOT_FOUND"
    assert (tmp_path / "training.jsonl").read_bytes() == before


async def test_a_full_disk_is_an_error_and_leaves_nothing(stack, tmp_path, monkeypatch):
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr("services.tuning.data.preparing.os.fsync", full)
    with pytest.raises(Overloaded) as error:
        await prepared(stack, tmp_path, boxes())
    assert error.value.reason == "STORE_FULL"
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


async def test_a_cancelled_preparation_leaves_nothing(stack, tmp_path):
    started = asyncio.Event()
    work = asyncio.create_task(
        prepare(
            tmp_path, boxes() * 20, (), RETRIEVED, "c", "v1", RENDERER, CONTEXT, stack.retrieval,
            lambda done, of: started.set(),
        )
    )  # fmt: skip
    await started.wait()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


# What examples refer to


@pytest.mark.parametrize("listed", [0, 1000])  # documents are looked up one by one, or listed
async def test_each_line_that_refers_to_nothing_is_named_once(stack, monkeypatch, listed):
    monkeypatch.setattr(asking, "LISTED", listed)
    monkeypatch.setattr(asking, "PAGE", 5)
    bad = [
        Example(20, "a", "x", relevant=("box1", "none", "box99")),
        Example(21, "b", "x", relevant=("box1",), corpus="other"),
        Example(22, "c", "x", relevant=("box1",), corpus="gone"),
        Example(23, "d", "x", corpus="gone"),
    ]
    findings = await check_references(stack.retrieval, [*boxes(), *bad], "c", "retrieved")
    assert [(f.line, f.severity, f.reason) for f in findings] == [
        (20, "error", "DOCUMENT_NOT_FOUND"),
        (21, "error", "DOCUMENT_NOT_FOUND"),
        (22, "error", "CORPUS_NOT_FOUND"),
        (23, "error", "CORPUS_NOT_FOUND"),
    ]
    assert "none" in findings[0].message and "box99" in findings[0].message


async def test_without_context_nothing_is_looked_up(stack):
    await stack.servers["retrieval"].drain()
    bad = [Example(1, "a", "x", relevant=("none",), corpus="gone"), Example(2, "b", "x")]
    assert await check_references(stack.retrieval, bad, "", "none") == []


@pytest.mark.parametrize(
    ("corpus", "error", "reason"),
    [("", InvalidInput, "CORPUS_MISSING"), ("gone", NotFound, "CORPUS_NOT_FOUND")],
)
async def test_examples_that_name_no_corpus_need_the_one_that_is_given(
    stack, corpus, error, reason
):
    named = [replace(example, corpus="c") for example in boxes()]
    assert await check_references(stack.retrieval, named, corpus, "mixed") == []
    with pytest.raises(error) as raised:
        await check_references(stack.retrieval, [*named, *boxes(1)], corpus, "mixed")
    assert raised.value.reason == reason
