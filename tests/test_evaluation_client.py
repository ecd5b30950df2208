"""The Python client's comparisons and policies, against a fake evaluation service."""

import hashlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from grpc import StatusCode
from tworoads.v1 import evaluation_pb2 as pb
from tworoads.v1 import retrieval_pb2 as retrieval
from tworoads.v1 import tuning_pb2 as tuning

import clients.streams
from clients.client import Client, TworoadsError
from clients.comparisons import (
    Candidate,
    Comparison,
    ComparisonProgress,
    Constraints,
    Scoring,
)
from clients.documents import NewDocument
from clients.files import FileError
from clients.jobs import CheckProgress, Finding
from clients.policies import TypePath
from clients.results import Estimate
from services.runtime.errors import NotReady, Unavailable
from tests.fake_evaluation import (
    FAILED,
    FakeEvaluation,
    FakePolicies,
    Serving,
    decided,
    router,
    serving,
    undecided,
)

LINES = b'{"question": "a", "answers": ["b"]}\n' * 50_000
REPEATED = tuning.DataFinding(
    file=tuning.UPLOADED_FILE_QUESTIONS,
    line=7,
    severity=tuning.FINDING_SEVERITY_LEFT_OUT,
    reason="DUPLICATE",
    message="this line says what line 3 says",
    other_line=3,
)


@pytest.fixture
async def served() -> AsyncIterator[Serving]:
    async with serving() as running:
        yield running


@pytest.fixture
async def client(served) -> AsyncIterator[Client]:
    async with Client(served.address) as opened:
        yield opened


@pytest.fixture
def evaluation(served) -> FakeEvaluation:
    return served.evaluation


@pytest.fixture
def policies(served) -> FakePolicies:
    return served.policies


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "questions.jsonl").write_bytes(LINES)
    return tmp_path / "questions.jsonl"


async def created(client: Client, *arguments, **options) -> list:
    return [news async for news in client.create_comparison(*arguments, **options)]


async def compared(client: Client, **options) -> Comparison:
    return await client.compare(LINES[:360], "handbook", **options)


async def watched(client: Client, *arguments) -> list[int]:
    return [event.sequence async for event in client.watch_comparison(*arguments)]


async def test_a_file_becomes_a_comparison_and_what_the_check_finds_comes_first(
    evaluation, client, file
):
    evaluation.findings = [REPEATED]
    news = await created(client, file, "handbook", ["style"], shots=0, seed=0, concurrency=8)
    message = "this line says what line 3 says"
    assert news[0] == Finding("questions", 7, "left_out", "DUPLICATE", message, 3)
    assert news[-2] == CheckProgress(received=50_000, checked=50_000)
    comparison = news[-1]
    assert (comparison.state, comparison.questions, comparison.verdict) == ("queued", 50_000, None)
    assert comparison.start.candidates == (
        Candidate("base", "base"),
        Candidate("rag", "rag", corpus="handbook"),
    )
    assert comparison.created.year == 2027 and comparison.started is None
    (upload,) = evaluation.uploads
    assert upload.questions == LINES and 0 < upload.largest <= 2**20
    start = upload.start
    assert (start.corpus, start.adapters, start.concurrency) == ("handbook", ["style"], 8)
    assert start.HasField("shots") and start.HasField("seed") and start.idempotency_key
    assert not start.HasField("margin")
    assert not start.HasField("scoring") and not start.HasField("constraints")


async def test_everything_that_can_be_said_is_sent(evaluation, client):
    await created(
        client,
        LINES,
        "handbook",
        candidates=[
            Candidate("two", "rag", options={"limit": 2, "generate": {"temperature": 0.5}}),
            Candidate("style", "tuned", "style@0123456789ab"),
        ],
        examples=[("Who?", "Ada.")],
        scoring=Scoring("label", "contains", 0.25, judge=True, strict_decides=False),
        constraints=Constraints(max_p95_ms=2000),
        margin=0.0,
        idempotency_key="mine",
    )
    start = evaluation.uploads[0].start
    two, style = start.candidates
    assert (two.options.limit, two.options.generate.temperature) == (2, 0.5)
    assert (style.path, style.adapter) == (retrieval.PATH_TUNED, "style@0123456789ab")
    assert [(turn.question, turn.answer) for turn in start.examples] == [("Who?", "Ada.")]
    assert start.scoring == pb.ScoringOptions(
        strict=pb.SCORER_LABEL,
        format_blind=pb.SCORER_CONTAINS,
        numeric_tolerance=0.25,
        judge=True,
        strict_decides=False,
    )
    assert start.constraints == pb.Constraints(max_p95_ms=2000)
    assert start.HasField("margin") and start.idempotency_key == "mine"


