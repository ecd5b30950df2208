"""Trains in a pod of its own: by a Job of Kubernetes, or by a TrainJob of Kubeflow Trainer.

The manifest says what that is like; its container runs `pod` on the job's folder, which lies on a
volume that service and pod share. What a pod would tell is told by files there, so the service may
be away, or not reach the API server, while training goes on.
"""

import asyncio
import copy
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from services.tuning.job import Options, Progress
from services.tuning.training.cluster import Away, Cluster, Object, Refused, api_server
from services.tuning.training.pod import NEWS
from services.tuning.training.trainer import (
    LINE_BYTES,
    LOG_TAIL_BYTES,
    RESULT,
    Trained,
    TrainingFailed,
    read_result,
    write_plan,
)

POLL_SECONDS = 2.0
LONGEST_PAUSE = 30.0  # between two calls of an API server that is away
START_SECONDS = 120.0  # for what keeps a container from starting to mend itself
# What a volume over a network may take to show what the pod wrote; NFS: acdirmax.
LAG_SECONDS = 60.0
STUCK = {
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "CreateContainerConfigError",
    "CreateContainerError",
}
NOT_STARTED = "the training job cannot be started; the log of the service says why"
G = TypeVar("G")
T = TypeVar("T")

log = logging.getLogger(__name__)


