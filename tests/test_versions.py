"""Two versions side by side, as in an update: whichever side knows more, the other one goes on."""

import json
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import lancedb
import pyarrow as pa
import pytest
from google.protobuf.message_factory import GetMessageClass
from grpc import StatusCode
from tworoads.v1.answer_pb2_grpc import add_AnswerServiceServicer_to_server
from tworoads.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tworoads.v1.generation_pb2_grpc import GenerationServiceStub
from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub
from tworoads.v1.tuning_pb2_grpc import TuningServiceStub

from clients.backup import MANIFEST, back_up, restore
from clients.client import Client, TworoadsError
from clients.comparisons import Candidate
from clients.documents import Ingested, NewDocument
from clients.local import LocalError
from services.gateway import keys
from services.gateway.forward import PUBLIC, Forwarder
from services.gateway.service import AnswerService
from services.retrieval.stores.store import CorpusKey
from services.runtime.call import DEFAULT_TENANT
from services.runtime.channel import connect
from services.runtime.database import VERSION, Database
from services.runtime.errors import error_info
from services.runtime.gate import Open
from services.runtime.server import running
from services.runtime.settings import ServerSettings
from services.tuning.schema import SCHEMA
from tests import next_version
from tests.fake_engine import FakeEngine, serving
from tests.next_version import (
    NEWS,
    NextVersion,
    call,
    filled,
    grown,
    message,
    with_events,
    with_fields,
    with_values,
)
from tests.small_stack import (
    ANSWERS,
    EVALUATION,
    GENERATION,
    RETRIEVAL,
    SmallStack,
    evaluation_service,
    small_stack,
)
from tests.small_tuning import TUNING, examples, small_tuning

SETTINGS = ServerSettings(grace_seconds=0)
METHODS = {
    f"{service}/{method.name}": method
    for service in (ANSWERS, *PUBLIC)
    for method in next_version.POOL.FindServiceByName(service).methods
    if method.name in (*PUBLIC.get(service, ("Answer", "GetServerInfo")), "Next")
}
CORPUS = message("CreateCorpusRequest")(name="c", allow_existing=True)
NEWEST = 99  # of an enum: today's services know no such number
ID = f"house@{'a' * 12}"
ASKS = {"question": "q", "corpus": "c", "path": 2}
QUERY = {"corpus": "c", "query": "q"}
SEARCHED = {"search_mode": NEWEST}
WRITTEN = {"generate": {"priority": NEWEST}}
COMPARED = {"conditions": [{"key": "k", "comparator": NEWEST, "value": {"bool_value": True}}]}
NEW_KIND = {"conditions": [{"key": "k", "value": {"next_kind": "x"}}]}
TYPES = [{"type": "a", "path": NEWEST}]
TRAINED = {"name": "house", "options": {"context": NEWEST}}
SAYS = {"role": 2, "parts": [{"text": "a"}]}
TEXT = "Full-time employees get 27 days of paid leave a year."
QUESTION = "How many days of paid leave do employees get?"
Change = Callable[[Any], list[Any]]
Newer = Callable[[Path, Change], AbstractAsyncContextManager["Update"]]


def compares(**start: Any) -> dict[str, Any]:
    return {"start": {"corpus": "c", **start}}


def candidate(**fields: Any) -> dict[str, Any]:
    return compares(candidates=[{"id": "a", "path": 2, **fields}])


@dataclass
class Update:
    """A stack in the middle of an update. `address` is where clients call; `next` are the services
    of the next version, if any runs."""

    address: str
    stack: SmallStack
    next: NextVersion | None = None


@asynccontextmanager
async def today(folder: Path) -> AsyncIterator[Update]:
    """Run a stack of this version alone."""
    async with (
        small_tuning(folder / "tuning") as tuning,
        small_stack(folder / "store", tuning_address=tuning.address) as stack,
    ):
        stack.generation.answer = TEXT
        stack.servers["tuning"].port = int(tuning.address.rpartition(":")[2])
        yield Update(stack.address, stack)


