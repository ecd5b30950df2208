"""What Kubernetes' probes ask: a service is alive, and ready, however much of the rest is away.

One check is both of them. If it failed for another part, its pods would be started anew for as long
as that part is away, and so would those of who calls it.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clients.stack import free_addresses
from services.runtime.healthy import is_healthy

START_SECONDS = 30


@pytest.mark.parametrize(
    ("service", "parts"),
    [
        ("gateway", ("retrieval", "embedding", "generation", "tuning", "evaluation")),
        ("retrieval", ("embedding", "weaviate_http", "weaviate_grpc")),
        ("evaluation", ("gateway",)),
    ],
)
def test_a_service_is_ready_while_all_that_it_calls_is_away(
    service: str, parts: tuple[str, ...], tmp_path: Path
) -> None:
    listen, health, *away = free_addresses(2 + len(parts))
    said = {"listen": listen, "health": health, **dict(zip(parts, away, strict=True))}
    if service != "gateway":
        said["folder"] = str(tmp_path)
    if service == "retrieval":
        said["store"] = "weaviate"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in said.items()]
    command = [sys.executable, "-m", f"services.{service}", *flags]
    with subprocess.Popen(command, env=os.environ, cwd=Path(__file__).parents[1]) as process:
        try:
            until = time.monotonic() + START_SECONDS
            while not is_healthy(health, 0.5):
                assert process.poll() is None and time.monotonic() < until
        finally:
            process.kill()
