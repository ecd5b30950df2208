"""The queue of comparisons."""

import shutil
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from pydantic import TypeAdapter

from services.evaluation.comparison import (
    CHANGED,
    ENDED,
    OUTCOME,
    REPORT,
    Comparison,
    ComparisonFailed,
    Progress,
)
from services.runtime.database import Database
from services.runtime.queue import HEARTBEAT_SECONDS, Failed, Queue
from services.runtime.threads import in_thread
from services.runtime.work import WorkStore

COMPARISON = TypeAdapter(Comparison)
PROGRESS = TypeAdapter(Progress)


class Runner(Protocol):
    """What asks and analyses. `running.py` has the real one."""

    async def run(
        self,
        comparison: Comparison,
        folder: Path,
        note: Callable[[Progress], Awaitable[None]],
        change: Callable[[Mapping[str, Any]], Awaitable[Comparison]],
    ) -> None:
        """Ask, analyse, and leave the outcome and the report in the comparison's folder. What the
        folder has of an earlier run that was cut off is not asked again.

        `note` tells how far it has come, at most once a second; `change` sets fields of the
        comparison, such as the version of the corpus, for good. Both raise Ended if somebody ends
        the comparison meanwhile; it is cancelled then too. Raises ComparisonFailed or ServiceError
        if there is no verdict.
        """


class Comparisons(Queue[Comparison, Progress]):
    """Runs at most `max_running` comparisons at once while it is open; at most `max_queued` of a
    tenant wait, and tenants take turns. The folder of each stays: it has the answers, however it
    ended."""

    store: WorkStore[Comparison, Progress]

    def __init__(
        self,
        folder: Path,
        database: Database,
        runner: Runner,
        max_running: int = 1,
        max_queued: int = 100,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
    ) -> None:
        super().__init__(
            folder / "comparisons",
            WorkStore(database, "comparison", COMPARISON, PROGRESS, ENDED),
            max_running=max_running,
            max_queued=max_queued,
            heartbeat_seconds=heartbeat_seconds,
        )
        self._runner = runner

    def folder_of(self, comparison: Comparison) -> Path:
        """Return where the files of a comparison are."""
        return self._folder / comparison.id

    async def do(self, work: Comparison) -> None:
        async def note(progress: Progress) -> None:
            await in_thread(self.store.progress, work.id, progress)
            self._changed(work.id)

        async def change(changes: Mapping[str, Any]) -> Comparison:
            # A change of fields is no news: an event of a comparison says that its state changed.
            event = "state" in changes
            changed = await in_thread(self.store.change, work.id, changes, event)
            if event:
                self._changed(work.id)
            return changed

        if work.state == "queued":
            work = await change({"state": "running"})
        try:
            await self._runner.run(work, self.folder_of(work), note, change)
        except ComparisonFailed as error:
            raise Failed(error.reason, error.message) from error
        await change({"state": "finished"})

    def clear(self, work: Comparison) -> None:
        """Remove the documents, which are replaced by now, and an outcome that does not count."""
        if work.state == "finished":
            shutil.rmtree(self.folder_of(work) / CHANGED, ignore_errors=True)
        else:
            self.make_room(work.id)

    def make_room(self, id: str) -> None:
        """Remove all but the questions and the answers."""
        folder = self._folder / id
        shutil.rmtree(folder / CHANGED, ignore_errors=True)
        for path in (folder / OUTCOME, *folder.glob(f"{REPORT}.*")):
            path.unlink(missing_ok=True)
