"""The queue of jobs, and what else is done about adapters while it is open."""

import asyncio
import logging
import math
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Self

from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub

from services.prompts.rendering import Renderer
from services.runtime import disk
from services.runtime.database import Database
from services.runtime.errors import NotFound, Overloaded
from services.runtime.queue import HEARTBEAT_SECONDS, Failed, Queue
from services.runtime.threads import in_thread
from services.tuning.adapters.base_model import BaseModel
from services.tuning.adapters.registry import Registry
from services.tuning.job import Adapter, Job, Progress
from services.tuning.making import Maker, Trainer, Verifier
from services.tuning.store import JobStore
from services.tuning.training.trainer import TrainingFailed

MOST_LOG = 16 * 1024  # bytes
GIBIBYTE = 1024**3
AWAY = "GENERATION_UNAVAILABLE"  # why an adapter is UNMEASURED until generation is back

log = logging.getLogger(__name__)


class Jobs(Queue[Job, Progress]):
    """Makes at most `max_jobs` jobs at once while it is open; at most `max_queued` of a tenant
    wait, and tenants take turns.

    `retry_seconds` is how long retrieval may be away before a job fails, `training_seconds` how
    long its training may take, `most_bytes` what jobs and adapters of a tenant may take of the
    disk.
    """

    store: JobStore

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
        training_seconds: float = 72 * 3600.0,
        most_bytes: float = math.inf,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
    ) -> None:
        super().__init__(
            folder / "jobs",
            JobStore(database),
            max_running=max_jobs,
            max_queued=max_queued,
            heartbeat_seconds=heartbeat_seconds,
        )
        self._registry = registry
        self._most_bytes = most_bytes
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
            training_seconds,
        )
        self._imported = asyncio.Event()

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        self._keep_doing(self._measure_imported, self._imported)
        self._keep_doing(self._sweep, asyncio.Event())
        return self

    async def space(self, tenant: str) -> None:
        """Raise Overloaded (STORE_FULL) if a tenant has as much on the disk as it may."""
        if await in_thread(self._used, tenant) >= self._most_bytes:
            raise Overloaded(
                "STORE_FULL",
                f"your jobs and adapters take the {self._most_bytes / GIBIBYTE:,.3g} GiB that they "
                "may; what is deleted counts for a day",
            )

    def _used(self, tenant: str) -> int:
        unended = [job for job in self.store.unended() if job.tenant == tenant]
        of_jobs = sum(disk.size(self._folder / job.id) for job in unended)
        return of_jobs + disk.size(self._registry.folder(tenant))

    def measure(self) -> None:
        """Measure the imported adapters that are VERIFYING, in the background; then those that are
        UNMEASURED because generation was away."""
        self._imported.set()

    async def do(self, work: Job) -> None:
        try:
            await self._maker.make(work)
        except TrainingFailed as error:
            tail = error.log_tail.encode()[-MOST_LOG:].decode(errors="ignore")
            raise Failed(error.reason, error.message, log_tail=tail) from error

    def clear(self, work: Job) -> None:
        """Remove the job's folder, and an adapter that is not kept."""
        if work.state in ("failed", "cancelled"):
            for adapter in self.store.adapters_of(work):
                with suppress(NotFound):
                    self._registry.delete(work.tenant, adapter)
        shutil.rmtree(self._folder / work.id, ignore_errors=True)

    def make_room(self, id: str) -> None:
        shutil.rmtree(self._folder / id, ignore_errors=True)

    async def _measure_imported(self) -> None:
        tried: set[tuple[str, str]] = set()
        turns: Counter[str] = Counter()
        while True:  # tenants take turns, the oldest adapter first
            imported = [
                adapter
                for adapter in await in_thread(self._registry.verifying)
                if not adapter.job and (adapter.tenant, adapter.id) not in tried
            ]  # one of a job is measured by that
            if not imported:
                break
            adapter = min(reversed(imported), key=lambda one: turns[one.tenant])
            tried.add((adapter.tenant, adapter.id))
            turns[adapter.tenant] += 1
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
