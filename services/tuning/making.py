"""How a job becomes an adapter: it is prepared, trained and measured.

Each step leaves what the next one needs in the job's folder or in the database before the state
changes, so that a job goes on after a restart with the step that it was in.
"""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from pydantic import TypeAdapter
from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub

from services.prompts.rendering import Renderer
from services.runtime.errors import NotReady, Overloaded, TooLate, Unavailable
from services.runtime.threads import in_thread
from services.tuning.adapters import files as adapter_files
from services.tuning.adapters.base_model import BaseModel
from services.tuning.adapters.registry import Registry
from services.tuning.adapters.verifying import LEAST_PROBES, Measured
from services.tuning.data import examples
from services.tuning.data.preparing import prepare
from services.tuning.job import Adapter, Job, Manifest, Options, Probe, Progress, TokenScore
from services.tuning.store import JobStore
from services.tuning.training.trainer import Trained, TrainingFailed

MOST_RESTARTS = 2
RESTARTED = ("TRAINER_DIED", "OUT_OF_MEMORY")  # what may go well the next time
PROGRESS_SECONDS = 1.0  # between two progress events
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 15.0
UNMEASURABLE = f"there are fewer than {LEAST_PROBES} answers to measure the adapter by"
PROBES = TypeAdapter(list[Probe])


class Trainer(Protocol):
    """What trains: a child by `trainer.py`, a job of the cluster by `launcher.py`."""

    def train(self, folder: Path, options: Options) -> AsyncGenerator[Progress | Trained, None]:
        """Train on FOLDER/training.jsonl, from the last checkpoint in FOLDER if there is one, and
        leave the adapter in FOLDER/adapter. Closing the generator stops it at once. Raises
        TrainingFailed."""


class Verifier(Protocol):
    """What measures adapters. `verifying.py` has the real one."""

    async def measure(self, adapter: Adapter, probes: list[Probe]) -> Measured: ...


