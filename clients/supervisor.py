"""Keeps a list of processes running, on this machine, for as long as it lives itself."""

import asyncio
import logging
import os
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clients import health, leash
from clients.local import LocalError, ServiceState, Status, rotate

TAIL_LINES = 20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Child:
    """A process to keep running, or with `once` one to run to its end before the others start."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment of the supervisor."""
    address: str = ""
    """Where it serves, HOST:PORT."""
    health: str = ""
    """The full name of a gRPC service, or a URL that answers 200 when ready."""
    metrics: str = ""
    once: bool = False
    gives: Sequence[str] = ()
    """With `once`: the variables that its last line becomes in the environment of the others."""


@dataclass(frozen=True)
class Policy:
    """When to start a process again, and when to stop asking it. Times are in seconds."""

    first_wait: float = 0.5
    """Before the first new start; doubles with each one."""
    longest_wait: float = 30.0
    healthy: float = 60.0
    """After being ready for so long, the next wait is the first again."""
    attempts: int = 3
    """So often it may die before it was ever ready."""
    grace: float = 20.0
    """How long it may take to stop before it is killed."""


class StartFailed(LocalError):
    """A process does not start. `tail` is the end of its log."""

    def __init__(self, message: str, tail: str) -> None:
        super().__init__(message)
        self.tail = tail


class Supervisor:
    """Starts the children at once, each in a session of its own, and starts those that die again.

    What they write goes to FOLDER/logs/NAME.log. The last of the list is the front: it stops first.
    `changed` is called with the states of all whenever one has changed.
    """

    def __init__(
        self,
        children: Sequence[Child],
        folder: Path,
        changed: Callable[[tuple[ServiceState, ...]], None] = lambda states: None,
        policy: Policy | None = None,
    ) -> None:
        self.ready = asyncio.Event()
        """Set once all have been ready at the same time."""
        self._children = children
        self._logs = folder / "logs"
        self._changed = changed
        self._policy = policy or Policy()
        self._processes: dict[str, Process] = {}
        self._given: dict[str, str] = {}
        self._stop = asyncio.Event()
        now = time.time()
        self._states = {
            child.name: ServiceState(
                child.name,
                "waiting",
                now,
                address=child.address,
                health=child.health,
                metrics=child.metrics,
            )
            for child in children
        }

    async def run(self) -> None:
        """Keep all running until `stop`. Raises StartFailed; nothing runs any more after either."""
        self._logs.mkdir(exist_ok=True)
        for child in self._children:
            rotate(self._log(child))
        self._changed(tuple(self._states.values()))
        work = asyncio.create_task(self._keep_all())
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((work, stop), return_when=asyncio.FIRST_COMPLETED)
        finally:
            work.cancel()
            stop.cancel()
            await asyncio.wait((work, stop))
            await self._end_all()
        if not work.cancelled():
            work.result()

    def stop(self) -> None:
        """Make `run` stop all and return. Called again, it kills what still runs."""
        if self._stop.is_set():
            for process in self._processes.values():
                _kill(process)
        self._stop.set()

    async def _keep_all(self) -> None:
        for child in self._children:
            if child.once:
                await self._run_once(child)
        keepers = [asyncio.create_task(self._keep(c)) for c in self._children if not c.once]
        try:
            await asyncio.gather(*keepers)
        finally:
            for keeper in keepers:
                keeper.cancel()
            await asyncio.wait(keepers)

    async def _run_once(self, child: Child) -> None:
        process = await self._start(child)
        code = await process.wait()
        self._forget(child)
        if code:
            raise StartFailed(f"Preparing the {child.name} {_ended(code)}.", self._tail(child))
        self._given |= dict.fromkeys(child.gives, self._tail(child).rpartition("\n")[2])
        self._set(child, "done", seconds=time.time() - self._states[child.name].started)

    async def _keep(self, child: Child) -> None:
        policy, failures, proven = self._policy, 0, False
        while True:
            process = await self._start(child)
            ready: asyncio.Future[float] = asyncio.get_running_loop().create_future()
            watcher = asyncio.create_task(self._watch(child, ready))
            try:
                code = await process.wait()
            finally:
                watcher.cancel()
                await asyncio.wait((watcher,))
            self._forget(child)
            if ready.done():
                proven = True
                failures = 0 if time.time() - ready.result() >= policy.healthy else failures
            failures += 1
            if not proven and failures == policy.attempts:
                raise StartFailed(
                    f"{child.name} does not start: {failures} times in a row it {_ended(code)}.",
                    self._tail(child),
                )
            wait = min(policy.first_wait * 2 ** min(failures - 1, 16), policy.longest_wait)
            self._set(child, "down", pid=None, restarts=self._states[child.name].restarts + 1)
            log.warning("%s %s; it is started again in %g s", child.name, _ended(code), wait)
            await asyncio.sleep(wait)

    async def _start(self, child: Child) -> Process:
        with self._log(child).open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", leash.__file__, str(os.getpid()), *child.argv),
                stdin=DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **child.env, **self._given},
                start_new_session=True,
            )
        self._processes[child.name] = process
        self._set(child, "starting", pid=process.pid, started=time.time())
        log.info("%s is process %d", child.name, process.pid)
        return process

    async def _watch(self, child: Child, ready: asyncio.Future[float]) -> None:
        async with aclosing(health.watch(child.address, child.health)) as answers:
            async for is_ready in answers:
                state = self._states[child.name]
                if is_ready and state.status != "ready":
                    now = time.time()
                    self._set(child, "ready", seconds=now - state.started)
                    log.info("%s is ready after %.1f s", child.name, now - state.started)
                    if not ready.done():
                        ready.set_result(now)
                elif not is_ready and state.status == "ready":
                    self._set(child, "starting")
                    log.warning("%s is not ready any more", child.name)

    async def _end_all(self) -> None:
        """Stop the front, then the others at once."""
        front = self._children[-1].name
        for names in ([front], [name for name in self._processes if name != front]):
            await asyncio.gather(*(self._end(name) for name in names if name in self._processes))

    async def _end(self, name: str) -> None:
        process = self._processes[name]
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(self._policy.grace):
                await process.wait()
        except TimeoutError:
            log.warning("%s did not stop within %g s and was killed", name, self._policy.grace)
        _kill(process)
        await process.wait()

    def _forget(self, child: Child) -> None:
        _kill(self._processes.pop(child.name))

    def _set(self, child: Child, status: Status, **fields: Any) -> None:
        state = replace(self._states[child.name], status=status, since=time.time(), **fields)
        self._states[child.name] = state
        states = tuple(self._states.values())
        self._changed(states)
        if all(s.status in ("ready", "done") for s in states):
            self.ready.set()

    def _log(self, child: Child) -> Path:
        return self._logs / f"{child.name}.log"

    def _tail(self, child: Child) -> str:
        lines = self._log(child).read_text(errors="replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:])


def _kill(process: Process) -> None:
    """Kill what is left of the process and of its own children."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _ended(code: int) -> str:
    return f"ended with exit code {code}" if code >= 0 else f"was killed by signal {-code}"
