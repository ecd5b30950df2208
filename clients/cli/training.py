"""Shows a training job as it goes: redrawn on a terminal, else a line now and then."""

import time

import typer
from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from clients.adapters import Adapter
from clients.cli.adapters import measured, next_steps
from clients.cli.live import ENDS, Display, left_running, tenth, time_left
from clients.cli.output import duration, line, plain, print_json, run
from clients.cli.sparkline import sparkline
from clients.client import Client
from clients.jobs import ENDED, Job, JobProgress

WIDTH = 48  # of the bar and of the sparkline


def follow(address: str, id: str, json: bool) -> None:
    """Show a job until it has ended, then what came of it.

    Exit code 1 if that is no adapter that answers. Ctrl-C leaves the job running.
    """
    with left_running("job", "jobs", id):
        job, adapter = run(address, lambda client: _follow(client, id))
    if json:
        print_json({"job": job, "adapter": adapter})
    else:
        print("\n".join(outcome(job, adapter)))
    if not (adapter and adapter.served):
        raise typer.Exit(1)


def outcome(job: Job, adapter: Adapter | None) -> list[str]:
    """Return in lines what came of a job that has ended, and what to do next."""
    why = f": {line(job.message)} ({job.reason})" if job.reason else ""
    if adapter is None:
        log = [f"  {plain(text)}" for text in job.log_tail.splitlines()]
        return [*log, f"The job {job.id} {ENDS.get(job.state, job.state)}{why}."]
    spent = job.ended - job.started if job.ended and job.started else None
    after = f" after {duration(spent.total_seconds())}" if spent else ""
    end = f"{adapter.id} is {adapter.state}{after}{why}."
    return [end, *measured(adapter), *next_steps(adapter)]


async def _follow(client: Client, id: str) -> tuple[Job, Adapter | None]:
    with JobDisplay(Console(stderr=True)) as display:
        async for event in client.watch_job(id):
            display.show(event.news)
    job = await client.job(id)
    kept = job.state not in ("failed", "cancelled")
    return job, await client.adapter(job.adapter) if kept else None


class JobDisplay(Display):
    """Shows what `show` was given, while it is entered."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._job: Job | None = None
        self._progress: JobProgress | None = None
        self._since = 0.0  # when the progress came
        self._losses: list[float] = []

    def show(self, news: Job | JobProgress) -> None:
        """Take the next news of the job."""
        before, self._since = self._progress, time.monotonic()
        if isinstance(news, Job):
            self._job = news
            if not self.terminal and news.state not in ENDED:
                self.tell(describe(news))
            return
        self._progress = news
        if news.loss is not None:
            self._losses.append(news.loss)
        if not self.terminal and _tenth(news) > _tenth(before):
            self.tell(", ".join(_words(news, 0.0)))

    def drawn(self) -> Table:
        job, progress = self._job, self._progress
        rows = Table.grid()
        if job:
            rows.add_row(Text(describe(job)))
        if progress:
            passed = time.monotonic() - self._since
            rows.add_row(ProgressBar(progress.steps, progress.step, WIDTH))
            rows.add_row(Text(", ".join(_words(progress, passed))))
            rows.add_row(Text(sparkline(self._losses, WIDTH), style="cyan"))
        return rows


def describe(job: Job) -> str:
    """Return what a job is doing, in words."""
    again = f", started again {job.restarts} of 2 times" if job.restarts else ""
    match job.state:
        case "queued" if job.jobs_ahead:
            return f"{job.name} waits for {job.jobs_ahead} jobs before it"
        case "queued":
            return f"{job.name} waits in the queue"
        case "preparing":
            return f"{job.name}: preparing {job.data.examples:,} examples"
        case "training":
            return f"{job.name}: training{again}"
        case "verifying":
            return f"{job.name}: measuring {job.adapter}"
    return f"{job.name} {ENDS.get(job.state, f'is {job.state}')}"


def _tenth(progress: JobProgress | None) -> int:
    return tenth(progress.step, progress.steps) if progress else -1


def _words(progress: JobProgress, passed: float) -> list[str]:
    words = [f"step {progress.step:,} of {progress.steps:,}"]
    if progress.loss is not None:
        words.append(f"loss {progress.loss:.3f}")
    if progress.held_out_loss is not None:
        words.append(f"held-out loss {progress.held_out_loss:.3f}")
    if progress.tokens_per_second:
        words.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    if progress.seconds_left is not None and progress.step < progress.steps:
        words.append(time_left(progress.seconds_left, passed))
    return words
