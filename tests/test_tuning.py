"""TuningService with a fake trainer and a fake generation: uploads, jobs and adapters."""

import asyncio
import hashlib
import json
import sys
from collections.abc import AsyncIterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest
from tworoads.v1 import tuning_pb2 as pb
from tworoads.v1.tuning_pb2_grpc import TuningServiceStub

from services.prompts.rendering import Renderer
from services.questions import news
from services.runtime.call import TENANT
from services.runtime.errors import NotReady, Unavailable, error_info
from services.runtime.status import real_status
from services.tuning import checks, uploads
from services.tuning.__main__ import check_length
from tests.small_tuning import (
    BASE,
    CONTEXT,
    MAX_RANK,
    SmallTuning,
    created,
    ended,
    examples,
    probe,
    small_tuning,
    upload,
    write_adapter,
)
from tests.tiny_tokenizer import TinyTokenizer

MEBIBYTE = 1024 * 1024
INVALID = grpc.StatusCode.INVALID_ARGUMENT
OTHER_TENANT = ((TENANT, "somebody else"),)


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[SmallTuning]:
    async with small_tuning(tmp_path) as running:
        yield running


def reason_of(error: pytest.ExceptionInfo) -> tuple[grpc.StatusCode, str]:
    info = error_info(error.value)
    return error.value.code(), info.reason if info else ""


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    """Return the status and the reason with which a call fails, streams after all responses."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async with real_status(call):
            if hasattr(call, "__aiter__"):
                async for _ in call:
                    pass
            else:
                await call
    return reason_of(error)


def lines(*rows: Any) -> bytes:
    return b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows)


def start(**fields: Any) -> pb.CreateJobRequest:
    return pb.CreateJobRequest(start=pb.CreateJobStart(**{"name": "house", **fields}))


END = pb.CreateJobRequest(end=pb.CreateJobEnd())


def some(data: bytes) -> pb.CreateJobRequest:
    return pb.CreateJobRequest(examples=data)


def options(**fields: Any) -> dict[str, Any]:
    return {"options": pb.TrainingOptions(**fields)}


def left(folder: Path) -> list[str]:
    """Return what lies there of uploads and jobs."""
    return [path.name for part in ("tmp", "jobs") for path in (folder / part).iterdir()]


async def nothing_left(folder: Path) -> None:
    """Wait until nothing lies there any more: a job says that it has ended, then it is cleared."""
    async with asyncio.timeout(25):
        while left(folder):
            await asyncio.sleep(0)


async def test_examples_become_an_adapter_that_is_measured_and_served(stack: SmallTuning) -> None:
    job = await created(stack.stub, corpus="manual", **options(rank=4, seed=-7))
    assert (job.name, job.base_model, job.corpus) == ("house", "tiny", "manual")
    assert job.prompt_version == "v1"
    assert job.data.lines == job.data.examples == 40
    job = await ended(stack.stub, job.id)
    assert (job.state, job.reason) == (pb.JOB_STATE_READY, "")
    assert (job.progress.step, job.progress.steps) == (3, 3)
    assert job.create_time.ToSeconds() <= job.start_time.ToSeconds() <= job.end_time.ToSeconds()
    response = await stack.stub.GetAdapter(pb.GetAdapterRequest(adapter="house"))
    adapter = response.adapter
    assert (adapter.id, adapter.job) == (job.adapter, job.id)
    assert adapter.state == pb.ADAPTER_STATE_READY
    assert adapter.fidelity.probes >= 16
    assert adapter.fidelity.trainer_difference < 1e-6
    assert adapter.fidelity.base_difference == pytest.approx(1.5)
    assert [speed.streams for speed in adapter.speeds] == [1, 8]
    assert adapter.options == job.options
    assert adapter.examples_hash == job.data.hash
    await nothing_left(stack.folder)


async def test_what_was_left_open_comes_back_with_the_values_that_were_taken(
    stack: SmallTuning,
) -> None:
    job = await created(stack.stub)
    assert job.options == pb.TrainingOptions(
        context=pb.TRAINING_CONTEXT_NONE,
        rank=16,
        alpha=32,
        epochs=3,
        learning_rate=1e-3,
        targets=["q_proj"],
        seed=0,
    )


async def test_an_adapter_that_generation_disagrees_with_waits_until_it_is_accepted(
    stack: SmallTuning,
) -> None:
    stack.generation.adapted = -1.0
    job = await ended(stack.stub, (await created(stack.stub)).id)
    assert (job.state, job.reason) == (pb.JOB_STATE_UNFAITHFUL, "LOG_PROBABILITIES_DIFFER")
    assert "0.5" in job.message
    got = (await stack.stub.GetAdapter(pb.GetAdapterRequest(adapter=job.adapter))).adapter
    stale = pb.AcceptAdapterRequest(adapter=job.adapter, etag="old")
    assert await refused(stack.stub.AcceptAdapter(stale)) == (
        grpc.StatusCode.ABORTED,
        "ETAG_MISMATCH",
    )
    accepting = pb.AcceptAdapterRequest(adapter=job.adapter, etag=got.etag)
    adapter = (await stack.stub.AcceptAdapter(accepting)).adapter
    assert (adapter.state, adapter.accepted_by) == (pb.ADAPTER_STATE_UNFAITHFUL, "default")
    assert adapter.etag != got.etag


async def test_an_adapter_that_nobody_can_measure_is_unmeasured(stack: SmallTuning) -> None:
    stack.generation.error = Unavailable("ENGINE_DEAD", "the engine died")
    job = await ended(stack.stub, (await created(stack.stub)).id)
    assert (job.state, job.reason) == (pb.JOB_STATE_UNMEASURED, "GENERATION_UNAVAILABLE")
    few = await ended(stack.stub, (await created(stack.stub, examples(15))).id)
    assert (few.state, few.reason) == (pb.JOB_STATE_UNMEASURED, "TOO_FEW_PROBES")
    assert few.message


async def test_findings_come_back_while_the_upload_is_open(stack: SmallTuning) -> None:
    call = stack.stub.CreateJob()
    await call.write(start())
    await call.write(some(lines(*examples(10), {"question": "x"}, b"{")))
    found = []
    while len(found) < 2:
        response = await call.read()
        if response.HasField("finding"):
            found.append(response.finding)
    assert [(f.line, f.severity, f.reason) for f in found] == [
        (11, pb.FINDING_SEVERITY_ERROR, "FIELD_MISSING"),
        (12, pb.FINDING_SEVERITY_ERROR, "NOT_JSON"),
    ]
    await call.write(END)
    await call.done_writing()
    assert await call.code() is INVALID
    assert left(stack.folder) == []


async def test_the_check_says_how_far_it_has_come(stack: SmallTuning) -> None:
    call = stack.stub.CreateJob()
    await call.write(start())
    await call.write(some(lines(*examples(10))))
    while (response := await call.read()).progress.checked < 10:
        assert response.HasField("progress")
    assert response.progress.received == 10
    call.cancel()


async def test_a_check_that_takes_long_shows_signs_of_life(
    stack: SmallTuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(news, "PROGRESS_SECONDS", 0.01)
    monkeypatch.setattr(news, "HEARTBEAT_SECONDS", 0.02)
    call = stack.stub.CreateJob()
    await call.write(start())
    for _ in range(5):
        assert (await call.read()).progress == pb.CheckProgress()
    call.cancel()


async def test_duplicates_are_left_out_and_a_question_set_is_compared(stack: SmallTuning) -> None:
    rows = lines(*examples(20), *examples(3))
    asked = lines({"question": "what is 3", "answer": "x"}, {"question": "Why?", "answer": "y"})
    job = await created(stack.stub, rows, asked)
    assert (job.data.lines, job.data.examples, job.data.duplicates) == (23, 20, 3)
    assert (job.data.overlap.questions, job.data.overlap.exact) == (2, 1)
    assert list(job.data.overlap.lines) == [1]


CREATE_ERRORS = {
    "nothing": ([], INVALID, "START_MISSING"),
    "no start": ([some(b"{}\n")], INVALID, "START_MISSING"),
    "two starts": ([start(), start()], INVALID, "PART_OUT_OF_ORDER"),
    "an empty part": ([start(), pb.CreateJobRequest()], INVALID, "PART_OUT_OF_ORDER"),
    "examples after questions": (
        [
            *upload(),
            pb.CreateJobRequest(questions=lines({"question": "q", "answer": "a"})),
            some(b"\n"),
        ],
        INVALID,
        "PART_OUT_OF_ORDER",
    ),
    "large chunk": ([start(), some(b" " * (MEBIBYTE + 1))], INVALID, "CHUNK_TOO_LARGE"),
    "large upload": ([start(), *[some(b" " * MEBIBYTE)] * 5], INVALID, "EXAMPLES_TOO_LARGE"),
    "no examples": ([start()], INVALID, "EXAMPLES_EMPTY"),
    "empty file": ([start(), some(b"")], INVALID, "EXAMPLES_EMPTY"),
    "one example": (list(upload(examples(1))), INVALID, "TOO_FEW_EXAMPLES"),
    "broken line": (list(upload(lines(*examples(), b"{'a'"))), INVALID, "EXAMPLES_INVALID"),
    "few and broken": (list(upload(lines(*examples(2), b"{"))), INVALID, "EXAMPLES_INVALID"),
    "many lines": ([start(), some(b"\n" * 100_001)], INVALID, "TOO_MANY_EXAMPLES"),
    "large answer": (
        [start(), *[some(b'{"question": "q", "answer": "'), *[some(b"a" * 1_000_000)] * 3]],
        INVALID,
        "EXAMPLES_INVALID",
    ),
    "broken question": (list(upload(questions=b"{")), INVALID, "QUESTIONS_INVALID"),
    "name with a path": (list(upload(name="../x")), INVALID, "ADAPTER_NAME_INVALID"),
    "name with a slash": (list(upload(name="a/b")), INVALID, "ADAPTER_NAME_INVALID"),
    "long name": (list(upload(name="a" * 300)), INVALID, "ADAPTER_NAME_INVALID"),
    "look-alike name": (list(upload(name="hоuse")), INVALID, "ADAPTER_NAME_INVALID"),
    "no name": (list(upload(name="")), INVALID, "ADAPTER_NAME_INVALID"),
    "name and line feed": (list(upload(name="house\n")), INVALID, "ADAPTER_NAME_INVALID"),
    "unknown base": (
        list(upload(base_model="huge")),
        grpc.StatusCode.NOT_FOUND,
        "BASE_MODEL_NOT_FOUND",
    ),
    "key": (list(upload(idempotency_key="ä")), INVALID, "IDEMPOTENCY_KEY_INVALID"),
    "long key": (list(upload(idempotency_key="k" * 65)), INVALID, "IDEMPOTENCY_KEY_INVALID"),
    "context": (list(upload(**options(context=9))), INVALID, "CONTEXT_UNKNOWN"),
    "no corpus": (
        list(upload(**options(context=pb.TRAINING_CONTEXT_RETRIEVED))),
        INVALID,
        "CORPUS_MISSING",
    ),
    "unknown corpus": (
        list(upload(corpus="lost", **options(context=pb.TRAINING_CONTEXT_MIXED))),
        grpc.StatusCode.NOT_FOUND,
        "CORPUS_NOT_FOUND",
    ),
    "odd corpus": (list(upload(corpus="../c")), grpc.StatusCode.NOT_FOUND, "CORPUS_NOT_FOUND"),
    "unknown document": (
        list(
            upload(
                examples(relevant=["lost"]),
                corpus="manual",
                **options(context=pb.TRAINING_CONTEXT_RETRIEVED),
            )
        ),
        INVALID,
        "EXAMPLES_INVALID",
    ),
    "rank": (list(upload(**options(rank=17))), INVALID, "RANK_OUT_OF_RANGE"),
    "alpha": (list(upload(**options(alpha=1025))), INVALID, "ALPHA_OUT_OF_RANGE"),
    "negative alpha": (list(upload(**options(alpha=-1))), INVALID, "ALPHA_OUT_OF_RANGE"),
    "no number": (list(upload(**options(alpha=float("nan")))), INVALID, "ALPHA_OUT_OF_RANGE"),
    "epochs": (list(upload(**options(epochs=101))), INVALID, "EPOCHS_OUT_OF_RANGE"),
    "rate": (list(upload(**options(learning_rate=0.2))), INVALID, "LEARNING_RATE_OUT_OF_RANGE"),
    "infinite rate": (
        list(upload(**options(learning_rate=float("inf")))),
        INVALID,
        "LEARNING_RATE_OUT_OF_RANGE",
    ),
    "rate is no number": (
        list(upload(**options(learning_rate=float("nan")))),
        INVALID,
        "LEARNING_RATE_OUT_OF_RANGE",
    ),
    "targets": (list(upload(**options(targets=["lm_head"]))), INVALID, "TARGETS_INVALID"),
    "many targets": (list(upload(**options(targets=["q_proj"] * 33))), INVALID, "TARGETS_INVALID"),
    "share": (list(upload(**options(held_out_share=0.6))), INVALID, "HELD_OUT_OUT_OF_RANGE"),
    "share is no number": (
        list(upload(**options(held_out_share=float("nan")))),
        INVALID,
        "HELD_OUT_OUT_OF_RANGE",
    ),
    "4 bits": (
        list(upload(**options(quantized=True))),
        grpc.StatusCode.FAILED_PRECONDITION,
        "QUANTIZATION_NEEDS_GPU",
    ),
}


@pytest.mark.parametrize("parts, code, reason", CREATE_ERRORS.values(), ids=CREATE_ERRORS)
async def test_an_upload_that_is_refused_says_why_and_leaves_nothing(
    stack: SmallTuning, parts: list[pb.CreateJobRequest], code: grpc.StatusCode, reason: str
) -> None:
    whole = parts if END in parts else [*parts, END]
    assert await refused(stack.stub.CreateJob(iter(whole))) == (code, reason)
    assert left(stack.folder) == []
    assert not (await stack.stub.ListJobs(pb.ListJobsRequest())).jobs


async def test_an_upload_that_breaks_off_makes_no_job(stack: SmallTuning) -> None:
    parts = [start(), some(lines(*examples(40)))]
    assert await refused(stack.stub.CreateJob(iter(parts))) == (INVALID, "END_MISSING")
    assert left(stack.folder) == []


async def test_an_upload_that_needs_retrieval_is_refused_while_that_is_away(
    stack: SmallTuning,
) -> None:
    stack.retrieval.error = Unavailable("STORE_UNAVAILABLE", "the store is away")
    parts = upload(corpus="manual", **options(context=pb.TRAINING_CONTEXT_RETRIEVED))
    code, _ = await refused(stack.stub.CreateJob(parts))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert left(stack.folder) == []


async def test_a_caller_who_leaves_in_mid_upload_leaves_nothing(stack: SmallTuning) -> None:
    call = stack.stub.CreateJob()
    await call.write(start())
    await call.write(some(lines(*examples(10))))
    while (await call.read()).progress.checked < 10:
        pass
    assert len(left(stack.folder)) == 1
    call.cancel()
    await nothing_left(stack.folder)
    assert not (await stack.stub.ListJobs(pb.ListJobsRequest())).jobs


async def test_only_so_many_uploads_are_taken_at_once(
    stack: SmallTuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "OF_TENANT", 1)
    monkeypatch.setattr(uploads, "AT_ONCE", 2)
    full = (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    calls = []
    for tenant in ("one", "two"):  # each finds a place that the other leaves it
        mine = ((TENANT, tenant),)
        calls.append(stack.stub.CreateJob(metadata=mine))
        await calls[-1].write(start())
        await calls[-1].read()
        assert await refused(stack.stub.CreateJob(upload(), metadata=mine)) == full
    assert await refused(stack.stub.CreateJob(upload())) == full
    for call in calls:
        call.cancel()


async def test_a_tenant_whose_share_of_the_disk_is_full_keeps_no_other_out(tmp_path: Path) -> None:
    full = (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL")
    async with small_tuning(tmp_path, most_bytes=5000) as stack:
        job = await ended(stack.stub, (await created(stack.stub, idempotency_key="k")).id)
        assert job.adapter
        assert await refused(stack.stub.CreateJob(upload())) == full
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stack.stub.ImportAdapter()
        assert error_info(error.value).reason == "STORE_FULL"
        assert (await created(stack.stub, idempotency_key="k")).id == job.id
        others = stack.stub.CreateJob(upload(), metadata=OTHER_TENANT)
        assert any([response.HasField("job") async for response in others])


async def test_the_same_key_with_the_same_upload_is_the_same_job(stack: SmallTuning) -> None:
    job = await created(stack.stub, idempotency_key="k 1")
    again = await created(stack.stub, idempotency_key="k 1")
    assert again.id == job.id
    both = await asyncio.gather(
        *(created(stack.stub, idempotency_key="k2", name="other") for _ in range(2))
    )
    assert both[0].id == both[1].id != job.id
    assert len({(await created(stack.stub)).id for _ in range(2)}) == 2


@pytest.mark.parametrize(
    "other", [{"rows": examples(41)}, {"name": "b"}, options(seed=1), {"questions": b"{}"}]
)
async def test_a_key_with_another_upload_is_refused(
    stack: SmallTuning, other: dict[str, Any]
) -> None:
    if "questions" in other:
        other = {"questions": lines({"question": "q", "answer": "a"})}
    await created(stack.stub, idempotency_key="k")
    assert await refused(stack.stub.CreateJob(upload(idempotency_key="k", **other))) == (
        grpc.StatusCode.ALREADY_EXISTS,
        "IDEMPOTENCY_KEY_REUSED",
    )


async def test_a_key_is_its_tenants_own(stack: SmallTuning) -> None:
    mine = await created(stack.stub, idempotency_key="k")
    theirs = stack.stub.CreateJob(upload(examples(9), idempotency_key="k"), metadata=OTHER_TENANT)
    jobs = [response.job async for response in theirs if response.HasField("job")]
    assert jobs[0].id != mine.id


async def test_jobs_are_listed_the_newest_first_in_pages(stack: SmallTuning) -> None:
    ids = [(await created(stack.stub)).id for _ in range(5)]
    await ended(stack.stub, ids[-1])
    found: list[str] = []
    token = ""
    while True:
        request = pb.ListJobsRequest(page_size=2, page_token=token)
        page = await stack.stub.ListJobs(request)
        found += [job.id for job in page.jobs]
        assert len(page.jobs) <= 2
        if not (token := page.next_page_token):
            break
    assert found == ids[::-1]


async def test_a_list_has_no_log_and_a_job_has_its_last_lines(stack: SmallTuning) -> None:
    stack.trainer.deaths = 3
    job = await ended(stack.stub, (await created(stack.stub)).id)
    assert job.log_tail == "last words"
    [listed] = (await stack.stub.ListJobs(pb.ListJobsRequest())).jobs
    assert (listed.id, listed.log_tail) == (job.id, "")
    got = (await stack.stub.GetJob(pb.GetJobRequest(id=job.id))).job
    assert got == job


NOWHERE = f"house@{'0' * 12}"
NOT_FOUND = grpc.StatusCode.NOT_FOUND
CALL_ERRORS = {
    "no job": ("GetJob", pb.GetJobRequest(id="x"), NOT_FOUND, "JOB_NOT_FOUND"),
    "long id": ("GetJob", pb.GetJobRequest(id="x" * 300), NOT_FOUND, "JOB_NOT_FOUND"),
    "watch no job": ("WatchJob", pb.WatchJobRequest(id="x"), NOT_FOUND, "JOB_NOT_FOUND"),
    "cancel no job": ("CancelJob", pb.CancelJobRequest(), NOT_FOUND, "JOB_NOT_FOUND"),
    "jobs page size": (
        "ListJobs",
        pb.ListJobsRequest(page_size=1001),
        INVALID,
        "PAGE_SIZE_OUT_OF_RANGE",
    ),
    "jobs page token": (
        "ListJobs",
        pb.ListJobsRequest(page_token="!"),
        INVALID,
        "PAGE_TOKEN_INVALID",
    ),
    "jobs page token of words": (
        "ListJobs",
        pb.ListJobsRequest(page_token="YWJj"),
        INVALID,
        "PAGE_TOKEN_INVALID",
    ),
    "adapters page size": (
        "ListAdapters",
        pb.ListAdaptersRequest(page_size=1001),
        INVALID,
        "PAGE_SIZE_OUT_OF_RANGE",
    ),
    "adapters page token": (
        "ListAdapters",
        pb.ListAdaptersRequest(page_token="!"),
        INVALID,
        "PAGE_TOKEN_INVALID",
    ),
    "no adapter": ("GetAdapter", pb.GetAdapterRequest(adapter="x"), NOT_FOUND, "ADAPTER_NOT_FOUND"),
    "adapter name": (
        "GetAdapter",
        pb.GetAdapterRequest(adapter="../x"),
        INVALID,
        "ADAPTER_NAME_INVALID",
    ),
    "download nothing": (
        "DownloadAdapter",
        pb.DownloadAdapterRequest(adapter=NOWHERE),
        NOT_FOUND,
        "ADAPTER_NOT_FOUND",
    ),
    "download by name": (
        "DownloadAdapter",
        pb.DownloadAdapterRequest(adapter="house"),
        INVALID,
        "ADAPTER_NAME_INVALID",
    ),
    "accept nothing": (
        "AcceptAdapter",
        pb.AcceptAdapterRequest(adapter=NOWHERE),
        NOT_FOUND,
        "ADAPTER_NOT_FOUND",
    ),
    "accept by name": (
        "AcceptAdapter",
        pb.AcceptAdapterRequest(adapter="house"),
        INVALID,
        "ADAPTER_NAME_INVALID",
    ),
    "delete nothing": (
        "DeleteAdapter",
        pb.DeleteAdapterRequest(adapter=NOWHERE),
        NOT_FOUND,
        "ADAPTER_NOT_FOUND",
    ),
    "delete by name": (
        "DeleteAdapter",
        pb.DeleteAdapterRequest(adapter="house"),
        INVALID,
        "ADAPTER_NAME_INVALID",
    ),
}


@pytest.mark.parametrize("method, request_, code, reason", CALL_ERRORS.values(), ids=CALL_ERRORS)
async def test_a_call_that_cannot_succeed_says_why(
    stack: SmallTuning, method: str, request_: Any, code: grpc.StatusCode, reason: str
) -> None:
    assert await refused(getattr(stack.stub, method)(request_)) == (code, reason)


async def test_another_tenant_sees_nothing(stack: SmallTuning) -> None:
    job = await ended(stack.stub, (await created(stack.stub)).id)
    stub = stack.stub
    foreign = {"metadata": OTHER_TENANT}
    for call, reason in (
        (stub.GetJob(pb.GetJobRequest(id=job.id), **foreign), "JOB_NOT_FOUND"),
        (stub.WatchJob(pb.WatchJobRequest(id=job.id), **foreign), "JOB_NOT_FOUND"),
        (stub.CancelJob(pb.CancelJobRequest(id=job.id), **foreign), "JOB_NOT_FOUND"),
        (
            stub.GetAdapter(pb.GetAdapterRequest(adapter=job.adapter), **foreign),
            "ADAPTER_NOT_FOUND",
        ),
        (
            stub.DownloadAdapter(pb.DownloadAdapterRequest(adapter=job.adapter), **foreign),
            "ADAPTER_NOT_FOUND",
        ),
        (
            stub.DeleteAdapter(pb.DeleteAdapterRequest(adapter=job.adapter), **foreign),
            "ADAPTER_NOT_FOUND",
        ),
    ):
        assert await refused(call) == (NOT_FOUND, reason)
    assert not (await stub.ListJobs(pb.ListJobsRequest(), **foreign)).jobs
    assert not (await stub.ListAdapters(pb.ListAdaptersRequest(), **foreign)).adapters


async def downloaded(stub: TuningServiceStub, **request: Any) -> tuple[pb.Adapter, bytes]:
    content = b""
    call = stub.DownloadAdapter(pb.DownloadAdapterRequest(**request))
    responses = aiter(call)
    first = await anext(responses)
    async for response in responses:
        assert response.chunk.offset == request.get("offset", 0) + len(content)
        content += response.chunk.data
    return first.adapter, content


async def test_an_adapter_is_downloaded_whole_and_from_an_offset(stack: SmallTuning) -> None:
    job = await ended(stack.stub, (await created(stack.stub)).id)
    adapter, content = await downloaded(stack.stub, adapter=job.adapter)
    assert len(content) == sum(file.size for file in adapter.files)
    _, rest = await downloaded(stack.stub, adapter=job.adapter, offset=100)
    assert rest == content[100:]
    _, raw = await downloaded(stack.stub, adapter=job.adapter, content=pb.ADAPTER_CONTENT_EXAMPLES)
    rows = [json.loads(line) for line in raw.splitlines()]
    assert len(rows) == job.data.examples - job.data.held_out
    assert all(row in examples() for row in rows)
    beyond = pb.DownloadAdapterRequest(adapter=job.adapter, offset=len(content) + 1)
    assert await refused(stack.stub.DownloadAdapter(beyond)) == (INVALID, "OFFSET_OUT_OF_RANGE")


async def test_a_deleted_adapter_is_gone_and_the_version_before_has_its_name(
    stack: SmallTuning,
) -> None:
    first = await ended(stack.stub, (await created(stack.stub)).id)
    second = await ended(stack.stub, (await created(stack.stub)).id)
    listed = (await stack.stub.ListAdapters(pb.ListAdaptersRequest())).adapters
    assert [adapter.id for adapter in listed] == [second.adapter, first.adapter]
    await stack.stub.DeleteAdapter(pb.DeleteAdapterRequest(adapter=second.adapter))
    newest = (await stack.stub.GetAdapter(pb.GetAdapterRequest(adapter="house"))).adapter
    assert newest.id == first.adapter
    gone = stack.stub.GetAdapter(pb.GetAdapterRequest(adapter=second.adapter))
    assert await refused(gone) == (NOT_FOUND, "ADAPTER_NOT_FOUND")


async def test_only_an_unfaithful_adapter_can_be_accepted(stack: SmallTuning) -> None:
    job = await ended(stack.stub, (await created(stack.stub)).id)
    accepting = stack.stub.AcceptAdapter(pb.AcceptAdapterRequest(adapter=job.adapter))
    code = grpc.StatusCode.FAILED_PRECONDITION
    assert await refused(accepting) == (code, "ADAPTER_NOT_UNFAITHFUL")


def imported(folder: Path, probes: int = 0) -> list[pb.ImportAdapterRequest]:
    """Return the upload of an adapter that suits the base, called "other"."""
    write_adapter(folder)
    parts = [pb.ImportAdapterRequest(start=pb.ImportAdapterStart(name="other"))]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        content = (folder / name).read_bytes()
        file = pb.AdapterFile(
            name=name, size=len(content), sha256=hashlib.sha256(content).hexdigest()
        )
        parts += [pb.ImportAdapterRequest(file=file), pb.ImportAdapterRequest(chunk=content)]
    parts += [pb.ImportAdapterRequest(probe=probe(number)) for number in range(probes)]
    return [*parts, pb.ImportAdapterRequest(end=pb.ImportAdapterEnd())]


async def test_an_imported_adapter_is_measured_in_the_background(
    stack: SmallTuning, tmp_path: Path
) -> None:
    parts = imported(tmp_path / "peft", probes=16)
    adapter = (await stack.stub.ImportAdapter(iter(parts))).adapter
    assert adapter.state == pb.ADAPTER_STATE_VERIFYING
    while adapter.state == pb.ADAPTER_STATE_VERIFYING:
        request = pb.GetAdapterRequest(adapter=adapter.id)
        adapter = (await stack.stub.GetAdapter(request)).adapter
    assert adapter.state == pb.ADAPTER_STATE_READY
    again = (await stack.stub.ImportAdapter(iter(parts))).adapter
    assert again == adapter


async def test_an_imported_adapter_is_measured_after_a_restart(tmp_path: Path) -> None:
    parts = imported(tmp_path / "peft", probes=16)
    async with small_tuning(tmp_path / "data") as stack:
        stack.generation.open.clear()
        adapter = (await stack.stub.ImportAdapter(iter(parts))).adapter
        await stack.generation.began.wait()
    async with small_tuning(tmp_path / "data") as stack:
        while adapter.state == pb.ADAPTER_STATE_VERIFYING:
            request = pb.GetAdapterRequest(adapter=adapter.id)
            adapter = (await stack.stub.GetAdapter(request)).adapter
    assert adapter.state == pb.ADAPTER_STATE_READY


async def test_an_import_without_probes_is_unmeasured(stack: SmallTuning, tmp_path: Path) -> None:
    adapter = (await stack.stub.ImportAdapter(iter(imported(tmp_path / "peft")))).adapter
    assert (adapter.state, adapter.reason) == (pb.ADAPTER_STATE_UNMEASURED, "TOO_FEW_PROBES")


def test_four_bits_are_refused_where_what_they_need_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = pb.TrainingOptions(quantized=True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(NotReady) as error:
        checks.options(wanted, BASE, MAX_RANK, gpu=True)
    assert error.value.reason == "QUANTIZATION_UNAVAILABLE"
    assert not checks.options(pb.TrainingOptions(), BASE, MAX_RANK, gpu=True).quantized
    installed = ModuleType("bitsandbytes")
    installed.__spec__ = ModuleSpec("bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", installed)
    assert checks.options(wanted, BASE, MAX_RANK, gpu=True).quantized


def test_a_context_that_the_prompt_alone_fills_ends_the_service_with_a_sentence() -> None:
    renderer = Renderer(TinyTokenizer())
    check_length(renderer, CONTEXT)
    with pytest.raises(SystemExit, match="a context length of 64 tokens has no room"):
        check_length(renderer, 64)
