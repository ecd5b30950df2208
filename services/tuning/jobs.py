"""The queue of jobs: which one is made now, how it ends, and who watches it."""

import asyncio
import logging
import shutil
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub

from services.prompts.rendering import Renderer
from services.runtime.call import Call, current
from services.runtime.database import Database
from services.runtime.disk import FULL, space, sync
from services.runtime.errors import (
    STOPPING,
    InvalidInput,
    NotFound,
    Overloaded,
    ServiceError,
    Stopping,
)
from services.runtime.threads import in_thread
from services.tuning.adapters.base_model import BaseModel
from services.tuning.adapters.registry import Registry
from services.tuning.job import ENDED, Adapter, Job
from services.tuning.making import Maker, Trainer, Verifier
from services.tuning.store import Ended, Event, JobStore, queue_full
from services.tuning.training.trainer import TrainingFailed

HEARTBEAT_SECONDS = 15.0
HOUSEKEEPING_SECONDS = 3600.0
CANCEL_SECONDS = 1.5  # that CancelJob waits for what it stopped; the rest goes on behind it
FULL_SECONDS = 5.0  # between two attempts to write to a disk that is full
EVENTS_AT_ONCE = 100
MOST_LOG = 16 * 1024  # bytes
AWAY = "GENERATION_UNAVAILABLE"  # why an adapter is UNMEASURED until generation is back

log = logging.getLogger(__name__)