@asynccontextmanager
async def next_gateway(folder: Path, change: Change) -> AsyncIterator[Update]:
    """Run a gateway of the next version before today's services."""
    async with (
        today(folder) as update,
        connect(update.address, ANSWERS, *PUBLIC) as channel,
        running(SETTINGS, [ANSWERS, *PUBLIC], Open()) as server,
    ):
        update.next = NextVersion(dict.fromkeys((ANSWERS, *PUBLIC), channel), change)
        await server.serve(lambda s: s.add_generic_rpc_handlers((update.next,)))
        update.address = f"127.0.0.1:{server.port}"
        yield update


@asynccontextmanager
async def next_services(folder: Path, change: Change) -> AsyncIterator[Update]:
    """Run today's gateway, and an evaluation service that asks it, before services of the next
    version."""
    async with (
        today(folder) as update,
        running(SETTINGS, [*PUBLIC]) as server,
        connect(f"127.0.0.1:{server.port}", *PUBLIC) as channel,
        running(SETTINGS, [ANSWERS, *PUBLIC], Open()) as gateway,
        evaluation_service(folder / "evaluation", f"127.0.0.1:{gateway.port}") as evaluation,
        AsyncExitStack() as opened,
    ):
        channels = {EVALUATION: evaluation[1]}
        for word, behind in update.stack.servers.items():
            name = f"tworoads.v1.{word.title()}Service"
            if name in PUBLIC and name not in channels:
                address = f"127.0.0.1:{behind.port}"
                channels[name] = await opened.enter_async_context(connect(address, name))
        update.next = NextVersion(channels, change)
        await server.serve(lambda s: s.add_generic_rpc_handlers((update.next,)))
        answers = AnswerService(
            RetrievalServiceStub(channel),
            EmbeddingServiceStub(channel),
            GenerationServiceStub(channel),
            TuningServiceStub(channel),
        )
        forwarder = Forwarder(dict.fromkeys(PUBLIC, channel), answers.forget)
        await gateway.serve(
            lambda s: add_AnswerServiceServicer_to_server(answers, s),
            lambda s: s.add_generic_rpc_handlers((forwarder,)),
        )
        update.address = f"127.0.0.1:{gateway.port}"
        yield update


@pytest.fixture(autouse=True)
def _progress_is_noted_as_often_on_any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.tuning.making.PROGRESS_SECONDS", 25.0)


@pytest.fixture
async def channel(tmp_path: Path) -> AsyncIterator[grpc.aio.Channel]:
    """Today's stack, with an empty corpus "c"."""
    async with today(tmp_path) as update, connect(update.address, ANSWERS, *PUBLIC) as opened:
        await call(opened, f"{RETRIEVAL}/CreateCorpus", CORPUS)
        yield opened


async def said(channel: grpc.aio.Channel, path: str, request: Any) -> tuple[StatusCode, str, str]:
    """Return what a call ends with: code, reason and message."""
    try:
        await call(channel, path, request)
    except grpc.aio.AioRpcError as error:
        info = error_info(error)
        return error.code(), info.reason if info else "", error.details() or ""
    return StatusCode.OK, "", ""


async def journey(client: Client) -> AsyncIterator[tuple[str, Any]]:
    """Do what users do; yield the name of each step, and what is to be called for it."""

    async def created() -> list[str]:
        await client.create_corpus("c")
        return [corpus.name for corpus in await client.corpora()]

    async def ingested() -> list[str]:
        document = NewDocument("leave", TEXT.encode(), metadata={"year": 2026})
        news = [news async for news in client.ingest("c", [document])]
        return [one.outcome for one in news if isinstance(one, Ingested)]

    async def asked(path: Any, adapter: str = "") -> tuple[Any, ...]:
        corpus = "" if path in ("base", "tuned") else "c"
        answer = await client.ask(QUESTION, corpus, path, adapter=adapter)
        return answer.text, answer.path, answer.finish, len(answer.citations)

    async def tuned() -> tuple[str, bool, list[int]]:
        rows = b"".join(json.dumps(row).encode() + b"\n" for row in examples())
        job = await client.tune("house", rows)
        events = [event async for event in client.watch_job(job.id)]
        return job.state, bool(job.adapter), [event.sequence for event in events]

    async def compared() -> tuple[Any, ...]:
        questions = b"".join(
            json.dumps({"question": f"{QUESTION} ({n})", "answers": ["27"]}).encode() + b"\n"
            for n in range(3)
        )
        candidates = [Candidate("base", "base"), Candidate("rag", "rag")]
        ended = await client.compare(questions, "c", candidates=candidates)
        answers = [answer async for answer in client.comparison_answers(ended.id)]
        return ended.state, ended.verdict is not None, len(answers), {a.error for a in answers}

    async def policy() -> list[str]:
        await client.set_policy("c", "rag")
        return [policy.path for policy in await client.policies()]

    yield "create", created
    yield "ingest", ingested
    for path in ("base", "rag", "auto"):
        yield path, lambda path=path: asked(path)
    yield "policy", policy
    yield "by policy", lambda: asked("auto")
    yield "tune", tuned
    yield "tuned", lambda: asked("tuned", "house")
    yield "hybrid", lambda: asked("hybrid", "house")
    yield "compare", compared


