"""Trains in a child process, which is killed at once when nobody waits for it any more."""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from services.runtime import disk
from services.runtime.processor import cores
from services.tuning.job import Options, Progress

LOG_TAIL_BYTES = 16 * 1024
LOG_BYTES = 1 << 20  # of FOLDER/log; beyond it only the tail stays
LINE_BYTES = 64 * 1024
LOG_SECONDS = 1.0  # for the last of the log, once the trainer has ended

_PASSED_ON = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "TMPDIR")
_SETTINGS = {
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
KILL_COUNTERS = (Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events"))
RESULT = "result.json"


class TrainingFailed(Exception):
    """There will be no adapter. `reason` is one of Job.reason, `log_tail` at most 16 KiB."""

    def __init__(self, reason: str, message: str, log_tail: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.log_tail = log_tail


@dataclass(frozen=True)
class Trained:
    """An adapter is in FOLDER/adapter.

    held_out_loss: nats per answer token, None without held-out examples. seconds: of all attempts
    that it took. probes: for each example marked as a probe, in order, the natural logarithm of the
    probability of each token of its answer.
    """

    held_out_loss: float | None
    seconds: float
    probes: list[list[float]]


class ChildTrainer:
    """Trains adapters for the checkpoint in the folder `model`.

    dtype: of the weights, as in the settings. threads: that compute, on a CPU; 0 means all cores.
    checkpoint_seconds: work that may be lost, at most. module: what the child runs.
    """

    def __init__(
        self,
        model: Path | str,
        dtype: str = "auto",
        threads: int = 0,
        *,
        checkpoint_seconds: float = 60.0,
        module: str = "services.tuning.training.child",
    ) -> None:
        self._model = Path(model).resolve()
        self._dtype = dtype
        self._threads = threads or cores()
        self._checkpoint_seconds = checkpoint_seconds
        self._module = module

    async def train(
        self, folder: Path, options: Options
    ) -> AsyncGenerator[Progress | Trained, None]:
        """Train on FOLDER/training.jsonl, from the last checkpoint in FOLDER if there is one.

        Yields progress, at most once a second, and the result at last; the adapter is in
        FOLDER/adapter then. Closing the generator kills the child at once. Raises TrainingFailed,
        or Overloaded (STORE_FULL) before the child starts.
        """
        if not (folder / RESULT).exists():  # else the service ended before it took the result
            plan = {
                "model": str(self._model),
                "dtype": self._dtype,
                "threads": self._threads,
                "checkpoint_seconds": self._checkpoint_seconds,
            }
            await asyncio.to_thread(write_plan, folder, plan, options)
            async with aclosing(self._run(folder)) as news:
                async for progress in news:
                    yield progress
        yield await asyncio.to_thread(read_result, folder)

    async def _run(self, folder: Path) -> AsyncGenerator[Progress, None]:
        killed = _kills()
        log = _Log(folder / "log")
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-P", "-m", self._module, str(folder), str(os.getpid())),
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
            env=self._environment(),
            limit=LINE_BYTES,
            start_new_session=True,  # Ctrl-C in a terminal is the parent's business
        )
        assert process.stdout and process.stderr
        noise = asyncio.create_task(log.follow(process.stderr))
        failed: dict[str, str] = {}
        try:
            async for line in process.stdout:
                news = json.loads(line)
                if "reason" in news:
                    failed = news
                else:
                    yield Progress(**news)
            await asyncio.to_thread(_exited, process.pid)
            _kill(process)  # what it started may hold its log open: wait() waits for that as well
            status = await process.wait()
            await asyncio.wait([noise], timeout=LOG_SECONDS)
        except (TypeError, ValueError) as error:
            raise TrainingFailed(
                "TRAINER_DIED", "the trainer said what nobody understands", log.tail()
            ) from error
        finally:
            await _stop(process, noise)
        if (folder / RESULT).exists():  # whatever went wrong after that
            return
        if failed:
            raise TrainingFailed(failed["reason"], failed["message"], log.tail())
        if status == -signal.SIGKILL and _kills() > killed:
            message = "the kernel ended it for want of memory"
            raise TrainingFailed("OUT_OF_MEMORY", message, log.tail())
        raise TrainingFailed("TRAINER_DIED", _how(status), log.tail())

    def _environment(self) -> dict[str, str]:
        """It finds the modules that the parent finds, but no secret in its environment."""
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        environment["OMP_NUM_THREADS"] = str(self._threads)
        # It trains on one GPU.
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(
            ","
        )[0]
        return environment | _SETTINGS


class _Log:
    """What the child says besides: in a file for people, bounded, its end in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._end = b""

    def tail(self) -> str:
        return self._end.decode(errors="ignore")

    async def follow(self, stream: asyncio.StreamReader) -> None:
        while block := await stream.read(LINE_BYTES):
            self._end = (self._end + block)[-LOG_TAIL_BYTES:]
            await asyncio.to_thread(self._write, block)

    def _write(self, block: bytes) -> None:
        with suppress(OSError), self._path.open("ab") as file:  # a full disk has its own error
            if file.tell() + len(block) > LOG_BYTES:
                file.truncate(0)
                block = self._end
            file.write(block)


async def _stop(process: Process, noise: "asyncio.Task[None]") -> None:
    """Kill the child with all that it started, and wait until it is gone."""
    _kill(process)
    await process.wait()
    noise.cancel()
    with suppress(asyncio.CancelledError):
        await noise


def _exited(pid: int) -> None:
    """Wait until the child has ended, and leave its status to asyncio."""
    with suppress(ChildProcessError):  # it has that already
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def _kill(process: Process) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _how(status: int) -> str:
    if status < 0:
        return f"the trainer was ended by {signal.Signals(-status).name}"
    return f"the trainer ended with status {status} and without a result"


def _kills() -> int:
    """Return how many processes the kernel has ended for want of memory; 0 if it does not say."""
    total = 0
    for path in KILL_COUNTERS:
        with suppress(OSError, ValueError):
            for line in path.read_text().splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    total += int(count)
    return total


def write_plan(folder: Path, plan: Mapping[str, Any], options: Options) -> None:
    """Write what `read_plan` returns. Raises Overloaded (STORE_FULL)."""
    with disk.space():
        (folder / "plan.json").write_text(json.dumps({**plan, "options": asdict(options)}))


def read_plan(folder: Path) -> tuple[dict[str, Any], Options]:
    """Return what the child is to do: the plan, and its options."""
    plan = json.loads((folder / "plan.json").read_text())
    options = plan.pop("options")
    return plan, Options(**{**options, "targets": tuple(options["targets"])})


def read_result(folder: Path) -> Trained:
    """Return what the child has left."""
    return Trained(**json.loads((folder / RESULT).read_text()))
