"""Runs a stack for a person who watches: shows its progress, what to do next, why it fails."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console

from clients.cli.logs import parse, readable
from clients.cli.progress import Progress
from clients.local import (
    LocalError,
    ServiceState,
    StackState,
    command,
    data_folder,
    read_state,
    remove_state,
    rotate,
    write_state,
)
from clients.stack import Stack
from clients.supervisor import Policy, StartFailed, Supervisor
from services.runtime.logs import JsonFormatter

POLL_SECONDS = 0.2
NEXT = """\
  tworoads ingest FOLDER           put documents into the corpus "documents"
  tworoads ask "..."               ask about them; the answer quotes its sources
  tworoads ask --path base "..."   ask the model alone
  tworoads tune FILE --name NAME   teach it to answer as your examples do\
"""


def run_here(stack: Stack, folder: Path, policy: Policy | None = None) -> None:
    """Run the stack in this process until a signal. The caller holds the lock of the folder.

    Raises StartFailed, after showing the end of the log that tells why.
    """
    with _logs(folder):
        try:
            asyncio.run(_run(stack, folder, policy or Policy()))
        except StartFailed as error:
            for line in error.tail.splitlines():
                print("  " + readable(parse(line)), file=sys.stderr)
            raise
        finally:
            remove_state(folder)


def run_detached(argv: Sequence[str], folder: Path) -> None:
    """Start a command that runs a stack in a session of its own; return once the stack is ready.

    Raises LocalError with what the command wrote to standard error if it ends before.
    """
    console = Console()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        try:
            with Progress(console) as progress:
                state = _await_ready(process, folder, progress)
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise typer.Exit(130) from None
        if state is None:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip()
            raise LocalError(said.replace("Error: ", "") or "The stack ended.")
    _summarise(console, state, folder)


def _await_ready(
    process: subprocess.Popen[bytes], folder: Path, progress: Progress
) -> StackState | None:
    while process.poll() is None:
        state = read_state(folder)
        if state and state.pid == process.pid:
            progress.show(state.services)
            if state.ready:
                return state
        time.sleep(POLL_SECONDS)
    return None


async def _run(stack: Stack, folder: Path, policy: Policy) -> None:
    console = Console()
    progress = Progress(console)

    def state(services: tuple[ServiceState, ...]) -> StackState:
        return StackState(os.getpid(), stack.address, stack.store, stack.model, services)

    def changed(services: tuple[ServiceState, ...]) -> None:
        write_state(folder, state(services))
        if not supervisor.ready.is_set():
            progress.show(services)

    def on_signal() -> None:
        console.print("Stopping.")
        supervisor.stop()

    supervisor = Supervisor(stack.children, folder, changed, policy)
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(sig, on_signal)
    work = asyncio.create_task(supervisor.run())
    with progress:
        ready = asyncio.create_task(supervisor.ready.wait())
        await asyncio.wait((work, ready), return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
    if supervisor.ready.is_set() and not work.done():
        _summarise(console, state(()), folder)
    await work


def _summarise(console: Console, state: StackState, folder: Path) -> None:
    lines = [
        f"Ready on {state.address}, model {state.model}, store {state.store}. Next:",
        *([] if folder == data_folder() else [f"  export TWOROADS_DATA_DIR={folder}"]),
        NEXT,
        f"`{command('status', folder)}` shows how it is, `{command('down', folder)}` stops it.",
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _logs(folder: Path) -> Iterator[None]:
    """Write what the supervisor does to its log, and its warnings to standard error as well."""
    path = folder / "logs" / "supervisor.log"
    path.parent.mkdir(exist_ok=True)
    rotate(path)
    file = logging.FileHandler(path)
    file.setFormatter(JsonFormatter())
    screen = logging.StreamHandler()
    screen.setLevel(logging.WARNING)
    screen.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[file, screen], force=True)
    try:
        yield
    finally:
        logging.shutdown()
