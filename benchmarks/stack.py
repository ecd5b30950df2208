"""The stack that is measured: where its services are, and what their processes cost."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clients import leash
from clients.local import ServiceState, data_folder, read_state
from clients.stack import free_addresses, module


def running_stack() -> dict[str, ServiceState]:
    """Return the services of the stack of TWOROADS_DATA_DIR, or the user's own, by name; end with a
    sentence if it does not run."""
    state = read_state(data_folder())
    if state is None or not state.ready:
        sys.exit("Start the stack first: tworoads up --detach")
    return {service.name: service for service in state.services}


@contextmanager
def own_stack(folder: Path) -> Iterator[None]:
    """Run a stack on a data folder while the block runs. Its progress goes to standard error."""
    port = free_addresses(1)[0].rpartition(":")[2]
    tworoads, where = module("clients.cli"), f"--data={folder}"
    try:
        subprocess.run(
            [*tworoads, "up", "--detach", where, f"--port={port}"], stdout=sys.stderr, check=True
        )
        yield
    finally:
        subprocess.run([*tworoads, "down", where], stdout=sys.stderr, check=True)


def leashed(module: str, *arguments: str) -> tuple[str, ...]:
    """Return the command line of a module that ends with this process, however that ends."""
    command = (sys.executable, "-m", module, *arguments)
    return (sys.executable, "-I", "-S", leash.__file__, str(os.getpid()), *command)


def process(service: ServiceState) -> int:
    """Return the process id of a service that runs."""
    assert service.pid is not None
    return service.pid


def environment(service: ServiceState) -> dict[str, str]:
    """Return the environment that a service was started with: its settings are in it."""
    pairs = Path(f"/proc/{process(service)}/environ").read_bytes().split(b"\0")
    return dict(os.fsdecode(pair).split("=", 1) for pair in pairs if b"=" in pair)


def cpu_seconds(*pids: int) -> float:
    """Return the CPU time of processes so far, to the nanosecond, without that of their children.

    The ticks of /proc/PID/stat are 10 ms, too coarse for the work on a few thousand tokens. The
    number of a process's clock is that of clock_getcpuclockid(3) on Linux.
    """
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)
