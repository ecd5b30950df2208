"""EvaluationService over the real gateway and retrieval, with fake models."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from tworoads.v1 import answer_pb2, generation_pb2, retrieval_pb2, tuning_pb2
from tworoads.v1 import evaluation_pb2 as pb
from tworoads.v1.evaluation_pb2_grpc import EvaluationServiceStub
from tworoads.v1.retrieval_pb2 import PATH_AUTO, PATH_BASE, PATH_RAG, PATH_TUNED

from services.evaluation import uploads
from services.evaluation.comparison import ANSWERS as ANSWERS_FILE
from services.evaluation.comparison import OUTCOME
from services.runtime.channel import connect
from services.runtime.errors import NotReady, Unavailable
from tests.small_stack import ANSWERS, EVALUATION, MEBIBYTE, SmallStack, small_stack
from tests.test_gateway import reason_of
from tests.test_retrieval import END, document, start

COUNT = 32
NAMES = [f"Town{number}" for number in range(COUNT)]
FINISHED, FAILED = pb.COMPARISON_STATE_FINISHED, pb.COMPARISON_STATE_FAILED
SHORT = answer_pb2.AnswerOptions(limit=1)
BOTH = [
    pb.Candidate(id="base", path=PATH_BASE),
    pb.Candidate(id="rag", path=PATH_RAG, options=SHORT),
]


def questions(count: int = COUNT, **fields: object) -> bytes:
    lines = [
        {"question": f"Who leads {name}?", "answers": ["I do not know"], "relevant": [name]}
        for name in NAMES[:count]
    ]
    return b"".join(json.dumps({**line, **fields}).encode() + b"\n" for line in lines)


@asynccontextmanager
async def a_stack(folder: Path) -> AsyncIterator[SmallStack]:
    async with small_stack(folder) as running:
        request = retrieval_pb2.CreateCorpusRequest(name="c", allow_existing=True)
        await running.retrieval.CreateCorpus(request)
        parts = [part for name in NAMES for part in document(name, f"{name} is led by Ann.")]
        async for _ in running.retrieval.PutDocuments(iter([start(), *parts, END])):
            pass
        yield running


@pytest.fixture
async def stack(tmp_path) -> AsyncIterator[SmallStack]:
    async with a_stack(tmp_path) as running:
        yield running


@pytest.fixture
async def evaluation(stack) -> AsyncIterator[EvaluationServiceStub]:
    async with connect(stack.address, ANSWERS, EVALUATION) as channel:
        yield EvaluationServiceStub(channel)


def upload(content: bytes, documents: Iterable[tuple[str, bytes]] = (), **fields: object):
    fields = {"corpus": "c", "candidates": BOTH, **fields}
    yield pb.CreateComparisonRequest(start=pb.CreateComparisonStart(**fields))
    yield pb.CreateComparisonRequest(questions=content)
    for id, text in documents:
        header = retrieval_pb2.PutDocumentsDocument(id=id, media_type="text/plain")
        yield pb.CreateComparisonRequest(changed_document=header)
        yield pb.CreateComparisonRequest(chunk=text)
    yield pb.CreateComparisonRequest(end=pb.CreateComparisonEnd())


async def created(evaluation, requests) -> tuple[pb.Comparison, list[str]]:
    """Return the comparison, and the reasons of what was found."""
    findings, comparison = [], None
    async for response in evaluation.CreateComparison(iter(list(requests))):
        match response.WhichOneof("event"):
            case "finding":
                findings.append(response.finding.reason)
            case "comparison":
                comparison = response.comparison
    return comparison, findings


async def ended(evaluation, id: str) -> pb.Comparison:
    async for _ in evaluation.WatchComparison(pb.WatchComparisonRequest(id=id)):
        pass
    return (await evaluation.GetComparison(pb.GetComparisonRequest(id=id))).comparison


async def compared(evaluation, requests) -> pb.Comparison:
    return await ended(evaluation, (await created(evaluation, requests))[0].id)


async def answers_of(evaluation, id: str, size: int = 7) -> list[pb.ComparisonAnswer]:
    found, token = [], ""
    while True:
        request = pb.ListAnswersRequest(comparison=id, page_size=size, page_token=token)
        page = await evaluation.ListAnswers(request)
        found += page.answers
        token = page.next_page_token
        if not token:
            return found


async def test_a_comparison_asks_every_candidate_every_question_and_ends_in_a_verdict(
    stack, evaluation
):
    comparison = await compared(evaluation, upload(questions()))
    assert comparison.state == FINISHED, (comparison.reason, comparison.message)
    assert (comparison.questions, comparison.clusters) == (COUNT, COUNT)
    assert comparison.model == "fake" and comparison.corpus_version
    assert {result.candidate for result in comparison.results} == {"base", "rag"}
    # The fake model says the same either way, and so nothing is better than the cheapest.
    assert comparison.differences[0].format_blind.value == 0
    assert comparison.verdict.reasons
    answers = await answers_of(evaluation, comparison.id)
    asked = [(answer.candidate, answer.line, answer.phase) for answer in answers]
    assert len(asked) == len(set(asked)) == 3 * COUNT  # base, rag, and the oracle
    assert [answer.sequence for answer in answers] == list(range(1, 3 * COUNT + 1))
    rag = [answer for answer in answers if answer.candidate == "rag" and answer.phase == 1]
    assert all(len(answer.documents) == 1 and answer.format_blind == 1 for answer in rag)
    batch = {request.options.priority for request in stack.generation.requests}
    assert len(batch) == 1


async def test_blocks_of_candidates_do_not_overlap(evaluation):
    comparison = await compared(evaluation, upload(questions(), concurrency=3))
    answers = await answers_of(evaluation, comparison.id, 1000)
    spans: dict[str, list[tuple[float, float]]] = {"base": [], "rag": []}
    for answer in answers:
        if answer.phase == pb.COMPARISON_PHASE_ANSWERS:
            begin = answer.time.ToMicroseconds() / 1e3
            spans[answer.candidate].append((begin, begin + answer.total_ms))
    ends = {name: (min(a for a, _ in of), max(b for _, b in of)) for name, of in spans.items()}
    first, second = sorted(ends.values())
    assert second[0] >= first[1] - 1  # milliseconds


@pytest.mark.parametrize("format", [1, 2, 3])
async def test_a_report_is_downloaded_in_any_part(evaluation, format):
    comparison = await compared(evaluation, upload(questions()))

    async def report(offset: int) -> tuple[pb.ReportFile, bytes]:
        request = pb.DownloadReportRequest(comparison=comparison.id, format=format, offset=offset)
        parts = [part async for part in evaluation.DownloadReport(request)]
        return parts[0].file, b"".join(part.chunk.data for part in parts[1:])

    file, whole = await report(0)
    assert len(whole) == file.size and hashlib.sha256(whole).hexdigest() == file.sha256
    assert (await report(100))[1] == whole[100:]
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await report(file.size + 1)
    assert reason_of(error) == (grpc.StatusCode.INVALID_ARGUMENT, "OFFSET_OUT_OF_RANGE")
    for unknown in (0, 9):
        request = pb.DownloadReportRequest(comparison=comparison.id, format=unknown)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await anext(aiter(evaluation.DownloadReport(request)))
        assert reason_of(error) == (grpc.StatusCode.INVALID_ARGUMENT, "FORMAT_UNKNOWN")


async def test_a_watcher_sees_each_state_once(evaluation):
    comparison, _ = await created(evaluation, upload(questions()))
    request = pb.WatchComparisonRequest(id=comparison.id)
    seen = [event.comparison async for event in evaluation.WatchComparison(request)]
    states = [one.state for one in seen if one.id]
    assert states == [pb.COMPARISON_STATE_QUEUED, pb.COMPARISON_STATE_RUNNING, FINISHED]


async def test_why_answers_are_wrong_is_read_once_for_all_pages(stack, evaluation, tmp_path):
    stack.generation.answer = "Nobody."
    comparison = await compared(evaluation, upload(questions()))
    request = pb.ListAnswersRequest(comparison=comparison.id, phase=pb.COMPARISON_PHASE_ANSWERS)
    first = await evaluation.ListAnswers(request)
    assert {answer.failure for answer in first.answers} == {pb.FAILURE_KIND_READING_FAILURE}
    (tmp_path / "evaluation" / "comparisons" / comparison.id / OUTCOME).unlink()
    assert await evaluation.ListAnswers(request) == first


async def test_what_users_write_is_escaped_in_the_report(stack, evaluation):
    stack.generation.answer = "<script>alert(1)</script> I do not know."
    nasty = (
        questions()
        + json.dumps(
            {"question": "<img src=x onerror=alert(2)>", "answers": ["<b>no</b>"]}
        ).encode()
    )
    comparison = await compared(evaluation, upload(nasty))
    request = pb.DownloadReportRequest(comparison=comparison.id, format=1)
    parts = [part.chunk.data async for part in evaluation.DownloadReport(request)]
    text = b"".join(parts).decode()
    assert "<script" not in text and "<img" not in text


async def test_changed_documents_are_replaced_and_asked_about_again(stack, evaluation):
    changed = [(name, f"{name} is led by Bob.".encode()) for name in NAMES[:4]]
    lines = (
        questions(4, answers=["Bob"], stale_answers=["I do not know"])
        + questions()[len(questions(4)) :]
    )
    comparison = await compared(evaluation, upload(lines, changed))
    assert comparison.state == FINISHED, (comparison.reason, comparison.message)
    staleness = {result.candidate: result.staleness for result in comparison.results}
    assert staleness["base"].questions == 4
    assert staleness["base"].old_share.value == 1
    found = await stack.retrieval.GetDocument(
        retrieval_pb2.GetDocumentRequest(corpus="c", id=NAMES[0])
    )
    assert "Bob" in found.text


async def test_a_path_that_errors_on_every_question_is_failed_and_never_scored(stack, evaluation):
    adapter = stack.tuning.add("style").id
    stack.generation.adapter_error = NotReady("ADAPTER_INCOMPATIBLE", "made for another model")
    tuned = pb.Candidate(id="tuned", path=PATH_TUNED, adapter=adapter)
    comparison = await compared(evaluation, upload(questions(), candidates=[*BOTH, tuned]))
    result = next(result for result in comparison.results if result.candidate == "tuned")
    assert result.failed and dict(result.errors) == {"ADAPTER_INCOMPATIBLE": COUNT}
    assert result.scores.answers == 0
    assert "tuned" not in {d.first for d in comparison.differences} | {
        d.second for d in comparison.differences
    }


async def test_a_comparison_of_which_every_candidate_fails_has_no_verdict(stack, evaluation):
    stack.generation.error = NotReady("ADAPTER_INCOMPATIBLE", "nothing works")
    comparison = await compared(evaluation, upload(questions()))
    assert (comparison.state, comparison.reason) == (FAILED, "EVERY_CANDIDATE_FAILED")
    assert not comparison.HasField("verdict")


async def test_a_service_that_is_away_is_waited_for(stack, evaluation):
    stack.generation.answer = "I do not know."
    comparison, _ = await created(evaluation, upload(questions()))
    stack.generation.error = Unavailable("ENGINE_DEAD", "away")
    events = evaluation.WatchComparison(pb.WatchComparisonRequest(id=comparison.id))
    await anext(aiter(events))
    stack.generation.error = None
    found = await ended(evaluation, comparison.id)
    assert found.state == FINISHED
    assert all(not result.errors for result in found.results)


async def held(stack: SmallStack, evaluation, answers: int) -> pb.Comparison:
    """Return a comparison that waits for its next answer behind so many."""
    stack.generation.hold_from = answers
    comparison, _ = await created(evaluation, upload(questions(), concurrency=2))
    async with asyncio.timeout(20):
        while len(stack.generation.requests) < answers + 2:
            await asyncio.sleep(0.01)
    return comparison


async def test_a_restarted_service_goes_on_and_asks_nothing_twice(tmp_path):
    async with a_stack(tmp_path) as stack, connect(stack.address, ANSWERS, EVALUATION) as channel:
        comparison = await held(stack, EvaluationServiceStub(channel), 20)
        file = tmp_path / "evaluation" / "comparisons" / comparison.id / ANSWERS_FILE
    kept = file.read_bytes()
    assert kept.count(b"\n") == 20
    file.write_bytes(kept + b'{"candidate": "ba')  # as a kill leaves it
    async with a_stack(tmp_path) as stack, connect(stack.address, ANSWERS, EVALUATION) as channel:
        evaluation = EvaluationServiceStub(channel)
        found = await ended(evaluation, comparison.id)
        assert found.state == FINISHED, (found.reason, found.message)
        answers = await answers_of(evaluation, comparison.id)
        assert len(stack.generation.requests) == 3 * COUNT - 20
    assert file.read_bytes().startswith(kept)
    asked = [(answer.candidate, answer.line, answer.phase) for answer in answers]
    assert len(asked) == len(set(asked)) == 3 * COUNT


async def test_a_cancelled_comparison_keeps_its_answers_and_has_no_report(stack, evaluation):
    comparison = await held(stack, evaluation, 10)
    request = pb.CancelComparisonRequest(id=comparison.id)
    cancelled = (await evaluation.CancelComparison(request)).comparison
    assert cancelled.state == pb.COMPARISON_STATE_CANCELLED
    assert len(await answers_of(evaluation, comparison.id)) == 10
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in evaluation.DownloadReport(
            pb.DownloadReportRequest(comparison=comparison.id, format=1)
        ):
            pass
    assert reason_of(error) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "COMPARISON_NOT_FINISHED",
    )


async def test_without_candidates_the_usual_ones_are_compared(stack, evaluation):
    adapter = stack.tuning.add("style").id
    lines = questions() + b"".join(
        json.dumps({"question": f"What is {n}?", "answers": ["I do not know"]}).encode() + b"\n"
        for n in range(10)
    )
    requests = upload(lines, candidates=[], adapters=["style"], shots=3)
    comparison, _ = await created(evaluation, requests)
    made = {one.id: one for one in comparison.start.candidates}
    assert list(made) == ["base", "few-shot", "rag", "tuned", "hybrid"]
    assert made["tuned"].adapter == made["hybrid"].adapter == adapter
    assert len(made["few-shot"].options.examples) == len(comparison.start.examples) == 3


async def test_one_idempotency_key_makes_one_comparison(evaluation):
    first, _ = await created(evaluation, upload(questions(), idempotency_key="k"))
    again, _ = await created(evaluation, upload(questions(), idempotency_key="k"))
    assert first.id == again.id
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await created(evaluation, upload(questions(31), idempotency_key="k"))
    assert reason_of(error) == (grpc.StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_KEY_REUSED")


async def test_questions_that_a_candidate_is_shown_are_not_scored(evaluation):
    turns = [answer_pb2.Turn(question=f"Who leads {name}?", answer="Ann") for name in NAMES[:3]]
    shown = pb.Candidate(
        id="shown", path=PATH_BASE, options=answer_pb2.AnswerOptions(examples=turns)
    )
    comparison, _ = await created(evaluation, upload(questions(), candidates=[*BOTH, shown]))
    assert comparison.questions == COUNT - 3


async def test_answers_are_listed_by_candidate_and_phase(evaluation):
    comparison = await compared(evaluation, upload(questions()))
    request = pb.ListAnswersRequest(
        comparison=comparison.id,
        candidate="base",
        phase=pb.COMPARISON_PHASE_ANSWERS,
        page_size=COUNT,
    )
    page = await evaluation.ListAnswers(request)
    assert [answer.candidate for answer in page.answers] == ["base"] * COUNT
    request.candidate = "none"
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await evaluation.ListAnswers(request)
    assert reason_of(error) == (MISSING, "CANDIDATE_NOT_FOUND")
    for call in (
        evaluation.ListAnswers(pb.ListAnswersRequest(comparison=comparison.id, page_size=1001)),
        evaluation.ListComparisons(pb.ListComparisonsRequest(page_size=1001)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call
        assert reason_of(error) == (INVALID, "PAGE_SIZE_OUT_OF_RANGE")
    request = pb.ListAnswersRequest(comparison=comparison.id, page_token="?")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await evaluation.ListAnswers(request)
    assert reason_of(error) == (INVALID, "PAGE_TOKEN_INVALID")


def answering(**options: object) -> dict[str, object]:
    options = answer_pb2.AnswerOptions(**options)
    return {"candidates": [pb.Candidate(id="x", path=PATH_RAG, options=options)]}


def writing(**options: object) -> dict[str, object]:
    return answering(generate=generation_pb2.GenerateOptions(**options))


INVALID, MISSING = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize(
    ("fields", "code", "reason"),
    [
        ({"corpus": "none"}, MISSING, "CORPUS_NOT_FOUND"),
        ({"corpus": ""}, INVALID, "CORPUS_MISSING"),
        ({"candidates": [], "adapters": ["none"]}, MISSING, "ADAPTER_NOT_FOUND"),
        ({"adapters": ["none"]}, INVALID, "CANDIDATE_INVALID"),
        ({"candidates": [pb.Candidate(id="x", path=PATH_AUTO)]}, INVALID, "CANDIDATE_INVALID"),
        ({"candidates": [pb.Candidate(id="X Y", path=PATH_BASE)]}, INVALID, "CANDIDATE_INVALID"),
        ({"candidates": [pb.Candidate(id="x", path=PATH_TUNED)]}, INVALID, "ADAPTER_MISSING"),
        ({"candidates": [BOTH[0], BOTH[0]]}, INVALID, "CANDIDATE_INVALID"),
        (
            {"candidates": [pb.Candidate(id=f"c{n}", path=PATH_BASE) for n in range(17)]},
            INVALID,
            "TOO_MANY_CANDIDATES",
        ),
        ({"concurrency": 65}, INVALID, "CONCURRENCY_OUT_OF_RANGE"),
        ({"margin": 0.6}, INVALID, "MARGIN_OUT_OF_RANGE"),
        ({"shots": 33}, INVALID, "EXAMPLES_INVALID"),
        ({"examples": [answer_pb2.Turn(question="q")]}, INVALID, "EXAMPLES_INVALID"),
        (
            {"constraints": pb.Constraints(max_p95_ms=float("nan"))},
            INVALID,
            "CONSTRAINT_INVALID",
        ),
        ({"constraints": pb.Constraints(min_quality=2)}, INVALID, "CONSTRAINT_INVALID"),
        ({"scoring": pb.ScoringOptions(strict=pb.SCORER_CONTAINS)}, INVALID, "SCORER_INVALID"),
        ({"scoring": pb.ScoringOptions(judge=True)}, PRECONDITION, "JUDGE_MISSING"),
        ({"idempotency_key": "ä"}, INVALID, "IDEMPOTENCY_KEY_INVALID"),
        (writing(max_tokens=0), INVALID, "CANDIDATE_INVALID"),
        (writing(max_tokens=4096), INVALID, "CANDIDATE_INVALID"),  # the context has 2048
        (writing(min_tokens=300), INVALID, "CANDIDATE_INVALID"),
        (writing(temperature=2.5), INVALID, "CANDIDATE_INVALID"),
        (writing(stop=[""]), INVALID, "CANDIDATE_INVALID"),
        (writing(json_schema="no json"), INVALID, "CANDIDATE_INVALID"),
        (answering(limit=51), INVALID, "CANDIDATE_INVALID"),
        (answering(pinned_documents=["Town1"]), INVALID, "CANDIDATE_INVALID"),
        (answering(examples=[answer_pb2.Turn(question="q")]), INVALID, "EXAMPLES_INVALID"),
        (
            answering(examples=[answer_pb2.Turn(question="q" * 262_144, answer="a")]),
            INVALID,
            "EXAMPLES_INVALID",
        ),
    ],
)
async def test_a_comparison_that_can_never_succeed_is_refused(evaluation, fields, code, reason):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await created(evaluation, upload(questions(), **fields))
    assert reason_of(error) == (code, reason)
    listed = await evaluation.ListComparisons(pb.ListComparisonsRequest())
    assert not listed.comparisons


@pytest.mark.parametrize(
    ("state", "accepted_by", "reason"),
    [
        (tuning_pb2.ADAPTER_STATE_VERIFYING, "", "ADAPTER_VERIFYING"),
        (tuning_pb2.ADAPTER_STATE_UNFAITHFUL, "", "ADAPTER_NOT_ACCEPTED"),
        (tuning_pb2.ADAPTER_STATE_UNFAITHFUL, "ann", None),
    ],
)
async def test_an_adapter_that_is_not_served_is_not_compared(
    stack, evaluation, state, accepted_by, reason
):
    stack.tuning.add("style", state, accepted_by=accepted_by)
    tuned = pb.Candidate(id="tuned", path=PATH_TUNED, adapter="style")
    for fields in ({"candidates": [tuned]}, {"candidates": [], "adapters": ["style"]}):
        if reason is None:
            assert (await created(evaluation, upload(questions(), **fields)))[0].id
            continue
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await created(evaluation, upload(questions(), **fields))
        assert reason_of(error) == (PRECONDITION, reason)


async def test_more_documents_than_may_change_are_refused(evaluation, monkeypatch):
    monkeypatch.setattr(uploads, "MOST_DOCUMENTS", 3)  # each takes a millisecond
    documents = [(f"d{number}", b"text") for number in range(4)]
    assert (await created(evaluation, upload(questions(), documents[:3])))[0].id
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await created(evaluation, upload(questions(), documents))
    assert reason_of(error) == (INVALID, "TOO_MANY_DOCUMENTS")


@pytest.mark.parametrize("part", ["questions", "chunk"])
async def test_an_upload_that_is_too_large_is_refused_and_leaves_nothing(
    evaluation, tmp_path, part
):
    parts = list(upload(questions(), [("d", b"text")]))
    at = 2 if part == "questions" else 4
    parts[at:at] = [pb.CreateComparisonRequest(**{part: b" " * MEBIBYTE})] * 4  # as much as may be
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await created(evaluation, parts)
    assert reason_of(error) == (INVALID, "UPLOAD_TOO_LARGE")
    assert not list((tmp_path / "evaluation" / "tmp").iterdir())


async def test_what_is_said_about_documents_counts_as_part_of_an_upload(evaluation):
    parts = list(upload(questions()))
    for number in range(5):
        header = retrieval_pb2.PutDocumentsDocument(
            id=f"d{number}", media_type="text/plain", title="t" * MEBIBYTE
        )
        parts.insert(-1, pb.CreateComparisonRequest(changed_document=header))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await created(evaluation, parts)
    assert reason_of(error) == (INVALID, "UPLOAD_TOO_LARGE")


async def test_an_empty_corpus_is_refused(stack, evaluation):
    await stack.retrieval.CreateCorpus(retrieval_pb2.CreateCorpusRequest(name="empty"))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await created(evaluation, upload(questions(), corpus="empty"))
    assert reason_of(error) == (PRECONDITION, "CORPUS_EMPTY")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "QUESTIONS_EMPTY"),
        (b'{"question": "a"}\n', "QUESTIONS_INVALID"),
        (b"no json\n", "QUESTIONS_INVALID"),
        (
            b'{"question": "a", "answers": ["1"]}\n{"question": "a", "answers": ["2"]}\n',
            "QUESTIONS_INVALID",
        ),
    ],
)
async def test_questions_that_are_not_in_order_are_refused(evaluation, content, reason):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await created(evaluation, upload(content))
    assert reason_of(error) == (INVALID, reason)


async def test_a_question_that_comes_twice_is_asked_once_and_named(evaluation):
    comparison, findings = await created(evaluation, upload(questions() + questions(2)))
    assert findings == ["DUPLICATE", "DUPLICATE"]
    assert comparison.questions == COUNT


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([], "START_MISSING"),
        (["questions"], "START_MISSING"),
        (["start", "questions"], "END_MISSING"),
        (["start", "chunk"], "PART_OUT_OF_ORDER"),
        (["start", "questions", "document", "questions"], "PART_OUT_OF_ORDER"),
        (["start", "questions", "end", "questions"], "PART_OUT_OF_ORDER"),
        (["start", "large"], "CHUNK_TOO_LARGE"),
        (["start", "questions", "document", "document"], "DOCUMENT_INVALID"),
    ],
)
async def test_an_upload_out_of_order_is_refused(evaluation, parts, reason):
    document = retrieval_pb2.PutDocumentsDocument(id="d", media_type="text/plain")
    known = {
        "start": pb.CreateComparisonRequest(
            start=pb.CreateComparisonStart(corpus="c", candidates=BOTH)
        ),
        "questions": pb.CreateComparisonRequest(questions=questions()),
        "large": pb.CreateComparisonRequest(questions=b" " * (1024 * 1024 + 1)),
        "document": pb.CreateComparisonRequest(changed_document=document),
        "chunk": pb.CreateComparisonRequest(chunk=b"text"),
        "end": pb.CreateComparisonRequest(end=pb.CreateComparisonEnd()),
    }
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await created(evaluation, [known[part] for part in parts])
    assert reason_of(error) == (INVALID, reason)


async def test_what_is_not_there_is_not_found(evaluation):
    calls = [
        evaluation.GetComparison(pb.GetComparisonRequest(id="none")),
        evaluation.CancelComparison(pb.CancelComparisonRequest(id="none")),
        evaluation.ListAnswers(pb.ListAnswersRequest(comparison="none")),
    ]
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call
        assert reason_of(error) == (MISSING, "COMPARISON_NOT_FOUND")
