"""The queue of the tuning service: order, restarts, deaths of the trainer, cancelling, watching."""

import asyncio
import sqlite3
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from tworoads.v1 import tuning_pb2 as pb
from tworoads.v1.tuning_pb2_grpc import TuningServiceStub

from services.runtime.errors import Overloaded, Unavailable, error_info
from services.runtime.owner import owned
from services.runtime.work import PROGRESS_KEPT
from services.tuning import making
from services.tuning.training.trainer import TrainingFailed
from tests.small_tuning import (
    OTHER_BASE,
    FakeTrainer,
    SmallTuning,
    created,
    ended,
    small_tuning,
    upload,
)
from tests.test_tuning import left, nothing_left, options, refused

RETRIEVED = {"corpus": "manual", **options(context=pb.TRAINING_CONTEXT_RETRIEVED)}
STATES = {
    "queued": pb.JOB_STATE_QUEUED,
    "preparing": pb.JOB_STATE_PREPARING,
    "training": pb.JOB_STATE_TRAINING,
    "verifying": pb.JOB_STATE_VERIFYING,
}


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[SmallTuning]:
    async with small_tuning(tmp_path) as running:
        yield running


async def watched(stub: TuningServiceStub, id: str, after: int = 0) -> list[pb.WatchJobResponse]:
    request = pb.WatchJobRequest(id=id, after_sequence=after)
    return [response async for response in stub.WatchJob(request)]


async def reaching(stub: TuningServiceStub, id: str, state: int) -> pb.Job:
    """Watch a job until it is in a state."""
    call = stub.WatchJob(pb.WatchJobRequest(id=id))
    async for response in call:
        if response.HasField("job") and response.job.state == state:
            call.cancel()
            return response.job
    raise AssertionError("the job ended otherwise")


def hold(stack: SmallTuning, state: str) -> None:
    """Make jobs wait in a state; QUEUED is where the second one then waits."""
    holder: dict[str, Any] = {
        "queued": stack.trainer,
        "preparing": stack.retrieval,
        "training": stack.trainer,
        "verifying": stack.generation,
    }
    holder[state].open.clear()


async def held(stack: SmallTuning, state: str) -> pb.Job:
    """Return a job that waits in a state."""
    hold(stack, state)
    job = await created(stack.stub, **RETRIEVED)
    if state == "queued":
        await stack.trainer.began.wait()
        return await created(stack.stub, **RETRIEVED)
    waiting = {
        "preparing": stack.retrieval.began,
        "training": stack.trainer.began,
        "verifying": stack.generation.began,
    }
    await waiting[state].wait()
    return (await stack.stub.GetJob(pb.GetJobRequest(id=job.id))).job


async def test_a_watcher_sees_every_state_once_in_order(
    stack: SmallTuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "PROGRESS_SECONDS", 3600)
    job = await created(stack.stub)
    seen = await watched(stack.stub, job.id)
    assert [response.job.state for response in seen if response.HasField("job")] == [
        pb.JOB_STATE_QUEUED,
        pb.JOB_STATE_PREPARING,
        pb.JOB_STATE_TRAINING,
        pb.JOB_STATE_VERIFYING,
        pb.JOB_STATE_READY,
    ]
    assert [response.sequence for response in seen] == list(range(1, len(seen) + 1))
    times = [response.time.ToMicroseconds() for response in seen]
    assert times == sorted(times)
    progress = [response.progress for response in seen if response.HasField("progress")]
    assert (progress[0].step, progress[-1].step) == (1, 3)
    assert len(progress) == 2  # one in that time, and the last
    assert progress[0].loss == 1 and not progress[0].HasField("held_out_loss")


async def test_watching_goes_on_after_a_sequence_number(stack: SmallTuning) -> None:
    job = await created(stack.stub)
    whole = await watched(stack.stub, job.id)
    for after in range(len(whole) + 1):
        assert await watched(stack.stub, job.id, after) == whole[after:]
    beyond = pb.WatchJobRequest(id=job.id, after_sequence=len(whole) + 1)
    assert await refused(stack.stub.WatchJob(beyond)) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "SEQUENCE_OUT_OF_RANGE",
    )


