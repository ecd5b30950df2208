"""Shows how a stack gets ready: a line a service, redrawn on a terminal, else printed once."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from clients.cli.live import Display
from clients.local import ServiceState

STYLES = {"waiting": "dim", "starting": "yellow", "ready": "green", "done": "green", "down": "red"}


class Progress(Display):
    """Shows what `show` was last given, while it is entered."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._states: Sequence[ServiceState] = ()
        self._printed: dict[str, str] = {}

    def show(self, states: Sequence[ServiceState]) -> None:
        """Take the states of all services."""
        self._states = states
        if self.terminal:
            return
        for state in states:
            if state.status != "waiting" and self._printed.get(state.name) != state.status:
                self._printed[state.name] = state.status
                self.tell(f"{state.name}: {describe(state)}")

    def drawn(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for state in self._states:
            seconds = f", {time.time() - state.since:.0f} s" if state.status == "starting" else ""
            style = STYLES[state.status]
            table.add_row(state.name, f"[{style}]{describe(state)}{seconds}[/{style}]")
        return table


def describe(state: ServiceState) -> str:
    """Return what a service is doing, in words."""
    match state.status:
        case "starting":
            return "starting" if state.health else "preparing"
        case "ready":
            return f"ready after {state.seconds:.1f} s"
        case "done":
            return f"prepared in {state.seconds:.1f} s"
        case "down":
            return "ended, is started again"
    return state.status
