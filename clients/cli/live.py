"""Shows work as it goes: redrawn on a terminal, else a line now and then."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from clients.cli.output import duration

LINES = 10  # of progress in all, where there is no terminal
ENDS = {"failed": "has failed", "cancelled": "was cancelled"}


class Display(ABC):
    """Redraws what `drawn` returns while it is entered, if the console is a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None

    @abstractmethod
    def drawn(self) -> Table:
        """Return what is to be seen now."""

    @property
    def terminal(self) -> bool:
        return self._console.is_terminal

    def tell(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        if self.terminal:
            draw = self.drawn
            self._live = Live(console=self._console, get_renderable=draw, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()


@contextmanager
def left_running(noun: str, command: str, id: str) -> Iterator[None]:
    """Let Ctrl-C leave what is watched running, and say how to come back to it."""
    try:
        yield
    except KeyboardInterrupt:
        print(
            f"The {noun} goes on. `tworoads {command} watch {id}` shows it again,"
            f" `tworoads {command} cancel {id}` stops it.",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None


def tenth(done: int, total: int) -> int:
    """Return which of LINES parts of the work is reached, -1 if that cannot be said."""
    return LINES * done // total if total else -1


def time_left(seconds: float | None, passed: float) -> str:
    """Return how long it takes, `passed` seconds after that was estimated; empty if unknown."""
    return "" if seconds is None else f"{duration(max(0.0, seconds - passed))} left"
