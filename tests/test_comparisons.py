"""The queue of comparisons: order, restarts, failures, cancelling, watching, what stays on disk."""

import asyncio
import sqlite3
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.evaluation.comparison import (
    ANSWERS,
    CHANGED,
    ENDED,
    OUTCOME,
    QUESTIONS,
    Candidate,
    CandidateProgress,
    Comparison,
    ComparisonFailed,
    Constraints,
    Plan,
    Prices,
    Progress,
    Scoring,
)
from services.evaluation.comparisons import Comparisons
from services.evaluation.schema import SCHEMA
from services.runtime.call import current
from services.runtime.database import Database
from services.runtime.errors import (
    AlreadyExists,
    InvalidInput,
    NotFound,
    NotReady,
    Overloaded,
    ServiceError,
    Stopping,
    Unavailable,
)
from services.runtime.work import Event

ASKED = 3  # answers of one comparison
PLAN = Plan(
    candidates=(
        Candidate("base", "base"),
        Candidate("rag", "rag", corpus="manual", options='{"topK": 3}'),
    ),
    corpus="manual",
    adapters=("support@" + "ab" * 32,),
    examples=(("How?", "So."),),
    unscored=(3, 7),
    scoring=Scoring("label", "token_f1", strict_decides=True),
    constraints=Constraints(max_p95_ms=250.0),
    seed=-1,
)
Noted = Event[Comparison, Progress]