async def walk(address: str) -> dict[str, Any]:
    """Return what each step of the journey gives: a value or an error."""
    found: dict[str, Any] = {}
    async with Client(address) as client:
        async for name, step in journey(client):
            try:
                found[name] = await step()
            except TworoadsError as error:
                found[name] = error
    return found


# What the journey gives where there is one version alone.
SAID = {
    "create": ["c"],
    "ingest": ["indexed"],
    "base": (TEXT, "base", "stop", 0),
    "rag": (TEXT, "rag", "stop", 1),
    "auto": (TEXT, "rag", "stop", 1),
    "policy": ["rag"],
    "by policy": (TEXT, "rag", "stop", 1),
    "tune": ("ready", True, [1, 2, 3, 4, 5, 6, 7]),
    "tuned": (TEXT, "tuned", "stop", 0),
    "hybrid": (TEXT, "hybrid", "stop", 1),
    "compare": ("finished", True, 6, {""}),
}


async def test_the_journey_ends_well_on_one_version(tmp_path: Path) -> None:
    async with today(tmp_path) as update:
        assert await walk(update.address) == SAID


@pytest.mark.parametrize("newer", [next_gateway, next_services])
@pytest.mark.parametrize("change", [with_fields, with_events])
async def test_what_a_newer_server_says_besides_is_passed_over(
    newer: Newer, change: Change, tmp_path: Path
) -> None:
    async with newer(tmp_path, change) as update:
        assert await walk(update.address) == SAID
        assert update.next and update.next.asked


@pytest.mark.parametrize("newer", [next_gateway, next_services])
async def test_a_value_that_only_a_newer_server_knows_has_no_name_here_and_stops_nothing(
    newer: Newer, tmp_path: Path
) -> None:
    async with newer(tmp_path, with_values) as update:
        found = await walk(update.address)
    assert found["ingest"] == [""] and found["policy"] == [""]
    assert found["tune"] == ("", *SAID["tune"][1:])
    for step in ("base", "rag", "auto", "by policy", "tuned", "hybrid"):
        text, path, finish, citations = found[step]
        assert (text, finish, citations) == (TEXT, "", SAID[step][3])
        assert path == ("" if newer is next_gateway else SAID[step][1])
    assert found["compare"][0] == "" and found["compare"][2:] == SAID["compare"][2:]


async def test_a_policy_whose_path_only_a_newer_version_knows_gives_way_to_a_search(
    tmp_path: Path,
) -> None:
    async with next_services(tmp_path, with_values) as update, Client(update.address) as client:
        await client.create_corpus("c")
        await client.set_policy("c", "base")
        answer = await client.ask(QUESTION, "c", "auto")
    assert (answer.path, answer.reason) == ("rag", "POLICY_CLOSED")
    assert "newer version" in answer.explanation


async def test_a_forwarded_call_keeps_what_the_gateway_does_not_know(tmp_path: Path) -> None:
    requests = [
        message("PutDocumentsRequest")(start={"corpus": "c"}),
        message("PutDocumentsRequest")(document={"id": "a", "media_type": "text/plain"}),
        message("PutDocumentsRequest")(chunk=TEXT.encode()),
        message("PutDocumentsRequest")(end={}),
    ]
    async with (
        next_services(tmp_path, with_fields) as update,
        connect(update.address, ANSWERS, *PUBLIC) as channel,
    ):
        [create] = with_fields(message("CreateCorpusRequest")(name="c"))
        [made] = await call(channel, f"{RETRIEVAL}/CreateCorpus", create)
        news = await call(channel, f"{RETRIEVAL}/PutDocuments", *map(grown, requests))
        assert update.next
        kinds = type(create), type(requests[0])
        asked = [one for one in update.next.asked if isinstance(one, kinds)]
    assert (made.next, made.corpus.next, made.corpus.name) == (NEWS, NEWS, "c")
    assert [one.result.id for one in news if one.HasField("result")] == ["a"]
    assert all(one.next == NEWS for one in news)
    assert asked == [create, *map(grown, requests)]


