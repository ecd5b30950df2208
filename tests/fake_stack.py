"""`python -m tests.fake_stack FOLDER [HOW]`: two fake services, run as by `tworoads up`.

HOW is given to the first of them; see fake_service.
"""

import sys
from pathlib import Path

from clients.cli import app
from clients.cli.running import run_here
from clients.local import lock
from clients.stack import Stack, free_addresses, module
from clients.supervisor import Child, Policy

QUICK = Policy(first_wait=0.05, longest_wait=0.2, healthy=60, attempts=2, grace=8)


def fake(name: str, folder: Path, how: str = "") -> Child:
    [address] = free_addresses(1)
    argv = module("tests.fake_service", name, address, str(folder), *([how] if how else []))
    return Child(name, argv, {}, address, f"fake.{name}")


def up(folder: Path, how: str = "") -> None:
    children = (fake("back", folder, how), fake("front", folder))
    with lock(folder):
        run_here(Stack(children[-1].address, "fake store", "fake model", children), folder, QUICK)


if __name__ == "__main__":
    app.run(lambda: up(Path(sys.argv[1]), *sys.argv[2:]))