async def test_changed_documents_are_sent_as_an_ingest_would(evaluation, client, tmp_path):
    (tmp_path / "new.jsonl").write_text('{"id": "a", "title": "A", "text": "now"}\n')
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "leave.md").write_bytes(b"x" * (2**20 + 1))
    changed = [tmp_path / "new.jsonl", str(tmp_path / "folder"), NewDocument("z", b"z")]
    await created(client, LINES, "handbook", changed=changed)
    (upload,) = evaluation.uploads
    sent = {document.id: content for document, content in upload.documents}
    assert sent == {"a": b"now", "leave.md": b"x" * (2**20 + 1), "z": b"z"}
    kinds = {document.id: document.media_type for document, _ in upload.documents}
    assert kinds["leave.md"] == "text/markdown"
    assert next(d.title for d, _ in upload.documents if d.id == "a") == "A"
    assert upload.largest <= 2**20


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ("absent.md", "cannot read .*absent.md: No such file"),
        ("bad.jsonl", "cannot use bad.jsonl, line 2: not a JSON object"),
    ],
)
async def test_changed_documents_that_cannot_be_read_stop_the_upload(
    evaluation, client, tmp_path, changed, says
):
    (tmp_path / "bad.jsonl").write_text('{"id": "a", "text": "now"}\n[]\n')
    with pytest.raises(FileError, match=says):
        await created(client, LINES, "handbook", changed=[tmp_path / changed])
    assert evaluation.events == {}


async def test_an_upload_is_sent_again_under_the_same_key_if_the_connection_breaks(
    evaluation, client, file
):
    evaluation.findings = [REPEATED]
    evaluation.refusals = [Unavailable("STOPPING", "this replica stops")]
    news = await created(client, file, changed=[NewDocument("z", b"z")])
    assert [type(item) for item in news if not isinstance(item, CheckProgress)] == [
        Finding,
        Comparison,
    ]
    first, second = evaluation.uploads
    assert first == second and first.questions == LINES
    assert len(evaluation.events) == 1


async def test_what_can_be_read_only_once_is_sent_once(evaluation, client):
    for arguments in ({"questions": iter([LINES])}, {"questions": LINES, "changed": iter([])}):
        evaluation.uploads.clear()
        evaluation.refusals = [Unavailable("STOPPING", "this replica stops")]
        with pytest.raises(TworoadsError) as error:
            await created(client, **arguments)
        assert error.value.reason == "STOPPING"
        assert len(evaluation.uploads) == 1


async def test_what_reading_the_questions_raises_is_raised(client, tmp_path):
    def broken() -> Iterator[bytes]:
        yield LINES
        raise ValueError("the disk has gone")

    with pytest.raises(ValueError, match="the disk has gone"):
        await created(client, broken())
    with pytest.raises(FileError, match="cannot read .*absent: No such file or directory"):
        await created(client, tmp_path / "absent")


async def test_a_finished_comparison_is_a_plain_value(client):
    comparison = await compared(client)
    assert (comparison.state, comparison.questions, comparison.model) == ("finished", 10, "tiny")
    assert (comparison.ended - comparison.started).total_seconds() == 92
    base, rag = comparison.results
    assert base.scores.format_blind == Estimate(0.25, 0.125, 0.375)
    assert (base.scores.judge, base.oracle, base.staleness, base.cold) == (None,) * 4
    assert (rag.errors, rag.warm.total_p95_ms) == ({"GENERATION_UNAVAILABLE": 1}, 1234.5)
    assert [(one.kind, one.examples) for one in rag.failures] == [("reading_failure", (2,))]
    verdict = comparison.verdict
    assert (verdict.path, verdict.candidate, verdict.router) == ("rag", "rag", None)
    assert [reason.code for reason in verdict.reasons] == ["knowledge_gap"]
    assert comparison.progress.phase == "analysis"


async def test_a_comparison_is_watched_to_its_end_in_spite_of_breaks(evaluation, client):
    comparison = await compared(client)
    evaluation.watched.clear()
    evaluation.breaks = [3, 1, 0, 0, 2]
    events = [event async for event in client.watch_comparison(comparison.id)]
    assert [event.sequence for event in events] == list(range(1, 8))  # no heartbeat is an event
    assert evaluation.watched == [0, 3, 4, 4, 4, 6]
    states = [event.news.state for event in events if isinstance(event.news, Comparison)]
    assert states == ["queued", "running", "finished"]
    progress = [event.news for event in events if isinstance(event.news, ComparisonProgress)]
    assert [one.candidates[1].done for one in progress] == [3, 6, 9, 12]
    assert (progress[0].candidates[0].strict, progress[0].candidates[1].strict) == (0.0, 0.25)
    assert await watched(client, comparison.id, 5) == [6, 7]