@pytest.mark.parametrize("path", METHODS)
async def test_fields_that_only_a_newer_client_knows_change_nothing(
    path: str, channel: grpc.aio.Channel
) -> None:
    request = filled(GetMessageClass(METHODS[path].input_type)())
    answers = []
    for one in (request, grown(request)):
        await call(channel, f"{RETRIEVAL}/CreateCorpus", CORPUS)
        answers.append(await said(channel, path, one))
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("path", "fields", "reason"),
    [
        (f"{ANSWERS}/Answer", {"question": "q", "path": NEWEST}, "PATH_UNKNOWN"),
        (f"{ANSWERS}/Answer", ASKS | {"options": SEARCHED}, "SEARCH_MODE_UNKNOWN"),
        (f"{ANSWERS}/Answer", ASKS | {"options": {"filter": COMPARED}}, "FILTER_INVALID"),
        (f"{RETRIEVAL}/Search", QUERY | {"mode": NEWEST}, "SEARCH_MODE_UNKNOWN"),
        (f"{RETRIEVAL}/Search", QUERY | {"filter": COMPARED}, "FILTER_INVALID"),
        (f"{RETRIEVAL}/Search", QUERY | {"filter": NEW_KIND}, "FILTER_INVALID"),
        (f"{RETRIEVAL}/SetPolicy", {"corpus": "c", "path": NEWEST}, "PATH_INVALID"),
        (f"{RETRIEVAL}/SetPolicy", {"corpus": "c", "path": 2, "types": TYPES}, "PATH_INVALID"),
        (f"{RETRIEVAL}/PutDocuments", {"next_part": "x"}, "START_MISSING"),
        (f"{TUNING}/CreateJob", {"start": TRAINED}, "CONTEXT_UNKNOWN"),
        (f"{TUNING}/CreateJob", {"next_part": "x"}, "START_MISSING"),
        (f"{TUNING}/ImportAdapter", {"start": TRAINED}, "CONTEXT_UNKNOWN"),
        (f"{TUNING}/ImportAdapter", {"next_part": "x"}, "START_MISSING"),
        (f"{TUNING}/DownloadAdapter", {"adapter": ID, "content": NEWEST}, "CONTENT_UNKNOWN"),
        (f"{EVALUATION}/ListAnswers", {"comparison": "x", "phase": NEWEST}, "PHASE_UNKNOWN"),
        (f"{EVALUATION}/DownloadReport", {"comparison": "x", "format": NEWEST}, "FORMAT_UNKNOWN"),
        (f"{EVALUATION}/CreateComparison", compares(scoring={"strict": NEWEST}), "SCORER_INVALID"),
        (f"{EVALUATION}/CreateComparison", candidate(path=NEWEST), "CANDIDATE_INVALID"),
        (f"{EVALUATION}/CreateComparison", candidate(options=SEARCHED), "CANDIDATE_INVALID"),
        (f"{EVALUATION}/CreateComparison", candidate(options=WRITTEN), "CANDIDATE_INVALID"),
        (f"{EVALUATION}/CreateComparison", {"next_part": "x"}, "START_MISSING"),
    ],
)
async def test_a_value_that_only_a_newer_client_knows_is_refused(
    path: str, fields: dict[str, Any], reason: str, channel: grpc.aio.Channel
) -> None:
    request = GetMessageClass(METHODS[path].input_type)(**fields)
    assert (await said(channel, path, request))[:2] == (StatusCode.INVALID_ARGUMENT, reason)


