"""How long `tworoads up` takes until it is ready, against the vLLM engine alone.

    python -m benchmarks.start [--rounds 3]

The model is prepared and all files have been read before. The engine alone is a process that
starts AsyncLLM as the generation service does, with its settings, and nothing else.
"""

import argparse
import asyncio
import os
import tempfile
import time
from pathlib import Path

from benchmarks.offline_engine import offline_engine
from benchmarks.ratios import ratios, spread
from benchmarks.stack import environment, own_stack
from clients.local import read_state


def up(folder: Path) -> tuple[float, dict[str, float], dict[str, str]]:
    """Return what `tworoads up` took, what each service took, and generation's environment."""
    start = time.perf_counter()
    with own_stack(folder):
        seconds = time.perf_counter() - start
        state = read_state(folder)
        assert state is not None
        services = {service.name: service for service in state.services}
        took = {name: service.seconds for name, service in services.items()}
        return seconds, took, environment(services["generation"])


async def alone(settings: dict[str, str]) -> float:
    start = time.perf_counter()
    async with offline_engine(settings):
        return time.perf_counter() - start


def measure(rounds: int) -> None:
    stacks: list[float] = []
    engines: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        _, _, settings = up(Path(folder))
        for _ in range(rounds):
            engines.append(asyncio.run(alone(settings)))
            seconds, took, settings = up(Path(folder))
            stacks.append(seconds)
    print(f"seconds until ready, {rounds} rounds; median (least to most)")
    print(f"  engine alone  {spread(engines, 1)}")
    print(f"  tworoads up   {spread(stacks, 1)}", end="")
    print(f"   : engine alone {spread(ratios(stacks, engines))}   goal <= 1.3")
    print("  of the last one: " + ", ".join(f"{name} {s:.1f}" for name, s in took.items()))
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    measure(parser.parse_args().rounds)