class JobTrainer:
    """Trains adapters for the checkpoint that pods have in the folder `model`.

    manifest: a Job or TrainJob, as parsed YAML. dtype, threads: as in the settings, of the pod.
    """

    def __init__(
        self,
        manifest: Object,
        cluster: Cluster,
        model: Path | str,
        dtype: str = "auto",
        threads: int = 0,
        *,
        checkpoint_seconds: float = 60.0,
        poll_seconds: float = POLL_SECONDS,
        start_seconds: float = START_SECONDS,
        lag_seconds: float = LAG_SECONDS,
    ) -> None:
        self._manifest = manifest
        self._cluster = cluster
        self._plan = {
            "model": str(model),
            "dtype": dtype,
            "threads": threads,
            "checkpoint_seconds": checkpoint_seconds,
        }
        self._poll_seconds = poll_seconds
        self._start_seconds = start_seconds
        self._lag_seconds = lag_seconds
        self._leaving = False

    @property
    def gpu(self) -> bool:
        """Whether the manifest asks for a GPU."""
        return "/gpu" in json.dumps(self._manifest)

    def leave(self) -> None:
        """The service stops: from now on a training that is closed goes on without it. The service
        that comes next follows it."""
        self._leaving = True

    async def train(
        self, folder: Path, options: Options
    ) -> AsyncGenerator[Progress | Trained, None]:
        """Train as ChildTrainer does, or follow what trains on the folder already.

        Closing the generator deletes the job, and waits until its pods can write no more.
        """
        name = f"training-{folder.name}"
        stay = False
        try:
            if not (folder / RESULT).exists():
                await self._launch(name, folder, options)
                async with aclosing(self._follow(name, folder)) as news:
                    async for progress in news:
                        yield progress
        except (GeneratorExit, asyncio.CancelledError):
            stay = self._leaving
            raise
        finally:
            if not stay:
                await self._end(name)
        yield await asyncio.to_thread(read_result, folder)

    async def _launch(self, name: str, folder: Path, options: Options) -> None:
        while True:
            try:
                found = await self._answer(self._cluster.get, name)
                if found and "deletionTimestamp" not in found["metadata"]:
                    return  # the service that was before this one created it
                if found is None:
                    (folder / NEWS).unlink(missing_ok=True)
                    await asyncio.to_thread(write_plan, folder, self._plan, options)
                    job = filled(self._manifest, name, folder.name)
                    await self._answer(self._cluster.create, job)
                    return
            except Refused as error:
                log.error("%s", error)
                raise TrainingFailed("LAUNCH_FAILED", NOT_STARTED) from error
            await asyncio.sleep(self._poll_seconds)

    async def _follow(self, name: str, folder: Path) -> AsyncGenerator[Progress, None]:
        state, why, since = "", "", time.monotonic()
        said: dict[str, Any] = {}
        while True:
            now = await self._look(name)
            if now != (state, why):
                log.warning("%s: %s", name, ": ".join(now) if any(now) else "goes on")
            if now[0] != state:
                since = time.monotonic()
            state, why = now
            news = await asyncio.to_thread(_news, folder)
            if await asyncio.to_thread((folder / RESULT).exists):
                return
            if news != said:
                said = news
                yield _progress(news)
            seconds = time.monotonic() - since
            if state == "ended" and (why == "OOMKilled" or seconds > self._lag_seconds):
                raise await asyncio.to_thread(_died, folder, why)
            if state == "stuck" and seconds > self._start_seconds:
                raise TrainingFailed("LAUNCH_FAILED", NOT_STARTED)
            await asyncio.sleep(self._poll_seconds)

    async def _look(self, name: str) -> tuple[str, str]:
        try:
            return judged(await self._cluster.get(name), await self._cluster.pods(name))
        except (Away, Refused) as error:
            return "not seen", str(error)

    async def _end(self, name: str) -> None:
        try:
            await self._answer(self._cluster.delete, name)
            while not await self._answer(self._cluster.is_gone, name):
                await asyncio.sleep(self._poll_seconds)
        except Refused as error:
            log.error("%s", error)

    async def _answer(self, call: Callable[[G], Awaitable[T]], given: G) -> T:
        """Call the API server until it answers. Raises Refused."""
        pause = self._poll_seconds
        while True:
            try:
                return await call(given)
            except Away as error:
                log.warning("%s", error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


def open_launcher(manifest: Path, model: Path, dtype: str, threads: int) -> JobTrainer:
    """Return what trains by a manifest. Raises ValueError if that cannot be."""
    try:
        job = yaml.safe_load(manifest.read_text())
        filled(job, "name", "id")  # it has the fields
        cluster = Cluster(job["apiVersion"], job["kind"], api_server())
    except (AttributeError, KeyError, OSError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{manifest} cannot be launched: {error!r}") from error
    return JobTrainer(job, cluster, model.absolute(), dtype, threads)


def filled(manifest: Object, name: str, id: str) -> Object:
    """Return the job that trains on the folder named `id`: its container has that as JOB."""
    job = copy.deepcopy(manifest)
    metadata, spec = job.setdefault("metadata", {}), job["spec"]
    metadata["name"] = name
    metadata["labels"] = {**metadata.get("labels", {}), "app.kubernetes.io/instance": id}
    container = (
        spec["template"]["spec"]["containers"][0]
        if job["kind"] == "Job"
        else spec.setdefault("trainer", {})
    )
    container["env"] = [*container.get("env", ()), {"name": "JOB", "value": id}]
    return job


def judged(job: Object | None, pods: list[Object]) -> tuple[str, str]:
    """Return how a job is and why: "ended", "stuck" or "waits"; two empty strings while it runs."""
    statuses = [pod.get("status", {}) for pod in pods]
    containers = [
        container.get("state", {})
        for status in statuses
        for part in ("initContainerStatuses", "containerStatuses")
        for container in status.get(part, ())
    ]
    conditions = [] if job is None else job.get("status", {}).get("conditions", [])
    ends = {each["type"] for each in conditions if each["status"] == "True"}
    if job is None or ends & {"Complete", "Failed"}:
        reasons = [state.get("terminated", {}).get("reason") for state in containers]
        if "OOMKilled" in reasons:
            return "ended", "OOMKilled"
        reasons += [status.get("reason") for status in statuses]  # such as Evicted
        known = [reason for reason in reasons if reason not in (None, "Completed", "Error")]
        return "ended", known[0] if known else "deleted" if job is None else "without a result"
    for state in containers:
        if state.get("waiting", {}).get("reason") in STUCK:
            return "stuck", state["waiting"]["reason"]
    if not pods:
        return "waits", "it has no pod yet"
    for status in statuses:
        for condition in status.get("conditions", ()):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                return "waits", condition.get("message", "")
    return "", ""


def _news(folder: Path) -> dict[str, Any]:
    """Return what the pod says, {} before it has said anything."""
    try:
        with (folder / NEWS).open("rb") as file:
            news = json.loads(file.read(LINE_BYTES))
    except FileNotFoundError:
        return {}
    except ValueError:
        news = None
    return news if isinstance(news, dict) else {"news": news}


def _progress(news: dict[str, Any]) -> Progress:
    """Raises TrainingFailed as the pod says it, or if nobody understands what it says."""
    try:
        if "reason" in news:
            raise TrainingFailed(**news)
        return Progress(**news)
    except TypeError as error:
        message = "the trainer said what nobody understands"
        raise TrainingFailed("TRAINER_DIED", message) from error


def _died(folder: Path, why: str) -> TrainingFailed:
    tail = b""
    if (folder / "log").exists():
        tail = (folder / "log").read_bytes()[-LOG_TAIL_BYTES:]
    words = tail.decode(errors="ignore")
    if why == "OOMKilled":
        return TrainingFailed("OUT_OF_MEMORY", "the training pod had too little memory", words)
    return TrainingFailed("TRAINER_DIED", f"the training pod ended: {why}", words)