class FakeRunner:
    """Writes ASKED answers, each a line with its number, and goes on behind those that are there.

    While `open` is not set it waits behind an answer, having set `began`, for that or for `step`,
    which lets it write one more. At the end it raises `error` if that is set.
    """

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.began = asyncio.Event()
        self.step = asyncio.Event()
        self.error: Exception | None = None
        self.order: list[str] = []
        self.tenants: list[str] = []
        self.found: list[int] = []  # the answers that were there already when a run began
        self.running = 0
        self.most_running = 0

    async def run(
        self,
        comparison: Comparison,
        folder: Path,
        note: Callable[[Progress], Awaitable[None]],
        change: Callable[[Mapping[str, Any]], Awaitable[Comparison]],
    ) -> None:
        there = lines(folder)
        self.order.append(comparison.id)
        self.tenants.append(current.get().tenant)
        self.found.append(len(there))
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            if not comparison.corpus_version:
                comparison = await change({"corpus_version": "7", "model": "tiny"})
            assert (comparison.corpus_version, comparison.model) == ("7", "tiny")
            for number in range(len(there) + 1, ASKED + 1):
                with (folder / ANSWERS).open("a") as file:
                    file.write(f"{number}\n")
                await note(progress(number))
                if not self.open.is_set():
                    self.began.set()
                    await self._opened()
            (folder / OUTCOME).write_text("{}")
            (folder / "report.html").write_text("<html>")
            if self.error:
                raise self.error
        finally:
            self.running -= 1

    async def _opened(self) -> None:
        waits = [asyncio.create_task(event.wait()) for event in (self.open, self.step)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
        self.step.clear()


def progress(done: int) -> Progress:
    candidates = (CandidateProgress("base", done, ASKED, 0, None, 0.5, 1.0),)
    return Progress("answers", float(ASKED - done), candidates)


def lines(folder: Path) -> list[str]:
    path = folder / ANSWERS
    return path.read_text().splitlines() if path.exists() else []


@asynccontextmanager
async def small_queue(
    folder: Path, runner: FakeRunner, **options: Any
) -> AsyncIterator[Comparisons]:
    folder.mkdir(parents=True, exist_ok=True)
    with closing(Database(folder / "evaluation.db", SCHEMA)) as database:
        async with Comparisons(folder, database, runner, **options) as comparisons:
            yield comparisons


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
async def queue(tmp_path: Path, runner: FakeRunner) -> AsyncIterator[Comparisons]:
    async with small_queue(tmp_path, runner) as comparisons:
        yield comparisons


def wanted(tenant: str = "acme") -> Comparison:
    return Comparison(
        id=uuid.uuid4().hex,
        tenant=tenant,
        state="queued",
        plan=PLAN,
        questions=40,
        clusters=12,
        questions_hash="cd" * 32,
        created=1.5,
        author="ann",
        changed_documents=1,
        judge="judge",
        prices=Prices("CHF", 0.1, 0.2, 3),
    )


async def sent(
    comparisons: Comparisons,
    folder: Path,
    comparison: Comparison | None = None,
    key: str = "",
    content: str = "x",
) -> tuple[Comparison, int]:
    """Add a comparison as an upload does: from a folder with questions and a changed document."""
    comparison = comparison or wanted()
    upload = folder / "tmp" / uuid.uuid4().hex
    (upload / CHANGED).mkdir(parents=True)
    (upload / QUESTIONS).write_text('{"question": "Why?", "answers": ["So"]}\n')
    (upload / CHANGED / "0.content").write_text("new")
    try:
        return await comparisons.add(comparison, upload, key, content)
    finally:
        assert not upload.exists()


async def created(comparisons: Comparisons, folder: Path, tenant: str = "acme") -> Comparison:
    comparison, _ = await sent(comparisons, folder, wanted(tenant))
    return comparison


async def watched(comparisons: Comparisons, comparison: Comparison, after: int = 0) -> list[Noted]:
    """Return the events of a comparison up to its end."""
    async with aclosing(comparisons.watch(comparison.tenant, comparison.id, after)) as events:
        return [event async for event in events if event]


async def ended(comparisons: Comparisons, comparison: Comparison) -> Comparison:
    last = (await watched(comparisons, comparison))[-1].value
    assert isinstance(last, Comparison) and last.state in ENDED
    return last


async def held(comparisons: Comparisons, folder: Path, runner: FakeRunner) -> Comparison:
    """Return a comparison that waits behind its first answer."""
    runner.open.clear()
    comparison = await created(comparisons, folder)
    await runner.began.wait()
    return comparison


async def settled(comparisons: Comparisons) -> None:
    """Wait until nothing runs and what ended is cleared."""
    while comparisons._running:
        await asyncio.wait(list(comparisons._running.values()))


async def test_a_watcher_sees_states_and_progress_in_order(
    queue: Comparisons, tmp_path: Path
) -> None:
    comparison = await created(queue, tmp_path)
    seen = await watched(queue, comparison)
    assert [event.sequence for event in seen] == list(range(1, len(seen) + 1))
    assert [event.time for event in seen] == sorted(event.time for event in seen)
    values = [event.value for event in seen]
    assert [v for v in values if isinstance(v, Progress)] == [progress(n) for n in (1, 2, 3)]
    states = [v.state for v in values if isinstance(v, Comparison)]
    assert states == ["queued", "running", "finished"]
    assert values[0] == comparison


async def test_a_finished_comparison_has_all_that_was_set_and_its_files(
    queue: Comparisons, tmp_path: Path
) -> None:
    before = wanted()
    first, ahead = await sent(queue, tmp_path, before)
    assert (first.state, ahead) == ("queued", 0)
    after = await ended(queue, first)
    assert after.created <= after.started <= after.ended
    assert after == replace(
        before,
        state="finished",
        corpus_version="7",
        model="tiny",
        progress=progress(3),
        started=after.started,
        ended=after.ended,
    )
    await settled(queue)
    folder = queue.folder_of(after)
    assert lines(folder) == ["1", "2", "3"]
    assert files(folder) == [ANSWERS, OUTCOME, QUESTIONS, "report.html"]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def test_comparisons_run_one_at_a_time_in_order(
    queue: Comparisons, tmp_path: Path, runner: FakeRunner
) -> None:
    await ended(queue, await created(queue, tmp_path))  # those behind it do not wait for it
    first = await held(queue, tmp_path, runner)
    added = [await sent(queue, tmp_path) for _ in range(3)]
    assert [ahead for _, ahead in added] == [1, 2, 3]
    listed = await asyncio.to_thread(queue.store.page, "acme", 2**60, 10)
    assert [ahead for _, _, ahead in listed] == [3, 2, 1, 0, 0]
    runner.open.set()
    ids = [first.id, *(comparison.id for comparison, _ in added)]
    for comparison, _ in added:
        assert (await ended(queue, comparison)).state == "finished"
    assert runner.order[1:] == ids
    assert runner.most_running == 1


async def test_more_comparisons_run_at_once_if_that_is_set(
    tmp_path: Path, runner: FakeRunner
) -> None:
    async with small_queue(tmp_path, runner, max_running=2) as queue:
        await held(queue, tmp_path, runner)
        runner.began.clear()
        second = await created(queue, tmp_path)
        await runner.began.wait()
        third = await created(queue, tmp_path)
        assert queue.store.get("acme", third.id)[0].state == "queued"
        runner.open.set()
        await ended(queue, second)
        await ended(queue, third)
        assert runner.most_running == 2


async def test_a_comparison_runs_as_its_tenant(
    queue: Comparisons, tmp_path: Path, runner: FakeRunner
) -> None:
    for tenant in ("acme", "other"):
        await ended(queue, await created(queue, tmp_path, tenant))
    assert runner.tenants == ["acme", "other"]


async def test_a_restart_goes_on_where_it_was(tmp_path: Path, runner: FakeRunner) -> None:
    async with small_queue(tmp_path, runner) as queue:
        first = await held(queue, tmp_path, runner)
        second = await created(queue, tmp_path)
        last = queue.store.last(first.id)
        started = queue.store.get("acme", first.id)[0].started
    runner.open.set()
    async with small_queue(tmp_path, runner) as queue:
        events = await watched(queue, first, after=last)
        assert [event.sequence for event in events] == list(range(last + 1, last + 4))
        done = await ended(queue, first)
        assert (done.state, done.started) == ("finished", started)
        assert lines(queue.folder_of(first)) == ["1", "2", "3"]
        assert (await ended(queue, second)).state == "finished"
    assert runner.order == [first.id, first.id, second.id]
    assert runner.found == [0, 1, 0]


RUN_UNTIL_KILLED = """
import asyncio, sys
from pathlib import Path
from tests.test_comparisons import FakeRunner, held, small_queue

async def main():
    folder, runner = Path(sys.argv[1]), FakeRunner()
    async with small_queue(folder, runner) as queue:
        print((await held(queue, folder, runner)).id, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_comparison_goes_on_after_the_service_was_killed(
    tmp_path: Path, runner: FakeRunner
) -> None:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", RUN_UNTIL_KILLED, str(tmp_path)), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert child.stdout
        id = (await child.stdout.readline()).decode().strip()
    finally:
        child.kill()
        await child.wait()
    async with small_queue(tmp_path, runner) as queue:
        done = await ended(queue, queue.store.get("acme", id)[0])
        assert (done.state, lines(queue.folder_of(done))) == ("finished", ["1", "2", "3"])
    assert runner.found == [1]


async def test_a_comparison_that_has_ended_is_not_run_again(
    tmp_path: Path, runner: FakeRunner
) -> None:
    async with small_queue(tmp_path, runner) as queue:
        first = await ended(queue, await created(queue, tmp_path))
    async with small_queue(tmp_path, runner) as queue:
        second = await ended(queue, await created(queue, tmp_path))
        assert queue.store.get("acme", first.id) == (first, 0)
    assert runner.order == [first.id, second.id]


async def test_a_queued_comparison_is_cancelled_and_never_run(
    queue: Comparisons, tmp_path: Path, runner: FakeRunner
) -> None:
    running = await held(queue, tmp_path, runner)
    waiting = await created(queue, tmp_path)
    cancelled = await queue.cancel("acme", waiting.id)
    assert (cancelled.state, cancelled.started) == ("cancelled", 0.0)
    assert cancelled.ended >= cancelled.created
    assert files(queue.folder_of(waiting)) == [QUESTIONS]
    runner.open.set()
    assert (await ended(queue, running)).state == "finished"
    assert (await ended(queue, await created(queue, tmp_path))).state == "finished"
    assert waiting.id not in runner.order


async def test_a_running_comparison_is_cancelled_and_its_answers_are_kept(
    queue: Comparisons, tmp_path: Path, runner: FakeRunner
) -> None:
    running = await held(queue, tmp_path, runner)
    (queue.folder_of(running) / OUTCOME).write_text("{}")
    cancelled = await queue.cancel("acme", running.id)
    assert (cancelled.state, cancelled.progress) == ("cancelled", progress(1))
    assert runner.running == 0
    folder = queue.folder_of(running)
    assert files(folder) == [ANSWERS, QUESTIONS]
    assert lines(folder) == ["1"]
    assert await queue.cancel("acme", running.id) == cancelled
    assert (await watched(queue, running))[-1].value == cancelled
    runner.open.set()
    assert (await ended(queue, await created(queue, tmp_path))).state == "finished"


async def test_the_answers_of_a_cancelled_comparison_outlast_a_restart(
    tmp_path: Path, runner: FakeRunner
) -> None:
    async with small_queue(tmp_path, runner) as queue:
        running = await held(queue, tmp_path, runner)
        await queue.cancel("acme", running.id)
    async with small_queue(tmp_path, runner) as queue:
        assert lines(queue.folder_of(running)) == ["1"]


async def test_a_comparison_that_has_ended_is_not_cancelled(
    queue: Comparisons, tmp_path: Path
) -> None:
    comparison = await ended(queue, await created(queue, tmp_path))
    with pytest.raises(NotReady) as error:
        await queue.cancel("acme", comparison.id)
    assert error.value.reason == "COMPARISON_ENDED"
    assert queue.store.get("acme", comparison.id)[0] == comparison


@pytest.mark.parametrize(
    "error, reason, message",
    [
        (ComparisonFailed("EVERY_CANDIDATE_FAILED", "none answered"), None, "none answered"),
        (NotFound("CORPUS_NOT_FOUND", "it is gone"), None, "it is gone"),
        (Unavailable("GATEWAY_UNAVAILABLE", "it is away"), None, "it is away"),
        (Overloaded("STORE_FULL", "the disk is full"), None, "the disk is full"),
        (OSError(28, "No space left on device"), "STORE_FULL", "the disk is full"),
        (ValueError("a secret"), "INTERNAL", "the service failed; its log says why"),
        (OSError(5, "Input/output error"), "INTERNAL", "the service failed; its log says why"),
    ],
)
async def test_a_failure_keeps_its_reason_and_the_answers(
    queue: Comparisons,
    tmp_path: Path,
    runner: FakeRunner,
    error: Exception,
    reason: str | None,
    message: str,
) -> None:
    runner.error = error
    failed = await ended(queue, await created(queue, tmp_path))
    if reason is None:
        assert isinstance(error, (ComparisonFailed, ServiceError))
        reason = error.reason
    assert (failed.state, failed.reason, failed.message) == ("failed", reason, message)
    await settled(queue)
    assert files(queue.folder_of(failed)) == [ANSWERS, QUESTIONS]
    assert lines(queue.folder_of(failed)) == ["1", "2", "3"]
    runner.error = None
    assert (await ended(queue, await created(queue, tmp_path))).state == "finished"


async def test_a_failure_is_noted_when_the_disk_has_room_again(
    queue: Comparisons, tmp_path: Path, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.runtime.queue.FULL_SECONDS", 0.0)
    change, refusals = queue.store.change, iter([True, True, False])

    def full_for_a_while(id: str, changes: Any, *event: bool) -> Any:
        if changes.get("state") == "failed" and next(refusals):
            raise Overloaded("STORE_FULL", "the disk is full")
        return change(id, changes, *event)

    monkeypatch.setattr(queue.store, "change", full_for_a_while)
    runner.error = OSError(28, "No space left on device")
    failed = await ended(queue, await created(queue, tmp_path))
    assert (failed.state, failed.reason) == ("failed", "STORE_FULL")
    assert lines(queue.folder_of(failed)) == ["1", "2", "3"]


async def test_cancelling_on_a_full_disk_makes_room_but_keeps_the_answers(
    queue: Comparisons, tmp_path: Path, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await held(queue, tmp_path, runner)
    cancel = queue.store.cancel

    def full_while_documents_are_there(tenant: str, id: str) -> Any:
        if (queue.folder_of(running) / CHANGED).exists():
            raise Overloaded("STORE_FULL", "the disk is full")
        return cancel(tenant, id)

    monkeypatch.setattr(queue.store, "cancel", full_while_documents_are_there)
    assert (await queue.cancel("acme", running.id)).state == "cancelled"
    assert runner.running == 0
    assert lines(queue.folder_of(running)) == ["1"]


async def test_a_full_disk_refuses_an_upload_and_leaves_nothing_of_it(
    queue: Comparisons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise Overloaded("STORE_FULL", "the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(queue.store, "add", full)
        with pytest.raises(Overloaded):
            await sent(queue, tmp_path)
    assert files(tmp_path / "comparisons") == []
    assert (await ended(queue, await created(queue, tmp_path))).state == "finished"


async def test_what_cannot_be_read_is_tried_again(
    queue: Comparisons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.runtime.queue.FULL_SECONDS", 0.0)
    find, failures = queue.store.find, iter([True, True])

    def broken_twice(id: str) -> Any:
        if next(failures, False):
            raise sqlite3.OperationalError("disk I/O error")
        return find(id)

    monkeypatch.setattr(queue.store, "find", broken_twice)
    assert (await ended(queue, await created(queue, tmp_path))).state == "finished"
    assert next(failures, None) is None


async def test_watching_goes_on_after_a_sequence_number(queue: Comparisons, tmp_path: Path) -> None:
    comparison = await created(queue, tmp_path)
    whole = await watched(queue, comparison)
    for after in range(len(whole) + 1):
        assert await watched(queue, comparison, after) == whole[after:]
    with pytest.raises(InvalidInput) as error:
        await watched(queue, comparison, len(whole) + 1)
    assert error.value.reason == "SEQUENCE_OUT_OF_RANGE"


async def test_a_silent_comparison_has_heartbeats(tmp_path: Path, runner: FakeRunner) -> None:
    async with small_queue(tmp_path, runner, heartbeat_seconds=0.02) as queue:
        comparison = await held(queue, tmp_path, runner)
        after = queue.store.last(comparison.id)
        async with aclosing(queue.watch("acme", comparison.id, after)) as events:
            assert await anext(events) is None
            assert await anext(events) is None
            runner.open.set()
            while (event := await anext(events)) is None:
                pass
        assert event.sequence == after + 1


async def test_a_watcher_who_waits_sees_progress_at_once(
    queue: Comparisons, tmp_path: Path, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = await held(queue, tmp_path, runner)
    after = queue.store.last(comparison.id)
    events_of, read = queue.store.events, threading.Event()

    def noticed(id: str, after: int, most: int) -> list[Noted]:
        found = events_of(id, after, most)
        read.set()
        return found

    monkeypatch.setattr(queue.store, "events", noticed)
    async with aclosing(queue.watch("acme", comparison.id, after)) as events:
        waits = asyncio.ensure_future(anext(events))
        await asyncio.to_thread(read.wait)  # from here on only news end the waiting
        runner.step.set()
        async with asyncio.timeout(5):  # less than until a heartbeat
            event = await waits
    assert event and (event.sequence, event.value) == (after + 1, progress(2))


async def test_a_watcher_who_leaves_does_not_stop_the_comparison(
    queue: Comparisons, tmp_path: Path, runner: FakeRunner
) -> None:
    comparison = await held(queue, tmp_path, runner)
    async with aclosing(queue.watch("acme", comparison.id, 0)) as events:
        await anext(events)
    runner.open.set()
    assert (await ended(queue, comparison)).state == "finished"


async def test_watchers_are_told_that_the_service_stops(
    queue: Comparisons, tmp_path: Path, runner: FakeRunner
) -> None:
    comparison = await held(queue, tmp_path, runner)
    waits = asyncio.create_task(watched(queue, comparison, queue.store.last(comparison.id)))
    while comparison.id not in queue._news:
        await asyncio.sleep(0)
    queue.stop()
    for watching in (waits, watched(queue, comparison)):
        with pytest.raises(Stopping) as error:
            async with asyncio.timeout(5):  # less than until a heartbeat
                await watching
        assert error.value.reason == "STOPPING"


async def test_watching_what_has_ended_keeps_nothing(queue: Comparisons, tmp_path: Path) -> None:
    comparison = await ended(queue, await created(queue, tmp_path))
    await watched(queue, comparison)
    assert not queue._news


async def test_what_belongs_to_another_tenant_looks_like_what_does_not_exist(
    queue: Comparisons, tmp_path: Path, runner: FakeRunner
) -> None:
    comparison = await held(queue, tmp_path, runner)
    for tenant, id in (("other", comparison.id), ("acme", "nothing")):
        for call in (
            asyncio.to_thread(queue.store.get, tenant, id),
            queue.cancel(tenant, id),
            anext(queue.watch(tenant, id, 0)),
        ):
            with pytest.raises(NotFound) as error:
                await call
            assert error.value.reason == "COMPARISON_NOT_FOUND"
            assert str(error.value) == f"there is no comparison {id!r}"
    assert queue.store.page("other", 2**60, 10) == []
    runner.open.set()
    assert (await ended(queue, comparison)).state == "finished"


async def test_pages_list_the_newest_first(
    queue: Comparisons, tmp_path: Path, runner: FakeRunner
) -> None:
    await held(queue, tmp_path, runner)
    ids = [(await created(queue, tmp_path)).id for _ in range(3)]
    first = queue.store.page("acme", 2**60, 2)
    assert [comparison.id for _, comparison, _ in first] == [ids[2], ids[1]]
    rest = queue.store.page("acme", first[-1][0], 10)
    assert [comparison.id for _, comparison, _ in rest] == [ids[0], *runner.order]


async def test_the_same_upload_with_a_key_is_one_comparison(
    queue: Comparisons, tmp_path: Path, runner: FakeRunner
) -> None:
    runner.open.clear()
    first, _ = await sent(queue, tmp_path, key="k")
    await runner.began.wait()
    second, _ = await sent(queue, tmp_path, key="k")
    assert second.id == first.id
    assert files(tmp_path / "comparisons") == [first.id]
    assert queue.store.known("acme", "k")
    same = queue.store.same("acme", "k", "x")
    assert same and same.id == first.id
    assert queue.store.same("acme", "", "x") is None
    with pytest.raises(AlreadyExists) as error:
        await sent(queue, tmp_path, key="k", content="y")
    assert error.value.reason == "IDEMPOTENCY_KEY_REUSED"
    assert files(tmp_path / "comparisons") == [first.id]
    theirs, _ = await sent(queue, tmp_path, wanted("other"), key="k")
    assert theirs.id != first.id
    assert not queue.store.known("third", "k")


async def test_a_full_queue_refuses(tmp_path: Path, runner: FakeRunner) -> None:
    async with small_queue(tmp_path, runner, max_queued=1) as queue:
        await held(queue, tmp_path, runner)
        await queue.room("acme")
        waiting, _ = await sent(queue, tmp_path, key="k")
        for refused in (queue.room("acme"), sent(queue, tmp_path)):
            with pytest.raises(Overloaded) as error:
                await refused
            assert error.value.reason == "QUEUE_FULL"
            assert str(error.value) == "1 comparisons wait already; try again later"
        assert len(files(tmp_path / "comparisons")) == 2
        assert (await sent(queue, tmp_path, key="k"))[0].id == waiting.id
        await queue.cancel("acme", waiting.id)
        assert (await created(queue, tmp_path)).state == "queued"


async def test_a_tenant_that_fills_its_queue_keeps_no_other_waiting(
    tmp_path: Path, runner: FakeRunner
) -> None:
    async with small_queue(tmp_path, runner, max_queued=3) as queue:
        first = await held(queue, tmp_path, runner)
        mine = [await created(queue, tmp_path) for _ in range(3)]
        with pytest.raises(Overloaded):
            await queue.room("acme")
        await queue.room("other")
        theirs = [(await sent(queue, tmp_path, wanted("other")))[0] for _ in range(2)]
        assert [queue.store.get("acme", one.id)[1] for one in mine] == [2, 4, 5]
        assert [queue.store.get("other", one.id)[1] for one in theirs] == [2, 4]
        runner.open.set()
        for one in (*mine, *theirs):
            await ended(queue, one)
        due = [first, theirs[0], mine[0], theirs[1], *mine[1:]]
        assert runner.order == [one.id for one in due]


async def test_what_a_crash_left_is_cleared_at_the_start(
    tmp_path: Path, runner: FakeRunner
) -> None:
    async with small_queue(tmp_path, runner) as queue:
        done = await ended(queue, await created(queue, tmp_path))
        await settled(queue)
    (queue.folder_of(done) / CHANGED).mkdir()
    (tmp_path / "comparisons" / "nobody" / CHANGED).mkdir(parents=True)
    (tmp_path / "comparisons" / "nobody" / QUESTIONS).write_text("x")
    async with small_queue(tmp_path, runner) as queue:
        assert files(tmp_path / "comparisons") == [done.id]
        assert files(queue.folder_of(done)) == [ANSWERS, OUTCOME, QUESTIONS, "report.html"]


async def test_a_comparison_without_its_folder_fails(tmp_path: Path, runner: FakeRunner) -> None:
    async with small_queue(tmp_path, runner) as queue:
        await held(queue, tmp_path, runner)
        lost = await created(queue, tmp_path)
        for path in queue.folder_of(lost).rglob("*"):
            if path.is_file():
                path.unlink()
        (queue.folder_of(lost) / CHANGED).rmdir()
        queue.folder_of(lost).rmdir()
        runner.open.set()
        failed = await ended(queue, lost)
        assert (failed.state, failed.reason) == ("failed", "INTERNAL")
