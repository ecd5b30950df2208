"""The Python client against a running gateway, with fake models behind it."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime

import pytest
from grpc import StatusCode
from tworoads.v1.answer_pb2 import AnswerResponse

from clients.client import Client, TworoadsError
from clients.documents import Ingested, NewDocument, Progress
from clients.events import Citation, Finished, Passages, Started, Text, Unsupported, event_of
from services.runtime.errors import Overloaded, Unavailable
from tests.small_stack import SmallStack, small_stack

LEAVE = "Employees get 27 days of paid leave. Ask for leave ten days ahead."
QUESTION = "How many days of leave?"


@pytest.fixture
async def stack(tmp_path) -> AsyncIterator[SmallStack]:
    async with small_stack(tmp_path) as running:
        yield running


@pytest.fixture
async def client(stack) -> AsyncIterator[Client]:
    async with Client(stack.address) as opened:
        await opened.create_corpus("c")
        await put(opened, NewDocument("leave", LEAVE.encode(), title="Leave"))
        yield opened


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where nothing answers: its port is taken and never listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


async def put(client: Client, *documents: NewDocument | Ingested) -> dict[str, Ingested]:
    news = [item async for item in client.ingest("c", documents)]
    return {item.id: item for item in news if isinstance(item, Ingested)}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def test_an_answer_is_a_stream_of_plain_events(stack, client):
    stack.generation.answer = "Employees get 27 days of paid leave. They get 99 days of holiday."
    events = [event async for event in client.answer(QUESTION, "c", "rag")]
    assert [type(event) for event in (events[0], events[1], events[-1])] == [
        Started,
        Passages,
        Finished,
    ]
    assert (events[0].path, events[0].reason) == ("rag", "ASKED")
    assert "".join(event.text for event in events if isinstance(event, Text)) == (
        stack.generation.answer
    )
    assert sum(isinstance(event, Citation) for event in events) == 1
    assert sum(isinstance(event, Unsupported) for event in events) == 1


def test_an_event_that_only_a_newer_server_knows_is_passed_over():
    assert event_of(AnswerResponse()) is None


async def test_ask_joins_the_events_and_the_quotes_hold(stack, client):
    stack.generation.answer = "Employees get 27 days of paid leave. They get 99 days of holiday."
    answer = await client.ask(QUESTION, corpus="c")
    assert (answer.path, answer.reason, answer.finish) == ("rag", "NO_POLICY", "stop")
    (citation,) = answer.citations
    _, text = await client.document("c", citation.document)
    assert text[citation.source_start : citation.source_end] == citation.quote
    assert answer.text[citation.answer_start : citation.answer_end] == citation.quote
    ((start, end),) = answer.unsupported
    assert answer.text[start:end] == "They get 99 days of holiday."
    assert [passage.document for passage in answer.passages] == ["leave"]
    assert answer.usage == {"input_tokens": 100, "output_tokens": 13, "cached_tokens": 0}
    assert answer.timings_ms["prefill"] == 2 and answer.timings_ms["total"] > 0


async def test_history_and_options_reach_the_model(stack, client):
    await client.ask(
        QUESTION,
        path="base",
        history=[("Who are you?", "A handbook.")],
        max_tokens=7,
        temperature=0.5,
        seed=3,
        stop=["END"],
    )
    (request,) = stack.generation.requests
    asked, said, again = [message.parts[-1].text for message in request.messages[-3:]]
    assert asked.endswith("Who are you?") and said == "A handbook." and again.endswith(QUESTION)
    options = request.options
    assert (options.max_tokens, options.temperature, options.seed) == (7, 0.5, 3)
    assert options.stop[0] == "END"


async def test_leaving_the_loop_early_stops_the_model(stack, client):
    stack.generation.hold_after = 2
    async for event in client.answer(QUESTION, path="base"):
        if isinstance(event, Text):
            assert stack.generation.running == 1
            break
    await until(lambda: stack.generation.running == 0)


async def test_every_document_gets_its_result_and_a_bad_one_stops_no_other(client):
    results = await put(
        client,
        NewDocument("first", b"The first."),
        NewDocument("pdf", b"no PDF", "application/pdf"),
        NewDocument("empty", b""),
        NewDocument("title", b"Text.", title=5),
        NewDocument("metadata", b"Text.", metadata={"list": [1]}),
        NewDocument("number", b"Text.", metadata={"n": 10**400}),
        NewDocument("half\ud800", b"Text."),
        Ingested("gone.txt", "failed", "FILE_UNREADABLE", "No such file"),
        NewDocument("leave", LEAVE.encode(), title="Leave"),
        NewDocument("last", b"The last."),
    )
    assert {id: (result.outcome, result.reason) for id, result in results.items()} == {
        "first": ("indexed", ""),
        "pdf": ("failed", "MEDIA_TYPE_MISMATCH"),
        "empty": ("failed", "EMPTY_DOCUMENT"),
        "title": ("failed", "DOCUMENT_INVALID"),
        "metadata": ("failed", "DOCUMENT_INVALID"),
        "number": ("failed", "DOCUMENT_INVALID"),
        "half\ud800": ("failed", "DOCUMENT_INVALID"),
        "gone.txt": ("failed", "FILE_UNREADABLE"),
        "leave": ("unchanged", ""),
        "last": ("indexed", ""),
    }
    assert all(result.message for result in results.values() if result.outcome == "failed")


async def test_an_ingest_tells_how_far_it_has_come(client):
    documents = [NewDocument(str(number), b"Some words.") for number in range(20)]
    news = [item async for item in client.ingest("c", documents)]
    assert isinstance(news[0], Progress)
    assert news[-1] == Progress(received=20, finished=20, passages=20)


async def test_what_was_sent_before_the_documents_raise_is_indexed(client):
    def broken() -> Iterator[NewDocument]:
        yield NewDocument("before", b"The last one that was read.")
        raise RuntimeError("the disk fell out")

    results = []
    with pytest.raises(RuntimeError, match="the disk fell out"):
        async for news in client.ingest("c", broken()):
            results.append(news)
    assert [item.outcome for item in results if isinstance(item, Ingested)] == ["indexed"]
    assert [document.id async for document in client.documents("c")] == ["before", "leave"]


async def test_a_document_comes_back_with_its_fields_as_plain_values(client):
    time = datetime(2026, 3, 1, 12, tzinfo=UTC)
    metadata = {"year": 2026.0, "draft": False, "author": "Ada", "time": time}
    await put(client, NewDocument("a", b"# A\n\nText.", "text/markdown", "T", "x:a", metadata))
    document, text = await client.document("c", "a")
    assert (document.id, document.title, document.uri) == ("a", "T", "x:a")
    assert document.metadata == metadata
    assert document.length == len(text) and "Text." in text
    assert (datetime.now(UTC) - document.updated).total_seconds() < 60


async def test_a_text_longer_than_one_response_comes_back_whole(client):
    long = "ä" * 600_000
    await put(client, NewDocument("long", long.encode()))
    _, text = await client.document("c", "long")
    assert text == long


async def test_corpora_are_listed_and_deleted(client):
    created = await client.create_corpus("another")
    assert created.documents == 0 and created.embedder == "fake"
    assert [(corpus.name, corpus.documents) for corpus in await client.corpora()] == [
        ("another", 0),
        ("c", 1),
    ]
    await client.delete_corpus("c")
    assert [corpus.name for corpus in await client.corpora()] == ["another"]


async def test_more_documents_are_deleted_than_one_request_may_name(client):
    ids = [*(f"absent {number}" for number in range(1000)), "leave"]
    assert await client.delete("c", ids) == 1
    assert [document async for document in client.documents("c")] == []


async def test_a_search_returns_passages_with_their_offsets(client):
    for mode in ("hybrid", "vector", "text"):
        (passage,) = await client.search("paid leave", "c", limit=1, mode=mode)
        assert passage.document == "leave" and passage.title == "Leave"
        assert LEAVE[passage.start : passage.end] == passage.text


@pytest.mark.parametrize(
    ("ask", "code", "reason"),
    [
        ({"question": " "}, "INVALID_ARGUMENT", "QUESTION_EMPTY"),
        ({"question": "a" * 9_000}, "INVALID_ARGUMENT", "QUESTION_TOO_LONG"),
        ({"question": "a" * 10_000_000}, "INVALID_ARGUMENT", "QUESTION_TOO_LONG"),
        ({"question": "\udcff"}, "INVALID_ARGUMENT", "NOT_TEXT"),
        ({"corpus": "\udcff"}, "INVALID_ARGUMENT", "NOT_TEXT"),
        ({"corpus": "absent"}, "NOT_FOUND", "CORPUS_NOT_FOUND"),
        ({"path": "rag", "corpus": ""}, "INVALID_ARGUMENT", "CORPUS_MISSING"),
        ({"path": "tuned"}, "FAILED_PRECONDITION", "ADAPTER_MISSING"),
        ({"path": "tuned", "adapter": "a"}, "NOT_FOUND", "ADAPTER_NOT_FOUND"),
        ({"history": [("a" * 5_000_000, "b")]}, "INVALID_ARGUMENT", "HISTORY_TOO_LONG"),
        ({"history": [("a" * 20_000_000, "b")]}, "RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED"),
    ],
)
async def test_what_cannot_be_answered_is_refused_with_a_reason(client, ask, code, reason):
    with pytest.raises(TworoadsError) as error:
        await client.ask(**{"question": QUESTION, "corpus": "c"} | ask)
    assert (error.value.code, error.value.reason) == (StatusCode[code], reason)
    assert str(error.value)


@pytest.mark.parametrize(
    ("problem", "code", "reason"),
    [
        (Overloaded("QUEUE_FULL", "busy; try again later"), "RESOURCE_EXHAUSTED", "QUEUE_FULL"),
        (Unavailable("ENGINE_DEAD", "secret"), "UNAVAILABLE", "ENGINE_DEAD"),
        (RuntimeError("secret"), "INTERNAL", "INTERNAL"),
    ],
)
async def test_a_failing_service_is_told_by_its_reason(stack, client, problem, code, reason):
    await client.ask(QUESTION, path="base")
    stack.generation.error = problem
    with pytest.raises(TworoadsError) as error:
        await client.ask(QUESTION, path="base")
    assert (error.value.code, error.value.reason) == (StatusCode[code], reason)
    assert "secret" not in str(error.value)


async def test_an_answer_that_takes_too_long_ends_with_its_deadline(stack, client):
    stack.generation.hold_after = 1
    with pytest.raises(TworoadsError) as error:
        async with asyncio.timeout(10):
            await client.ask(QUESTION, path="base", timeout=0.5)
    assert (error.value.code, error.value.reason) == (StatusCode.DEADLINE_EXCEEDED, "DEADLINE")
    await until(lambda: stack.generation.running == 0)


async def test_without_a_server_the_error_says_how_to_start_one(nobody):
    async with Client(nobody) as client:
        with pytest.raises(TworoadsError, match=f"{nobody}: start it with `tworoads up`") as error:
            await client.ask(QUESTION)
    assert error.value.reason == "SERVER_UNAVAILABLE"


async def test_an_endless_question_is_refused_before_it_is_sent(nobody):
    async with Client(nobody) as client:
        for refused in (client.ask("a" * 10_000_000), client.search("a" * 10_000_000, "c")):
            with pytest.raises(TworoadsError) as error:
                await refused
            assert error.value.reason in ("QUESTION_TOO_LONG", "QUERY_TOO_LONG")
