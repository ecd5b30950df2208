"""Jobs and their events in the database. Everything here blocks: not for the event loop."""

from typing import TypeAlias

from pydantic import TypeAdapter

from services.runtime import work
from services.runtime.database import Database
from services.tuning.job import ENDED, Job, Progress

JOB = TypeAdapter(Job)
PROGRESS = TypeAdapter(Progress)

Event: TypeAlias = work.Event[Job, Progress]


class JobStore(work.WorkStore[Job, Progress]):
    """Keeps jobs, beside the adapters that they register."""

    def __init__(self, database: Database) -> None:
        super().__init__(database, "job", JOB, PROGRESS, ENDED, undone={"adapter": ""})

    def adapters_of(self, job: Job) -> list[str]:
        """Return the adapters that a job registered and that are not deleted."""
        with self._database.transaction() as connection:
            rows = connection.execute(
                "SELECT id FROM adapters WHERE tenant = ? AND deleted = 0"
                " AND json_extract(adapter, '$.adapter.job') = ?",
                (job.tenant, job.id),
            )
            return [row["id"] for row in rows]
