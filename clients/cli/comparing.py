"""Shows a comparison as it goes: one bar per path on a terminal, else a line now and then."""

import time

import typer
from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from clients.cli.live import ENDS, Display, left_running, tenth, time_left
from clients.cli.output import line, print_json, run
from clients.cli.verdict import outcome
from clients.client import Client
from clients.comparisons import ENDED, CandidateProgress, Comparison, ComparisonProgress

WIDTH = 30  # of a bar, at most
PHASES = {
    "answers": "asks the questions",
    "oracle": "asks again with the relevant documents given",
    "staleness": "asks again after the documents changed",
    "analysis": "computes the verdict",
}


def watch(address: str, id: str) -> Comparison:
    """Show a comparison until it has ended and return it; Ctrl-C leaves it running."""
    with left_running("comparison", "comparisons", id):
        return run(address, lambda client: _watch(client, id))


def tell(comparison: Comparison, json: bool, next_steps: list[str]) -> None:
    """Print what came of a comparison; exit code 1 unless it has finished."""
    if json:
        print_json(comparison)
    elif comparison.state == "finished":
        print("\n".join([*outcome(comparison), *next_steps]))
    else:
        print(f"{describe(comparison)}.")
    if comparison.state in ENDS:
        raise typer.Exit(1)


def describe(comparison: Comparison) -> str:
    """Return where a comparison stands, in words."""
    name = f"Comparison {comparison.id}"
    match comparison.state:
        case "queued":
            return f"{name} waits in the queue"
        case "running":
            count = len(comparison.start.candidates)
            return f"{name}: {comparison.questions:,} questions to {count} candidates"
    why = f": {line(comparison.message)} ({comparison.reason})" if comparison.reason else ""
    return f"{name} {ENDS.get(comparison.state, f'is {comparison.state}')}{why}"


async def _watch(client: Client, id: str) -> Comparison:
    with ComparisonDisplay(Console(stderr=True)) as display:
        async for event in client.watch_comparison(id):
            display.show(event.news)
    return await client.comparison(id)


class ComparisonDisplay(Display):
    """Shows what `show` was given, while it is entered."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._comparison: Comparison | None = None
        self._progress: ComparisonProgress | None = None
        self._since = 0.0  # when the progress came

    def show(self, news: Comparison | ComparisonProgress) -> None:
        """Take the next news of the comparison."""
        if isinstance(news, Comparison):
            self._comparison = news
            if not self.terminal and news.state not in ENDED:
                self.tell(describe(news))
            return
        before, self._progress, self._since = self._progress, news, time.monotonic()
        new_phase = before is None or news.phase != before.phase
        if self.terminal or not (new_phase or _tenth(news) > _tenth(before)):
            return
        words = [f"{line(one.candidate)} {_words(one)}" for one in news.candidates]
        left = time_left(news.seconds_left, 0.0)
        phase = PHASES.get(news.phase, news.phase)
        self.tell("; ".join([phase, *words, *([left] if left else [])]))

    def drawn(self) -> Table:
        comparison, progress = self._comparison, self._progress
        passed = time.monotonic() - self._since
        whole = Table.grid()
        if comparison:
            whole.add_row(Text(describe(comparison)))
        if progress and comparison and comparison.state not in ENDED:
            phase = PHASES.get(progress.phase, progress.phase)
            left = time_left(progress.seconds_left, passed)
            whole.add_row(Text(", ".join(filter(None, (phase, left)))))
        if progress:
            rows = Table.grid(padding=(0, 2))
            rows.add_column(no_wrap=True)
            rows.add_column(max_width=WIDTH)  # narrower where the terminal is
            rows.add_column(no_wrap=True)
            rows.add_column(no_wrap=True)
            for one in progress.candidates:
                rows.add_row(
                    Text(line(one.candidate)),
                    ProgressBar(max(one.total, 1), one.done),
                    Text(_words(one)),
                    Text(time_left(one.seconds_left, passed) if one.done < one.total else ""),
                )
            whole.add_row(rows)
        return whole


def _tenth(progress: ComparisonProgress | None) -> int:
    total = sum(one.total for one in progress.candidates) if progress else 0
    done = sum(one.done for one in progress.candidates) if progress else 0
    return tenth(done, total)


def _words(one: CandidateProgress) -> str:
    words = [f"{one.done:,}/{one.total:,}"]
    if one.strict is not None and one.format_blind is not None:
        words.append(f"strict {one.strict:.2f}, format-blind {one.format_blind:.2f}")
    if one.failed:
        words.append(f"{one.failed:,} failed")
    return ", ".join(words)