@pytest.mark.parametrize(
    ("method", "fields", "reason"),
    [
        ("Generate", {"messages": [SAYS | {"role": NEWEST}]}, "MESSAGE_INVALID"),
        ("Generate", {"messages": [SAYS], "options": WRITTEN["generate"]}, "PRIORITY_UNKNOWN"),
        ("Score", {"messages": [SAYS | {"role": NEWEST}], "continuation": "a"}, "MESSAGE_INVALID"),
    ],
)
async def test_a_value_that_only_a_newer_gateway_knows_is_refused_by_generation(
    method: str, fields: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    async with (
        serving(FakeEngine(), tmp_path, "127.0.0.1:1") as (_, address),
        connect(address, GENERATION) as channel,
    ):
        request = message(f"{method}Request")(**fields)
        answer = await said(channel, f"{GENERATION}/{method}", request)
    assert answer[:2] == (StatusCode.INVALID_ARGUMENT, reason)


@pytest.mark.parametrize("service", [ANSWERS, *PUBLIC])
async def test_a_method_that_only_a_newer_client_knows_is_unimplemented(
    service: str, channel: grpc.aio.Channel
) -> None:
    request = GetMessageClass(METHODS[f"{service}/Next"].input_type)()
    answer = await said(channel, f"{service}/Next", request)
    assert answer[0] == StatusCode.UNIMPLEMENTED


async def test_records_that_a_newer_version_has_written_are_read(tmp_path: Path) -> None:
    async with today(tmp_path) as update, Client(update.address) as client:
        await client.create_corpus("c")
        await client.set_policy("c", "base")
        key, store = CorpusKey(DEFAULT_TENANT, "c"), update.stack.store
        for kind in ("corpus", "policy"):
            record = json.loads(await store.get_record(kind, key) or "")
            await store.put_record(kind, key, json.dumps(record | {"next": NEWS}))
        [corpus] = await client.corpora()
        assert (corpus.name, (await client.policy("c")).path) == ("c", "base")


async def test_tables_that_a_newer_version_has_given_another_column_are_read_and_written(
    tmp_path: Path,
) -> None:
    async def ingested(client: Client, id: str) -> list[str]:
        news = client.ingest("c", [NewDocument(id, TEXT.encode())])
        return [one.outcome async for one in news if isinstance(one, Ingested)]

    async with today(tmp_path) as update, Client(update.address) as client:
        await client.create_corpus("c")
        assert await ingested(client, "a") == ["indexed"]
    with await lancedb.connect_async(tmp_path / "store") as newer:
        names = (await newer.list_tables()).tables
        assert len(names) == 3
        for name in names:
            await (await newer.open_table(name)).add_columns(pa.field("next", pa.string()))
    async with today(tmp_path) as update, Client(update.address) as client:
        assert await ingested(client, "b") == ["indexed"]
        assert {found.document for found in await client.search(QUESTION, "c")} == {"a", "b"}
        assert await client.delete("c", ["a"]) == 1
        await client.set_policy("c", "base")
        assert [corpus.documents for corpus in await client.corpora()] == [1]


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_a_database_of_a_newer_version_is_refused_and_left_as_it_is(
    mode: str, tmp_path: Path
) -> None:
    path = tmp_path / "tuning.db"
    with closing(sqlite3.connect(path)) as newer:
        newer.execute(f"PRAGMA journal_mode = {mode}")
        newer.executescript(f"CREATE TABLE next (a); PRAGMA user_version = {VERSION + 1}")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="tuning.db was written by a newer version"):
        Database(path, SCHEMA)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_keys_file_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    keys.add(path, "acme", "web", "reader")
    rows = json.loads(path.read_text())
    path.write_text(json.dumps({"version": 2, "keys": rows}))
    with pytest.raises(ValueError, match="the keys are not in order"):
        keys.read(path)


def test_a_backup_of_another_layout_is_refused_and_nothing_is_restored(tmp_path: Path) -> None:
    data, backup, restored = tmp_path / "data", tmp_path / "backup", tmp_path / "restored"
    data.mkdir()
    (data / "a").write_text("a")
    back_up(data, backup, lambda done, total: None)
    manifest = json.loads((backup / MANIFEST).read_text())
    (backup / MANIFEST).write_text(json.dumps(manifest | {"next": NEWS}))
    with pytest.raises(LocalError, match="holds no whole backup"):
        restore(backup, restored, lambda done, total: None)
    assert not restored.exists()
