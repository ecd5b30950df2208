"""A queue of work: what is done now, how it ends, and who watches it."""

import asyncio
import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self

from services.runtime import metrics
from services.runtime.call import Call, current
from services.runtime.disk import FULL, space, sync
from services.runtime.errors import STOPPING, InvalidInput, Overloaded, ServiceError, Stopping
from services.runtime.threads import in_thread
from services.runtime.work import Ended, Event, P, W, WorkStore

HEARTBEAT_SECONDS = 15.0
HOUSEKEEPING_SECONDS = 3600.0
CANCEL_SECONDS = 1.5  # that `cancel` waits for what it stopped; the rest goes on behind it
FULL_SECONDS = 5.0  # between two attempts to write to a disk that is full
EVENTS_AT_ONCE = 100

log = logging.getLogger(__name__)


class Failed(Exception):
    """The work comes to nothing. `changes` are fields of it to set besides reason and message."""

    def __init__(self, reason: str, message: str, **changes: Any) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.changes: Mapping[str, Any] = changes


class Queue(ABC, Generic[W, P]):
    """Does at most `max_running` works at once while it is open; at most `max_queued` of a tenant
    wait. Tenants take turns, each with its oldest.

    Work that had not ended when another one of these was closed or killed goes on. Each has a
    folder in `folder`, named by its id. A kind of work says what is to `do`, and what remains of
    its folder when it has ended (`clear`) or where the disk is full (`make_room`).
    """

    def __init__(
        self,
        folder: Path,
        store: WorkStore[W, P],
        *,
        max_running: int = 1,
        max_queued: int = 100,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
    ) -> None:
        self.store = store
        self._folder = folder
        self._max_running = max_running
        self._max_queued = max_queued
        self._heartbeat_seconds = heartbeat_seconds
        self._running: dict[str, asyncio.Task[None]] = {}
        self._turns: dict[str, int] = {}  # when each tenant had its last: the newest has the most
        self._cancelling: set[str] = set()  # not to be started meanwhile
        self._others: set[asyncio.Task[Any]] = set()
        self._queue_moved = asyncio.Event()
        self._news: dict[str, asyncio.Event] = {}
        self._stopping = False

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._clear_left_over)
        for state in self.store.ended:  # a rate needs a zero to begin with
            metrics.WORK_ENDED.labels(self.store.noun, state)
        self._keep_doing(self._start_next, self._queue_moved)
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

    @abstractmethod
    async def do(self, work: W) -> None:
        """Do the work from the state on that it is in, up to one that it is not to leave.

        Raises Failed and ServiceError if nothing comes of it, Ended if somebody ends it meanwhile.
        """

    @abstractmethod
    def clear(self, work: W) -> None:
        """Remove what work that has ended does not need any more. Blocks; may be called again."""

    @abstractmethod
    def make_room(self, id: str) -> None:
        """Remove what can be spared of work that is to end but for a full disk. Blocks."""

    def stop(self) -> None:
        """End those who watch with Stopping: the service that comes next serves them."""
        self._stopping = True
        for id in list(self._news):
            self._changed(id)

    async def room(self, tenant: str) -> None:
        """Raise Overloaded (QUEUE_FULL) if as many of the tenant's wait as may."""
        if await in_thread(self.store.queued, tenant) >= self._max_queued:
            raise self.store.full(self._max_queued)

    async def add(self, work: W, upload: Path, key: str, upload_hash: str) -> tuple[W, int]:
        """Queue work whose folder is `upload`, which is moved away. Return it, or the one that the
        same upload made before, and how many go before it.

        Raises AlreadyExists (IDEMPOTENCY_KEY_REUSED), Overloaded (QUEUE_FULL, STORE_FULL).
        """
        try:
            added = await in_thread(self._add, work, upload, key, upload_hash)
        finally:
            self._queue_moved.set()  # a caller who leaves now has queued it
        return await in_thread(self.store.get, added.tenant, added.id)

    async def cancel(self, tenant: str, id: str) -> W:
        """End work and free what it holds. Raises NotFound (..._NOT_FOUND), NotReady
        (..._ENDED)."""
        # A task of its own: a caller who leaves must not leave it half done.
        return await asyncio.shield(self._spawn(self._cancel(tenant, id)))

    async def watch(
        self, tenant: str, id: str, after: int
    ) -> AsyncGenerator[Event[W, P] | None, None]:
        """Yield the events of a work behind the one numbered `after`, then those to come until it
        has ended; None after every 15 s without any.

        Raises NotFound (..._NOT_FOUND), InvalidInput (SEQUENCE_OUT_OF_RANGE), Stopping.
        """
        await in_thread(self.store.get, tenant, id)
        if after > await in_thread(self.store.last, id):
            message = f"the {self.store.noun} has no event {after} yet"
            raise InvalidInput("SEQUENCE_OUT_OF_RANGE", message)
        while True:
            if self._stopping:
                raise Stopping(STOPPING, "the service stops; watch on when it is back")
            # Before the database is read: what happens in between is then not missed.
            news = self._news.setdefault(id, asyncio.Event())
            work, _ = await in_thread(self.store.get, tenant, id)
            if work.state in self.store.ended:
                self._changed(id)  # nothing else would remove `news`
            events = await in_thread(self.store.events, id, after, EVENTS_AT_ONCE)
            for event in events:
                yield event
                after = event.sequence
            if events:
                continue
            if work.state in self.store.ended:
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

    def _spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(coroutine)
        self._others.add(task)
        task.add_done_callback(self._others.discard)
        return task

    def _keep_doing(self, chore: Callable[[], Awaitable[None]], wake: asyncio.Event) -> None:
        self._spawn(_keep_doing(chore, wake))

    def _add(self, work: W, upload: Path, key: str, upload_hash: str) -> W:
        folder = self._folder / work.id
        # Moved first: a folder without work is cleared at the next start, work without one fails.
        with space():
            sync(upload)
            upload.rename(folder)
        try:
            with space():
                sync(self._folder)
            added = self.store.add(work, key, upload_hash, self._max_queued)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if added.id != work.id:
            shutil.rmtree(folder, ignore_errors=True)
        return added

    async def _start_next(self) -> None:
        unended = await in_thread(self.store.unended)
        ready = [w for w in unended if w.id not in self._running and w.id not in self._cancelling]
        while ready and len(self._running) < self._max_running:
            work = min(ready, key=self._turn)  # of equal ones the first, which is the oldest
            ready.remove(work)
            task = asyncio.create_task(self._run(work.id))
            self._running[work.id] = task
            task.add_done_callback(partial(self._left, work.id))
            self._turns[work.tenant] = max(self._turns.values(), default=0) + 1
        waiting = [work for work in unended if work.id not in self._running]
        metrics.WORK.labels(self.store.noun, "running").set(len(self._running))
        metrics.WORK.labels(self.store.noun, "queued").set(len(waiting))

    def _turn(self, work: W) -> tuple[bool, int]:
        """Return what is least for the work that goes next: what was begun once goes first."""
        return work.state == "queued", self._turns.get(work.tenant, 0)

    def _left(self, id: str, task: asyncio.Task[None]) -> None:
        del self._running[id]
        if not task.cancelled() and (error := task.exception()):
            log.error("%s %s was not cleared", self.store.noun, id, exc_info=error)
            # What failed may fail again at once.
            asyncio.get_running_loop().call_later(FULL_SECONDS, self._queue_moved.set)
        else:
            self._queue_moved.set()

    async def _run(self, id: str) -> None:
        work = await in_thread(self.store.find, id)  # it may have ended since it was looked for
        if work is None or work.state in self.store.ended:
            return
        current.set(Call(request_id=work.id, tenant=work.tenant))
        try:
            await self.do(work)
        except Ended:
            pass
        except Failed as error:
            await self._fail(work, error.reason, error.message, error.changes)
        except ServiceError as error:
            await self._fail(work, error.reason, str(error))
        except Exception as error:
            if isinstance(error, OSError) and error.errno in FULL:
                await self._fail(work, "STORE_FULL", "the disk is full")
            else:
                log.exception("%s %s failed", self.store.noun, work.id)
                await self._fail(work, "INTERNAL", "the service failed; its log says why")
        self._changed(work.id)
        ended = await in_thread(self.store.find, work.id)
        if ended and ended.state in self.store.ended and ended.state != "cancelled":
            metrics.WORK_ENDED.labels(self.store.noun, ended.state).inc()
        await in_thread(self._clear, work.id)

    async def _fail(
        self, work: W, reason: str, message: str, changes: Mapping[str, Any] | None = None
    ) -> None:
        failed = {"state": "failed", "reason": reason, "message": message, **(changes or {})}
        while True:
            try:
                await in_thread(self.store.change, work.id, failed)
                return
            except Ended:
                return
            except Overloaded:  # not even this fits on the disk
                await in_thread(self.make_room, work.id)
            await asyncio.sleep(FULL_SECONDS)

    async def _cancel(self, tenant: str, id: str) -> W:
        try:
            work, changed = await in_thread(self.store.cancel, tenant, id)
        except Overloaded:  # not even this fits on the disk
            work, changed = await self._cancel_without_room(tenant, id)
        if not changed:
            return work
        metrics.WORK_ENDED.labels(self.store.noun, "cancelled").inc()
        self._changed(id)
        stopped = self._spawn(self._stop_and_clear(id))
        await asyncio.wait([stopped], timeout=CANCEL_SECONDS)
        return work

    async def _cancel_without_room(self, tenant: str, id: str) -> tuple[W, bool]:
        await in_thread(self.store.get, tenant, id)  # it is this tenant's
        self._cancelling.add(id)
        try:
            await self._stop(id)
            await in_thread(self.make_room, id)
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
        """Remove the folder of an id that is not known, and what ended work leaves."""
        work = self.store.find(id)
        if work is None:
            shutil.rmtree(self._folder / id, ignore_errors=True)
        elif work.state in self.store.ended:
            self.clear(work)

    def _clear_left_over(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for folder in self._folder.iterdir():
            self._clear(folder.name)


async def _keep_doing(chore: Callable[[], Awaitable[None]], wake: asyncio.Event) -> None:
    """Do the chore now, when `wake` is set, and every hour. A failure is logged."""
    while True:
        wake.clear()
        try:
            await chore()
        except Exception:
            log.exception("%s failed", chore.__name__)
        with suppress(TimeoutError):
            async with asyncio.timeout(HOUSEKEEPING_SECONDS):
                await wake.wait()
