"""The real parts, each prepared or started once for all tests of a session.

`generation_model` is the folder of a small real checkpoint, kept between sessions in the cache of
the user. `generation` is one running generation service; tests must leave it running. A test that
ends one starts its own with `start_generation`.
"""

import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import IO

import pytest

from clients.stack import free_addresses

MODELS = Path.home() / ".cache" / "tworoads" / "models"
START_SECONDS = 600


@dataclass(frozen=True)
class GenerationProcess:
    """A generation service that serves at `address`, its metrics at `metrics` (HOST:PORT both)."""

    address: str
    metrics: str
    process: subprocess.Popen[str]


@contextmanager
def start_generation(model: Path, *flags: str) -> Iterator[GenerationProcess]:
    """Run a generation service while the block runs. Raises RuntimeError if it does not start."""
    [metrics] = free_addresses(1)
    command = [sys.executable, "-m", "services.generation", "--model", str(model)]
    command += ["--listen", "127.0.0.1:0", "--metrics", metrics, "--grace-seconds", "1", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield GenerationProcess(f"127.0.0.1:{_port(process)}", metrics, process)
        finally:
            process.terminate()
            process.wait(START_SECONDS)


@pytest.fixture(scope="session")
def generation_model() -> Path:
    done = subprocess.run(
        [sys.executable, "-m", "services.generation.prepare", "--out", str(MODELS)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=START_SECONDS,
    )
    return Path(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def generation(generation_model: Path) -> Iterator[GenerationProcess]:
    with start_generation(generation_model) as running:
        yield running


def _port(process: "subprocess.Popen[str]") -> int:
    """Wait until the service says its port; go on reading its log, which would block it else."""
    assert process.stderr is not None
    last: deque[str] = deque(maxlen=50)
    for line in process.stderr:
        last.append(line)
        if "serves on port" in line:
            Thread(target=_read_on, args=(process.stderr,), daemon=True).start()
            return int(line.rsplit("port ", 1)[1].split('"')[0])
    raise RuntimeError("the generation service did not start:\n" + "".join(last))


def _read_on(log: IO[str]) -> None:
    with suppress(ValueError):  # closed, if the service was killed
        deque(log, 0)