async def test_a_silent_job_has_heartbeats_with_the_last_number(tmp_path: Path) -> None:
    async with small_tuning(tmp_path, heartbeat_seconds=0.02) as stack:
        job = await held(stack, "training")
        call = stack.stub.WatchJob(pb.WatchJobRequest(id=job.id))
        seen = []
        async for response in call:
            seen.append(response)
            if response.HasField("heartbeat") and seen[-2].HasField("heartbeat"):
                break
        assert seen[-1].sequence == seen[-2].sequence == seen[-3].sequence
        call.cancel()


async def test_a_watcher_who_leaves_does_not_stop_the_job(stack: SmallTuning) -> None:
    job = await held(stack, "training")
    call = stack.stub.WatchJob(pb.WatchJobRequest(id=job.id))
    await call.read()
    call.cancel()
    stack.trainer.open.set()
    assert (await ended(stack.stub, job.id)).state == pb.JOB_STATE_READY


async def test_jobs_are_made_one_at_a_time_in_order(stack: SmallTuning) -> None:
    stack.trainer.open.clear()
    jobs = [await created(stack.stub) for _ in range(3)]
    await stack.trainer.began.wait()
    got = [(await stack.stub.GetJob(pb.GetJobRequest(id=job.id))).job for job in jobs]
    assert [job.jobs_ahead for job in got] == [0, 1, 2]
    listed = (await stack.stub.ListJobs(pb.ListJobsRequest())).jobs
    assert [job.jobs_ahead for job in listed] == [2, 1, 0]
    stack.trainer.open.set()
    for job in jobs:
        await ended(stack.stub, job.id)
    assert stack.trainer.order == [job.id for job in jobs]
    assert stack.trainer.most_running == 1


async def test_more_jobs_run_at_once_if_that_is_set(tmp_path: Path) -> None:
    async with small_tuning(tmp_path, max_jobs=2) as stack:
        stack.trainer.open.clear()
        jobs = [await created(stack.stub) for _ in range(3)]
        for job in jobs[:2]:
            await reaching(stack.stub, job.id, pb.JOB_STATE_TRAINING)
        waiting = (await stack.stub.GetJob(pb.GetJobRequest(id=jobs[2].id))).job
        assert waiting.state == pb.JOB_STATE_QUEUED
        stack.trainer.open.set()
        for job in jobs:
            await ended(stack.stub, job.id)
        assert stack.trainer.most_running == 2


async def test_a_full_queue_refuses_before_the_upload(tmp_path: Path) -> None:
    async with small_tuning(tmp_path, max_queued=1) as stack:
        waiting = await held(stack, "queued")
        full = (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert await refused(stack.stub.CreateJob(upload())) == full
        await stack.stub.CancelJob(pb.CancelJobRequest(id=waiting.id))
        assert (await created(stack.stub)).state == pb.JOB_STATE_QUEUED


async def test_a_known_key_gets_its_job_from_a_full_queue(tmp_path: Path) -> None:
    async with small_tuning(tmp_path, max_queued=1) as stack:
        await held(stack, "training")
        waiting = await created(stack.stub, idempotency_key="k")
        assert (await created(stack.stub, idempotency_key="k")).id == waiting.id


@pytest.mark.parametrize("state", STATES)
async def test_a_job_is_cancelled_at_every_state_and_leaves_nothing(
    stack: SmallTuning, state: str
) -> None:
    job = await held(stack, state)
    assert job.state == STATES[state]
    before = len(left(stack.folder))
    started = time.monotonic()
    cancelled = (await stack.stub.CancelJob(pb.CancelJobRequest(id=job.id))).job
    assert time.monotonic() - started < 2
    assert cancelled.state == pb.JOB_STATE_CANCELLED
    assert cancelled.adapter == ""
    assert len(left(stack.folder)) == before - 1
    assert stack.trainer.running == (1 if state == "queued" else 0)
    assert not (await stack.stub.ListAdapters(pb.ListAdaptersRequest())).adapters
    assert (await watched(stack.stub, job.id))[-1].job.state == pb.JOB_STATE_CANCELLED
    again = (await stack.stub.CancelJob(pb.CancelJobRequest(id=job.id))).job
    assert again == cancelled
    for holder in (stack.trainer, stack.retrieval, stack.generation):
        holder.open.set()
    after = await ended(stack.stub, (await created(stack.stub)).id)
    assert after.state == pb.JOB_STATE_READY


async def test_a_job_that_has_ended_is_not_cancelled(stack: SmallTuning) -> None:
    job = await ended(stack.stub, (await created(stack.stub)).id)
    assert await refused(stack.stub.CancelJob(pb.CancelJobRequest(id=job.id))) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "JOB_ENDED",
    )
    assert (await stack.stub.GetAdapter(pb.GetAdapterRequest(adapter=job.adapter))).adapter