class Maker:
    """Makes the adapters of jobs. `folder` has a folder for each job, named by its id; `changed` is
    told the id of a job that has a new event. `retry_seconds` is how long retrieval may be away,
    `training_seconds` how long a training may take."""

    def __init__(
        self,
        folder: Path,
        store: JobStore,
        registry: Registry,
        base: BaseModel,
        renderer: Renderer,
        trainer: Trainer,
        verifier: Verifier,
        retrieval: RetrievalServiceStub,
        changed: Callable[[str], None],
        retry_seconds: float,
        training_seconds: float,
    ) -> None:
        self._folder = folder
        self._store = store
        self._registry = registry
        self._base = base
        self._renderer = renderer
        self._trainer = trainer
        self._verifier = verifier
        self._retrieval = retrieval
        self._changed = changed
        self._retry_seconds = retry_seconds
        self._training_seconds = training_seconds

    async def make(self, job: Job) -> None:
        """Take a job through all states that it has not passed yet.

        Raises Ended if somebody ends it meanwhile; TrainingFailed and ServiceError say why there
        will be no adapter, and leave the job in the state that it was in.
        """
        if job.base_model_hash != self._base.hash:
            raise NotReady("BASE_MODEL_CHANGED", "the base model is another one than before")
        if job.state == "queued":
            job = await self._change(job, state="preparing")
        if job.state == "preparing":
            await self._prepare(job)
            job = await self._change(job, state="training")
        if job.state == "training":
            made = await in_thread(self._store.adapters_of, job)
            if not made:  # else the service ended between the registration and the next state
                job, trained = await self._train(job)
                made = [(await in_thread(self._register, job, trained)).id]
            job = await self._change(job, state="verifying", adapter=made[0])
        adapter = await in_thread(self._registry.get, job.tenant, job.adapter)
        message = UNMEASURABLE if adapter.reason == "TOO_FEW_PROBES" else ""
        if adapter.state == "verifying":
            adapter, message = await self.measure(adapter)
        await self._change(job, state=adapter.state, reason=adapter.reason, message=message)

    async def measure(self, adapter: Adapter) -> tuple[Adapter, str]:
        """Measure an adapter that is VERIFYING. Return it as it is then, and the reason for that in
        words. Raises NotFound if it is deleted meanwhile."""
        probes = await in_thread(self._registry.probes, adapter)
        measured = await self._verifier.measure(adapter, probes)
        return await in_thread(self._registry.measured, adapter, measured), measured.message

    async def _prepare(self, job: Job) -> None:
        folder = self._folder / job.id
        taken, held_out = await in_thread(self._examples, job)
        until: float | None = None  # from the first failure on, if nothing goes on since
        pause = FIRST_PAUSE
        furthest = 0

        def moved(done: int, of: int) -> None:
            nonlocal furthest, pause, until
            if done > furthest:
                furthest, pause, until = done, FIRST_PAUSE, None

        while True:
            try:
                probes = await prepare(
                    folder,
                    taken,
                    held_out,
                    job.options,
                    job.corpus,
                    job.prompt_version,
                    self._renderer,
                    self._base.context_length,
                    self._retrieval,
                    moved,
                )
                break
            except (Unavailable, TooLate, Overloaded) as error:
                if error.reason == "STORE_FULL":
                    raise
                until = until or time.monotonic() + self._retry_seconds
                if time.monotonic() + pause > until:
                    raise Unavailable("RETRIEVAL_UNAVAILABLE", str(error)) from error
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        await in_thread(_write_probes, folder, probes)

    async def _train(self, job: Job) -> tuple[Job, Trained]:
        while True:
            try:
                async with asyncio.timeout(self._training_seconds) as limit:
                    return job, await self._train_once(job)
            except TimeoutError as error:
                if not limit.expired():
                    raise
                hours = f"{self._training_seconds / 3600:,.3g}"
                raise TrainingFailed(
                    "TRAINING_TOO_LONG", f"the training took over {hours} hours, the most allowed"
                ) from error
            except TrainingFailed as error:
                if error.reason not in RESTARTED or job.restarts == MOST_RESTARTS:
                    raise
                job = await self._change(job, restarts=job.restarts + 1)

    async def _train_once(self, job: Job) -> Trained:
        noted = 0.0
        unnoted: Progress | None = None
        news = self._trainer.train(self._folder / job.id, job.options)
        async with aclosing(news):
            async for item in news:
                if isinstance(item, Trained):
                    if unnoted:
                        await self._note(job, unnoted)
                    return item
                unnoted = item
                if time.monotonic() - noted >= PROGRESS_SECONDS:
                    noted, unnoted = time.monotonic(), None
                    await self._note(job, item)
        raise TrainingFailed("TRAINER_DIED", "the trainer ended without a result", "")

    async def _note(self, job: Job, progress: Progress) -> None:
        await in_thread(self._store.progress, job.id, progress)
        self._changed(job.id)

    def _register(self, job: Job, trained: Trained) -> Adapter:
        folder = self._folder / job.id
        adapter_files.check(folder / "adapter", self._base, job.options.rank)
        taken, held_out = self._examples(job)
        manifest = Manifest(
            name=job.name,
            base_model=job.base_model,
            base_model_hash=job.base_model_hash,
            prompt_version=job.prompt_version,
            corpus=job.corpus,
            examples_hash=job.data.hash,
            options=job.options,
            files=(),
        )
        lines: Iterable[bytes] = examples.trained_lines(_raw(folder), taken, held_out)
        return self._registry.add(
            job.tenant,
            manifest,
            folder / "adapter",
            lines,
            self._scored(folder, trained),
            job=job.id,
            held_out_loss=trained.held_out_loss,
            training_seconds=trained.seconds,
        )

    def _scored(self, folder: Path, trained: Trained) -> list[Probe]:
        """Return the probes with what the trainer gave each token of theirs."""
        scored = []
        probes = PROBES.validate_json((folder / "probes.json").read_bytes())
        for probe, scores in zip(probes, trained.probes, strict=True):
            ids = self._renderer.continuation(probe.continuation, self._base.context_length)
            tokens = (TokenScore(*token) for token in zip(ids, scores, strict=True))
            scored.append(replace(probe, tokens=tuple(tokens)))
        return scored

    def _examples(self, job: Job) -> tuple[list[examples.Example], frozenset[int]]:
        raw = _raw(self._folder / job.id)
        length = self._base.context_length
        taken = examples.read(raw, self._renderer, length, job.prompt_version).examples
        options = job.options
        return taken, examples.held_out(taken, options.held_out_share, options.seed)

    async def _change(self, job: Job, **changes: Any) -> Job:
        job = await in_thread(self._store.change, job.id, changes)
        self._changed(job.id)
        return job


def _raw(folder: Path) -> Path:
    return folder / "examples.jsonl"


def _write_probes(folder: Path, probes: list[Probe]) -> None:
    with (folder / "probes.json").open("wb") as file:
        file.write(PROBES.dump_json(probes))
        file.flush()
        os.fsync(file.fileno())  # on the disk before the database says that the job is prepared