async def test_a_watch_that_brings_nothing_any_more_ends(evaluation, client, monkeypatch):
    monkeypatch.setattr(clients.streams, "WAITS", (0.0,) * 5)
    comparison = await compared(client)
    evaluation.breaks = [3] + [0] * 100
    with pytest.raises(TworoadsError) as error:
        await watched(client, comparison.id)
    assert error.value.code is StatusCode.UNAVAILABLE


async def test_a_comparison_that_is_left_goes_on_until_it_is_cancelled(evaluation, client):
    evaluation.held_after = 3
    comparison = (await created(client, LINES[:360], "handbook"))[-1]
    async for event in client.watch_comparison(comparison.id):
        if event.sequence == 3:
            break
    assert (await client.comparison(comparison.id)).state == "running"
    assert (await client.cancel_comparison(comparison.id)).state == "cancelled"


async def test_all_pages_of_comparisons_are_listed(client):
    ids = [(await created(client, LINES[:360]))[-1].id for _ in range(5)]
    assert [comparison.id for comparison in await client.comparisons()] == ids[::-1]


async def test_all_pages_of_answers_are_listed(evaluation, client):
    id = (await compared(client)).id
    answers = [answer async for answer in client.comparison_answers(id)]
    assert [answer.sequence for answer in answers] == [1, 2, 3]
    wrong, right, failed = answers
    assert (wrong.failure, wrong.strict, right.failure, right.strict) == (
        "knowledge_gap",
        0.0,
        "",
        1.0,
    )
    assert (right.right_answers, right.started.path) == (("27 days", "27"), "rag")
    assert [citation.quote for citation in right.citations] == ["27 days"]
    assert right.finished.usage["output_tokens"] == 5
    assert (failed.error, failed.strict, failed.started, failed.finished) == (
        FAILED.error,
        None,
        None,
        None,
    )
    some = [answer.sequence async for answer in client.comparison_answers(id, "rag", "answers")]
    assert some == [2]


async def test_a_report_is_downloaded_in_spite_of_breaks(evaluation, client, tmp_path):
    id = (await compared(client)).id
    evaluation.cuts = [10_000, 5_000, 0]
    target = tmp_path / "new" / "report.md"
    await client.download_report(id, target)
    assert target.read_bytes() == evaluation.content
    markdown = pb.REPORT_FORMAT_MARKDOWN
    assert evaluation.downloads == [
        (id, markdown, offset) for offset in (0, 10_000, 15_000, 15_000)
    ]
    assert [path.name for path in target.parent.iterdir()] == ["report.md"]


