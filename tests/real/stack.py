"""A whole stack of real parts, started as a user starts it, and what its tests ask of it."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.client import Client
from clients.local import ServiceState, StackState, read_state
from clients.stack import free_addresses
from clients.supervisor import Child, Supervisor

COMMAND = Path(sys.executable).with_name("tworoads")
UP_SECONDS = 600
COMMAND_SECONDS = 300  # one command, which may train
LIMIT = 300  # seconds for anything else, on a machine that does other things too
PARSE_SECONDS = 5


@dataclass(frozen=True)
class RunningStack:
    """A stack that runs on the data folder `folder`, its gateway at `address` (HOST:PORT)."""

    folder: Path
    address: str

    def tworoads(self, *arguments: str) -> str:
        """Return what the command prints. Raises CalledProcessError if it fails."""
        return subprocess.run(
            [COMMAND, *arguments],
            env=_environment(self.folder),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=COMMAND_SECONDS,
        ).stdout

    def json(self, *arguments: str) -> Any:
        """Return what the command prints with --json."""
        return json.loads(self.tworoads(*arguments, "--json"))

    def client(self) -> Client:
        return Client(self.address)

    def service(self, name: str) -> ServiceState:
        """Return how the supervisor sees a service."""
        return service_of(read_state(self.folder), name)

    def kill(self, name: str) -> ServiceState:
        """Kill a service with SIGKILL; return how it was before."""
        state = self.service(name)
        assert state.pid is not None
        os.kill(state.pid, signal.SIGKILL)
        return state

    async def restarted(self, killed: ServiceState) -> None:
        """Wait until the supervisor has started a killed service again and it is ready."""

        def is_back() -> bool:
            state = self.service(killed.name)
            return state.restarts > killed.restarts and state.status == "ready"

        await until(is_back)


@contextmanager
def start_stack(folder: Path, *flags: str) -> Iterator[RunningStack]:
    """Run a stack on the data folder while the block runs, by `tworoads up` and `tworoads down`.

    Documents may take fewer seconds to parse than by default: a test waits for one that hangs.
    """
    [address] = free_addresses(1)
    port = address.rpartition(":")[2]
    environment = _environment(folder)
    environment["TWOROADS_RETRIEVAL_PARSE_SECONDS"] = str(PARSE_SECONDS)
    subprocess.run(
        [COMMAND, "up", "--detach", "--data", folder, "--port", port, *flags],
        env=environment,
        check=True,
        timeout=UP_SECONDS,
    )
    stack = RunningStack(folder, address)
    try:
        yield stack
    finally:
        print(stack.tworoads("down"))


@asynccontextmanager
async def supervised(children: Sequence[Child], folder: Path) -> AsyncIterator["Supervised"]:
    """Keep these processes running while the block runs, as `tworoads up` does; all are ready."""
    seen = Supervised()
    supervisor = Supervisor(children, folder, seen.changed)
    work = asyncio.create_task(supervisor.run())
    ready = asyncio.create_task(supervisor.ready.wait())
    await asyncio.wait((work, ready), return_when=asyncio.FIRST_COMPLETED)
    ready.cancel()
    if work.done():
        work.result()
    try:
        yield seen
    finally:
        supervisor.stop()
        await work


class Supervised:
    """What a supervisor last said of its processes, by name."""

    def __init__(self) -> None:
        self.states: dict[str, ServiceState] = {}

    def changed(self, states: Sequence[ServiceState]) -> None:
        self.states = {state.name: state for state in states}


def service_of(state: StackState | None, name: str) -> ServiceState:
    assert state is not None
    return next(service for service in state.services if service.name == name)


async def until(condition: Callable[[], object], seconds: float = LIMIT) -> None:
    """Wait for what another process does; fail if it does not."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


def _environment(folder: Path) -> dict[str, str]:
    """Return this process's environment with the data folder in it, and no other address."""
    others = {key: value for key, value in os.environ.items() if key != "TWOROADS_ADDRESS"}
    return {**others, "TWOROADS_DATA_DIR": str(folder)}