class Jobs:
    """Makes at most `max_jobs` jobs at once, in order, while it is open; at most `max_queued` wait.

    Jobs that had not ended when another one of these was closed or killed go on. `retry_seconds` is
    how long retrieval may be away before a job fails.
    """

    def __init__(
        self,
        folder: Path,
        database: Database,
        registry: Registry,
        base: BaseModel,
        renderer: Renderer,
        trainer: Trainer,
        verifier: Verifier,
        retrieval: RetrievalServiceStub,
        *,
        max_jobs: int = 1,
        max_queued: int = 100,
        retry_seconds: float = 300.0,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
    ) -> None:
        self.store = JobStore(database)
        self._folder = folder / "jobs"
        self._registry = registry
        self._max_jobs = max_jobs
        self._max_queued = max_queued
        self._heartbeat_seconds = heartbeat_seconds
        self._maker = Maker(
            self._folder,
            self.store,
            registry,
            base,
            renderer,
            trainer,
            verifier,
            retrieval,
            self._changed,
            retry_seconds,
        )
        self._running: dict[str, asyncio.Task[None]] = {}
        self._cancelling: set[str] = set()  # not to be started meanwhile
        self._others: set[asyncio.Task[Any]] = set()
        self._queue_moved = asyncio.Event()
        self._imported = asyncio.Event()
        self._news: dict[str, asyncio.Event] = {}
        self._stopping = False

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._clear_left_over)
        for work, wake in (
            (self._start_next, self._queue_moved),
            (self._measure_imported, self._imported),
            (self._sweep, asyncio.Event()),
        ):
            self._spawn(_keep_doing(work, wake))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        tasks = {*self._others, *self._running.values()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def stop(self) -> None:
        """End those who watch with Stopping: the service that comes next serves them."""
        self._stopping = True
        for id in list(self._news):
            self._changed(id)

    async def room(self) -> None:
        """Raise Overloaded (QUEUE_FULL) if as many jobs wait as may."""
        if await in_thread(self.store.queued) >= self._max_queued:
            raise queue_full(self._max_queued)

    async def add(self, job: Job, upload: Path, key: str, upload_hash: str) -> tuple[Job, int]:
        """Queue a job whose folder is `upload`, which is moved away. Return it, or the one that the
        same upload made before, and how many jobs go before it.

        Raises AlreadyExists (IDEMPOTENCY_KEY_REUSED), Overloaded (QUEUE_FULL, STORE_FULL).
        """
        try:
            added = await in_thread(self._add, job, upload, key, upload_hash)
        finally:
            self._queue_moved.set()  # a caller who leaves now has queued it
        return await in_thread(self.store.get, added.tenant, added.id)

    async def cancel(self, tenant: str, id: str) -> Job:
        """End a job and free what it holds. Raises NotFound (JOB_NOT_FOUND), NotReady
        (JOB_ENDED)."""
        # A task of its own: a caller who leaves must not leave it half done.
        return await asyncio.shield(self._spawn(self._cancel(tenant, id)))

    def measure(self) -> None:
        """Measure the imported adapters that are VERIFYING, in the background; then those that are
        UNMEASURED because generation was away."""
        self._imported.set()

    async def watch(self, tenant: str, id: str, after: int) -> AsyncGenerator[Event | None, None]:
        """Yield the events of a job behind the one numbered `after`, then those to come until it
        has ended; None after every 15 s without any.

        Raises NotFound (JOB_NOT_FOUND), InvalidInput (SEQUENCE_OUT_OF_RANGE), Stopping.
        """
        await in_thread(self.store.get, tenant, id)
        if after > await in_thread(self.store.last, id):
            raise InvalidInput("SEQUENCE_OUT_OF_RANGE", f"the job has no event {after} yet")
        while True:
            if self._stopping:
                raise Stopping(STOPPING, "the service stops; watch on when it is back")
            # Before the database is read: what happens in between is then not missed.
            news = self._news.setdefault(id, asyncio.Event())
            job, _ = await in_thread(self.store.get, tenant, id)
            if job.state in ENDED:
                self._changed(id)  # nothing else would remove `news`
            events = await in_thread(self.store.events, id, after, EVENTS_AT_ONCE)
            for event in events:
                yield event
                after = event.sequence
            if events:
                continue
            if job.state in ENDED:
                self._changed(id)  # nobody need wait any more
                return
            try:
                async with asyncio.timeout(self._heartbeat_seconds):
                    await news.wait()
            except TimeoutError:
                yield None

    def _changed(self, id: str) -> None:
        if news := self._news.pop(id, None):
            news.set()

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._others.add(task)
        task.add_done_callback(self._others.discard)
        return task

    def _add(self, job: Job, upload: Path, key: str, upload_hash: str) -> Job:
        folder = self._folder / job.id
        # Moved first: a folder without a job is cleared at the next start, a job without one fails.
        with space():
            sync(upload)
            upload.rename(folder)
        try:
            with space():
                sync(self._folder)
            added = self.store.add(job, key, upload_hash, self._max_queued)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if added.id != job.id:
            shutil.rmtree(folder, ignore_errors=True)
        return added

    async def _start_next(self) -> None:
        for job in await in_thread(self.store.unended):
            if len(self._running) >= self._max_jobs:
                return
            if job.id not in self._running and job.id not in self._cancelling:
                task = asyncio.create_task(self._make(job.id))
                self._running[job.id] = task
                task.add_done_callback(partial(self._left, job.id))

    def _left(self, id: str, task: asyncio.Task[None]) -> None:
        del self._running[id]
        if not task.cancelled() and (error := task.exception()):
            log.error("job %s was not cleared", id, exc_info=error)
            # What failed may fail again at once.
            asyncio.get_running_loop().call_later(FULL_SECONDS, self._queue_moved.set)
        else:
            self._queue_moved.set()

    async def _make(self, id: str) -> None:
        job = await in_thread(self.store.find, id)  # it may have ended since it was looked for
        if job is None or job.state in ENDED:
            return
        current.set(Call(request_id=job.id, tenant=job.tenant))
        try:
            await self._maker.make(job)
        except Ended:
            pass
        except TrainingFailed as error:
            await self._fail(job, error.reason, error.message, error.log_tail)
        except ServiceError as error:
            await self._fail(job, error.reason, str(error))
        except Exception as error:
            if isinstance(error, OSError) and error.errno in FULL:
                await self._fail(job, "STORE_FULL", "the disk is full")
            else:
                log.exception("job %s failed", job.id)
                await self._fail(job, "INTERNAL", "the service failed; its log says why")
        self._changed(job.id)
        await in_thread(self._clear, job.id)

    async def _fail(self, job: Job, reason: str, message: str, log_tail: str = "") -> None:
        tail = log_tail.encode()[-MOST_LOG:].decode(errors="ignore")
        changes = {"state": "failed", "reason": reason, "message": message, "log_tail": tail}
        while True:
            try:
                await in_thread(self.store.change, job.id, {**changes, "adapter": ""})
                return
            except Ended:
                return
            except Overloaded:  # not even this fits on the disk: the job's own files make room
                await in_thread(shutil.rmtree, self._folder / job.id, True)
            await asyncio.sleep(FULL_SECONDS)

    async def _cancel(self, tenant: str, id: str) -> Job:
        try:
            job, changed = await in_thread(self.store.cancel, tenant, id)
        except Overloaded:  # not even this fits on the disk: the job's own files make room
            job, changed = await self._cancel_without_room(tenant, id)
        if not changed:
            return job
        self._changed(id)
        stopped = self._spawn(self._stop_and_clear(id))
        await asyncio.wait([stopped], timeout=CANCEL_SECONDS)
        return job

    async def _cancel_without_room(self, tenant: str, id: str) -> tuple[Job, bool]:
        await in_thread(self.store.get, tenant, id)  # it is this tenant's
        self._cancelling.add(id)
        try:
            await self._stop(id)
            await in_thread(shutil.rmtree, self._folder / id, True)
            return await in_thread(self.store.cancel, tenant, id)
        finally:
            self._cancelling.discard(id)
            self._queue_moved.set()

    async def _stop_and_clear(self, id: str) -> None:
        await self._stop(id)
        await in_thread(self._clear, id)

    async def _stop(self, id: str) -> None:
        task = self._running.get(id)
        if task:
            task.cancel()
            await asyncio.wait([task])

    def _clear(self, id: str) -> None:
        """Remove what a job that has ended leaves: its folder, and an adapter that is not kept."""
        job = self.store.find(id)
        if job and job.state not in ENDED:
            return
        if job and job.state in ("failed", "cancelled"):
            for adapter in self.store.adapters_of(job):
                with suppress(NotFound):
                    self._registry.delete(job.tenant, adapter)
        shutil.rmtree(self._folder / id, ignore_errors=True)

    def _clear_left_over(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for folder in self._folder.iterdir():
            self._clear(folder.name)

    async def _measure_imported(self) -> None:
        for adapter in await in_thread(self._registry.verifying):
            if not adapter.job:  # else it is measured by its job
                await self._measure(adapter)
        for adapter in await in_thread(self._registry.unmeasured, AWAY):
            if await self._measure(adapter) == AWAY:  # so it is for the others
                return

    async def _measure(self, adapter: Adapter) -> str:
        """Measure an adapter; return the reason that it has then."""
        try:
            measured, _ = await self._maker.measure(adapter)
            return measured.reason
        except NotFound:  # deleted meanwhile
            pass
        except Exception:  # the others are measured all the same
            log.exception("adapter %s was not measured", adapter.id)
        return ""

    async def _sweep(self) -> None:
        await in_thread(self._registry.sweep)


async def _keep_doing(work: Callable[[], Awaitable[None]], wake: asyncio.Event) -> None:
    """Do the work now, when `wake` is set, and every hour. A failure is logged."""
    while True:
        wake.clear()
        try:
            await work()
        except Exception:
            log.exception("%s failed", work.__name__)
        with suppress(TimeoutError):
            async with asyncio.timeout(HOUSEKEEPING_SECONDS):
                await wake.wait()