async def test_a_report_that_arrives_wrong_leaves_the_older_one(evaluation, client, tmp_path):
    id = (await compared(client)).id
    (tmp_path / "report.html").write_text("older")
    evaluation.altered = True
    with pytest.raises(FileError, match="did not arrive as it was sent"):
        await client.download_report(id, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == "older"
    evaluation.altered = False
    await client.download_report(id, tmp_path / "report.html")
    content = (tmp_path / "report.html").read_bytes()
    assert hashlib.sha256(content).digest() == hashlib.sha256(evaluation.content).digest()
    with pytest.raises(FileError, match="cannot write to .*: (File exists|Not a directory)"):
        await client.download_report(id, tmp_path / "report.html" / "report.html")


async def test_a_verdict_becomes_the_policy(policies, client):
    comparison = await compared(client)
    policy = await client.apply(comparison.id)
    assert (policy.corpus, policy.path, policy.adapter) == ("handbook", "rag", "")
    assert (policy.comparison, policy.author) == (comparison.id, "default")
    assert (policy.types, policy.router) == ((), None)
    assert await client.policy("handbook") == policy
    assert await client.policies() == [policy]


TYPES = [
    pb.TypeVerdict(
        type="label", path=retrieval.PATH_TUNED, adapter="style@0123456789ab", candidate="tuned"
    )
]
TUNED = pb.Candidate(id="tuned", path=retrieval.PATH_TUNED, adapter="style@0123456789ab")


async def test_types_become_part_of_the_policy_if_a_router_is_worth_it(
    evaluation, policies, client
):
    evaluation.candidates.append(TUNED)
    evaluation.verdict = decided(types=TYPES, router=router())
    policy = await client.apply(await compared(client))
    assert policy.types == (TypePath("label", "tuned", "style@0123456789ab"),)
    assert policies.kept["handbook"].router == router()

    evaluation.verdict = decided(types=TYPES)
    policy = await client.apply(await compared(client))
    assert (policy.path, policy.types, policy.router) == ("rag", (), None)


async def test_a_candidate_with_nothing_but_the_usual_options_can_be_applied(evaluation, client):
    rag = evaluation.candidates[1]
    rag.options.limit = 3
    rag.options.generate.seed = 7
    rag.options.generate.priority = 2
    assert (await client.apply(await compared(client))).path == "rag"


@pytest.mark.parametrize(
    ("candidate", "says"),
    [
        ({"options": {"limit": 9}}, "cannot keep its limit"),
        ({"options": {"generate": {"temperature": 1}}}, "cannot keep its temperature"),
        ({"options": {"examples": [{"question": "a", "answer": "b"}]}}, "send them with each"),
        ({"corpus": "other"}, "searches another corpus: other"),
    ],
)
async def test_what_a_policy_cannot_say_is_not_applied(
    evaluation, policies, client, candidate, says
):
    evaluation.candidates[1] = pb.Candidate(id="rag", path=retrieval.PATH_RAG, **candidate)
    with pytest.raises(TworoadsError, match=says) as error:
        await client.apply(await compared(client))
    assert error.value.reason == "POLICY_IMPOSSIBLE"
    assert policies.kept == {}


async def test_a_type_that_a_policy_cannot_keep_is_not_applied(evaluation, policies, client):
    evaluation.candidates.append(TUNED)
    evaluation.candidates[-1].options.limit = 7
    evaluation.verdict = decided(types=TYPES, router=router())
    with pytest.raises(TworoadsError, match="names tuned, but a policy cannot keep its limit"):
        await client.apply(await compared(client))
    assert policies.kept == {}


async def test_an_open_verdict_is_not_applied(evaluation, policies, client):
    evaluation.verdict = undecided()
    with pytest.raises(TworoadsError) as error:
        await client.apply(await compared(client))
    assert error.value.reason == "VERDICT_OPEN"
    evaluation.ends = pb.COMPARISON_STATE_FAILED
    with pytest.raises(TworoadsError) as error:
        await client.apply(await compared(client))
    assert error.value.reason == "COMPARISON_NOT_FINISHED"
    assert policies.kept == {}


async def test_a_comparison_without_a_corpus_cannot_be_applied(evaluation, client):
    evaluation.verdict = decided(path=retrieval.PATH_BASE, candidate="base")
    with pytest.raises(TworoadsError, match="a policy belongs to a corpus"):
        await client.apply(await client.compare(LINES[:360]))


async def test_a_policy_is_set_by_hand_only_as_it_was_seen(client):
    first = await client.set_policy("handbook", "tuned", "style")
    assert (first.path, first.adapter, first.comparison) == ("tuned", "style", "")
    second = await client.set_policy("handbook", "base", etag=first.etag)
    with pytest.raises(TworoadsError) as error:
        await client.set_policy("handbook", "rag", etag=first.etag)
    assert (error.value.code, error.value.reason) == (StatusCode.ABORTED, "ETAG_MISMATCH")
    other = await client.set_policy("other", "rag")
    assert await client.policies() == [second, other]


@pytest.mark.parametrize(
    ("method", "arguments", "code", "reason"),
    [
        ("comparison", ["absent"], "NOT_FOUND", "COMPARISON_NOT_FOUND"),
        ("cancel_comparison", ["absent"], "NOT_FOUND", "COMPARISON_NOT_FOUND"),
        ("report", ["absent"], "NOT_FOUND", "COMPARISON_NOT_FOUND"),
        ("apply", ["absent"], "NOT_FOUND", "COMPARISON_NOT_FOUND"),
        ("comparison", ["\udcff"], "INVALID_ARGUMENT", "NOT_TEXT"),
        ("policy", ["handbook"], "NOT_FOUND", "POLICY_NOT_FOUND"),
        ("set_policy", ["absent", "rag"], "NOT_FOUND", "CORPUS_NOT_FOUND"),
    ],
)
async def test_what_is_refused_has_a_reason(client, method, arguments, code, reason):
    with pytest.raises(TworoadsError) as error:
        await getattr(client, method)(*arguments)
    assert (error.value.code, error.value.reason) == (StatusCode[code], reason)


async def test_streams_that_are_refused_have_a_reason(evaluation, client):
    with pytest.raises(TworoadsError) as error:
        await watched(client, "absent")
    assert error.value.reason == "COMPARISON_NOT_FOUND"
    evaluation.refusals = [NotReady("CORPUS_EMPTY", "the corpus is empty")]
    with pytest.raises(TworoadsError) as error:
        await created(client, LINES)
    assert error.value.reason == "CORPUS_EMPTY"
    wrong = Candidate("rag", "rag", options={"limits": 3})
    with pytest.raises(TworoadsError, match='rag: .*"limits"') as error:
        await created(client, LINES, candidates=[wrong])
    assert error.value.reason == "CANDIDATE_INVALID"