@pytest.mark.parametrize("state", STATES)
async def test_a_job_goes_on_after_a_restart_at_every_state(tmp_path: Path, state: str) -> None:
    async with small_tuning(tmp_path) as stack:
        job = await held(stack, state)
        seen = []
        call = stack.stub.WatchJob(pb.WatchJobRequest(id=job.id))
        while not (response := await call.read()).job.state == STATES[state]:
            seen.append(response)
        seen.append(response)
        call.cancel()
    async with small_tuning(tmp_path) as stack:
        events = await watched(stack.stub, job.id, after=seen[-1].sequence)
        numbers = [response.sequence for response in (*seen, *events)]
        assert numbers == list(range(1, len(numbers) + 1))
        assert events[-1].job.state == pb.JOB_STATE_READY
        assert events[-1].job.restarts == 0
        await nothing_left(stack.folder)
        adapters = (await stack.stub.ListAdapters(pb.ListAdaptersRequest())).adapters
        assert [adapter.id for adapter in adapters if adapter.job == job.id] == [
            events[-1].job.adapter
        ]
        trained = stack.trainer.runs
    if state == "training":
        assert trained == [1]  # the trainer goes on from its checkpoint
    if state == "verifying":
        assert trained == []


RUN_UNTIL_KILLED = """
import asyncio, sys
from pathlib import Path
from types import SimpleNamespace
from tests.small_tuning import created, small_tuning

async def main():
    async with small_tuning(Path(sys.argv[1])) as stack:
        stack.trainer.open.clear()
        job = await created(stack.stub)
        await stack.trainer.began.wait()
        print(job.id, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_job_goes_on_after_the_service_was_killed(tmp_path: Path) -> None:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", RUN_UNTIL_KILLED, str(tmp_path)), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert child.stdout
        id = (await child.stdout.readline()).decode().strip()
    finally:
        child.kill()
        await child.wait()
    async with small_tuning(tmp_path) as stack:
        assert (await ended(stack.stub, id)).state == pb.JOB_STATE_READY
        assert stack.trainer.runs == [1]
        await nothing_left(stack.folder)


async def test_training_that_has_ended_is_not_repeated_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with small_tuning(tmp_path) as stack:
        change = stack.jobs.store.change

        def stops_before_verifying(id: str, changes: Any) -> Any:
            if changes.get("state") == "verifying":
                raise asyncio.CancelledError
            return change(id, changes)

        monkeypatch.setattr(stack.jobs.store, "change", stops_before_verifying)
        job = await created(stack.stub)
        while not (await stack.stub.ListAdapters(pb.ListAdaptersRequest())).adapters:
            pass
    async with small_tuning(tmp_path) as stack:
        assert (await ended(stack.stub, job.id)).state == pb.JOB_STATE_READY
        assert stack.trainer.runs == []
        assert len((await stack.stub.ListAdapters(pb.ListAdaptersRequest())).adapters) == 1


async def test_a_watcher_is_told_that_the_service_stops(stack: SmallTuning) -> None:
    job = await held(stack, "training")
    call = stack.stub.WatchJob(pb.WatchJobRequest(id=job.id))
    await call.read()
    stack.jobs.stop()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        while True:
            await call.read()
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    assert error_info(error.value).reason == "STOPPING"


async def test_another_base_model_after_a_restart_fails_the_job(tmp_path: Path) -> None:
    for state in ("queued", "verifying"):
        async with small_tuning(tmp_path / state) as stack:
            job = await held(stack, state)
        async with small_tuning(tmp_path / state, base=OTHER_BASE) as stack:
            job = await ended(stack.stub, job.id)
            assert (job.state, job.reason) == (pb.JOB_STATE_FAILED, "BASE_MODEL_CHANGED")
            assert job.adapter == ""


@pytest.mark.parametrize("deaths", [1, 2])
async def test_a_trainer_that_dies_goes_on_from_its_checkpoint(
    stack: SmallTuning, deaths: int
) -> None:
    stack.trainer.deaths = deaths
    job = await ended(stack.stub, (await created(stack.stub)).id)
    assert (job.state, job.restarts) == (pb.JOB_STATE_READY, deaths)
    assert stack.trainer.runs == list(range(deaths + 1))


async def test_a_trainer_that_dies_a_third_time_fails_the_job(stack: SmallTuning) -> None:
    stack.trainer.deaths = 3
    stack.trainer.steps = 10
    job = await ended(stack.stub, (await created(stack.stub)).id)
    assert (job.state, job.reason) == (pb.JOB_STATE_FAILED, "TRAINER_DIED")
    assert (job.restarts, job.log_tail) == (2, "last words")
    assert stack.trainer.runs == [0, 1, 2]
    await nothing_left(stack.folder)


async def test_restarts_are_counted_across_restarts_of_the_service(tmp_path: Path) -> None:
    trainer = FakeTrainer()
    trainer.deaths, trainer.steps = 2, 10
    async with small_tuning(tmp_path, trainer) as stack:
        trainer.open.clear()
        job = await created(stack.stub)
        await trainer.began.wait()
    trainer.deaths = 1
    async with small_tuning(tmp_path, trainer) as stack:
        trainer.open.set()
        job = await ended(stack.stub, job.id)
        assert (job.state, job.restarts) == (pb.JOB_STATE_FAILED, 2)


@pytest.mark.parametrize(
    "error, reason",
    [
        (TrainingFailed("LOSS_NOT_FINITE", "the loss is NaN", "x" * 20_000), "LOSS_NOT_FINITE"),
        (TrainingFailed("STORE_FULL", "the disk is full", ""), "STORE_FULL"),
        (OSError(28, "No space left on device"), "STORE_FULL"),
        (Overloaded("STORE_FULL", "the disk is full"), "STORE_FULL"),
        (ValueError("a bug"), "INTERNAL"),
    ],
)
async def test_what_no_restart_mends_fails_at_once(
    stack: SmallTuning, error: Exception, reason: str
) -> None:
    stack.trainer.error = error
    job = await ended(stack.stub, (await created(stack.stub)).id)
    assert (job.state, job.reason, job.restarts) == (pb.JOB_STATE_FAILED, reason, 0)
    assert job.message and "a bug" not in job.message
    assert len(job.log_tail) <= 16 * 1024
    await nothing_left(stack.folder)


async def test_retrieval_that_stays_away_fails_a_job_that_needs_it(stack: SmallTuning) -> None:
    job = await held(stack, "queued")
    stack.retrieval.error = Unavailable("STORE_UNAVAILABLE", "the store is away")
    stack.trainer.open.set()
    job = await ended(stack.stub, job.id)
    assert (job.state, job.reason) == (pb.JOB_STATE_FAILED, "RETRIEVAL_UNAVAILABLE")


async def test_retrieval_that_comes_back_in_time_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "FIRST_PAUSE", 0.01)
    async with small_tuning(tmp_path, retry_seconds=60) as stack:
        job = await held(stack, "queued")
        searches = stack.retrieval.searches
        stack.retrieval.error = Unavailable("STORE_UNAVAILABLE", "the store is away")
        stack.trainer.open.set()
        while stack.retrieval.searches < searches + 20:
            await asyncio.sleep(0)
        stack.retrieval.error = None
        assert (await ended(stack.stub, job.id)).state == pb.JOB_STATE_READY


async def test_a_full_disk_refuses_an_upload_and_fails_no_other_job(
    stack: SmallTuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await held(stack, "training")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("services.tuning.uploads._Upload.add_examples", full)
        code = grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await refused(stack.stub.CreateJob(upload())) == (code, "STORE_FULL")
    stack.trainer.open.set()
    assert (await ended(stack.stub, running.id)).state == pb.JOB_STATE_READY
    await nothing_left(stack.folder)


async def test_a_failure_is_noted_when_the_disk_has_room_again(
    stack: SmallTuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.runtime.queue.FULL_SECONDS", 0.0)
    change, refusals = stack.jobs.store.change, iter([True, True, False])

    def full_for_a_while(id: str, changes: Any) -> Any:
        if changes.get("state") == "failed" and next(refusals):
            raise Overloaded("STORE_FULL", "the disk is full")
        return change(id, changes)

    monkeypatch.setattr(stack.jobs.store, "change", full_for_a_while)
    stack.trainer.error = OSError(28, "No space left on device")
    job = await ended(stack.stub, (await created(stack.stub)).id)
    assert (job.state, job.reason) == (pb.JOB_STATE_FAILED, "STORE_FULL")


async def test_cancelling_frees_the_job_s_files_where_the_disk_is_full(
    stack: SmallTuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await held(stack, "training")
    cancel = stack.jobs.store.cancel

    def full_while_it_is_there(tenant: str, id: str) -> Any:
        if (stack.folder / "jobs" / id).exists():
            raise Overloaded("STORE_FULL", "the disk is full")
        return cancel(tenant, id)

    monkeypatch.setattr(stack.jobs.store, "cancel", full_while_it_is_there)
    cancelled = (await stack.stub.CancelJob(pb.CancelJobRequest(id=job.id))).job
    assert cancelled.state == pb.JOB_STATE_CANCELLED
    assert stack.trainer.running == 0
    stack.trainer.open.set()
    assert (await ended(stack.stub, (await created(stack.stub)).id)).state == pb.JOB_STATE_READY
    assert stack.trainer.order.count(job.id) == 1
    await nothing_left(stack.folder)


async def test_what_cannot_be_noted_is_tried_again_after_a_pause(
    stack: SmallTuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.runtime.queue.FULL_SECONDS", 0.05)
    find, failures = stack.jobs.store.find, [time.monotonic()]

    def broken_twice(id: str) -> Any:
        if len(failures) < 3:
            failures.append(time.monotonic())
            raise sqlite3.OperationalError("disk I/O error")
        return find(id)

    monkeypatch.setattr(stack.jobs.store, "find", broken_twice)
    assert (await ended(stack.stub, (await created(stack.stub)).id)).state == pb.JOB_STATE_READY
    assert failures[2] - failures[1] >= 0.05


async def test_watching_jobs_that_have_ended_keeps_nothing(stack: SmallTuning) -> None:
    job = await ended(stack.stub, (await created(stack.stub)).id)
    await watched(stack.stub, job.id)
    assert not stack.jobs._news


async def test_an_adapter_is_measured_when_generation_is_back(stack: SmallTuning) -> None:
    stack.generation.error = Unavailable("ENGINE_DEAD", "the engine is away")
    job = await ended(stack.stub, (await created(stack.stub)).id)
    assert (job.state, job.reason) == (pb.JOB_STATE_UNMEASURED, "GENERATION_UNAVAILABLE")
    stack.generation.error = None
    stack.jobs.measure()
    wanted = pb.GetAdapterRequest(adapter=job.adapter)
    async with asyncio.timeout(10):
        while (got := (await stack.stub.GetAdapter(wanted)).adapter).reason:
            pass
    assert got.state == pb.ADAPTER_STATE_READY and got.HasField("fidelity")


async def test_tenants_take_turns_when_imported_adapters_are_measured(
    stack: SmallTuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    def imported(tenant: str, number: int) -> SimpleNamespace:
        return SimpleNamespace(tenant=tenant, id=f"style@{number}", job="", reason="")

    waiting = [imported("many", number) for number in range(5)]
    order: list[tuple[str, str]] = []

    async def measure(adapter: Any) -> tuple[Any, str]:
        order.append((adapter.tenant, adapter.id))
        if len(order) == 1:
            waiting.extend(imported("few", number) for number in range(2))
        if adapter.id != "style@1":  # that one stays as it is
            waiting.remove(adapter)
        return adapter, ""

    monkeypatch.setattr(stack.jobs._registry, "verifying", lambda: waiting[::-1])
    monkeypatch.setattr(stack.jobs._maker, "measure", measure)
    await stack.jobs._measure_imported()
    assert order == [
        *(("many", "style@0"), ("few", "style@0"), ("many", "style@1"), ("few", "style@1")),
        *(("many", "style@2"), ("many", "style@3"), ("many", "style@4")),
    ]


async def test_a_training_that_takes_too_long_makes_room_for_the_next(tmp_path: Path) -> None:
    async with small_tuning(tmp_path, training_seconds=1.0) as stack:
        job = await ended(stack.stub, (await held(stack, "training")).id)
        assert (job.state, job.reason) == (pb.JOB_STATE_FAILED, "TRAINING_TOO_LONG")
        assert (job.restarts, stack.trainer.running) == (0, 0)
        stack.trainer.open.set()
        assert (await ended(stack.stub, (await created(stack.stub)).id)).adapter


async def test_an_adapter_that_is_deleted_while_it_is_measured_fails_its_job(
    stack: SmallTuning,
) -> None:
    job = await held(stack, "verifying")
    await stack.stub.DeleteAdapter(pb.DeleteAdapterRequest(adapter=job.adapter))
    stack.generation.open.set()
    job = await ended(stack.stub, job.id)
    assert (job.state, job.reason) == (pb.JOB_STATE_FAILED, "ADAPTER_NOT_FOUND")


async def test_old_progress_is_forgotten_and_states_are_kept(
    stack: SmallTuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr("services.runtime.work.PROGRESS_KEPT", 10)
    stack.trainer.steps = 50
    job = await created(stack.stub)
    await ended(stack.stub, job.id)
    seen = await watched(stack.stub, job.id)
    assert len([response for response in seen if response.HasField("job")]) == 5
    assert [r.progress.step for r in seen if r.HasField("progress")] == list(range(41, 51))
    assert PROGRESS_KEPT == 1000


async def test_what_a_crash_left_of_jobs_is_cleared_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "jobs" / "nobody").mkdir(parents=True)
    (tmp_path / "jobs" / "nobody" / "examples.jsonl").write_text("x")
    async with small_tuning(tmp_path) as stack:
        await nothing_left(stack.folder)


async def test_the_folder_has_one_owner_and_the_next_one_when_that_is_gone(tmp_path: Path) -> None:
    with owned(tmp_path / "data"):
        with pytest.raises(OSError, match="another process uses"):
            with owned(tmp_path / "data"):
                pass
    with owned(tmp_path / "data"):
        pass
