"""Jobs and their events in the database. Everything here blocks: not for the event loop."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from sqlite3 import Connection
from typing import Any, Literal

from pydantic import TypeAdapter

from services.runtime.database import Database
from services.runtime.errors import AlreadyExists, NotFound, NotReady, Overloaded
from services.tuning.job import ENDED, Job, Progress

PROGRESS_KEPT = 1000  # events back from the newest: older progress of a job is forgotten

JOB = TypeAdapter(Job)
PROGRESS = TypeAdapter(Progress)
UNENDED = f"state NOT IN ({', '.join(repr(state) for state in sorted(ENDED))})"


class Ended(Exception):
    """The job has ended meanwhile: nothing about it changes any more."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a job, at `time` in seconds since 1970."""

    sequence: int
    time: float
    value: Job | Progress


class JobStore:
    """Keeps jobs. A change of a job and its event are one transaction.

    Every method may raise Overloaded (STORE_FULL).
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def known(self, tenant: str, key: str) -> bool:
        """Say whether an idempotency key is taken."""
        with self._database.transaction() as connection:
            return _of_key(connection, tenant, key) is not None

    def same(self, tenant: str, key: str, upload_hash: str) -> Job | None:
        """Return the job that an upload with this key made before, None for an empty or new key.

        Raises AlreadyExists (IDEMPOTENCY_KEY_REUSED) if the upload had other content.
        """
        with self._database.transaction() as connection:
            return _same(connection, tenant, key, upload_hash)

    def add(self, job: Job, key: str, upload_hash: str, most_queued: int) -> Job:
        """Queue a job, or return the one that `same` returns.

        Raises as `same` does, and Overloaded (QUEUE_FULL) if `most_queued` jobs wait already.
        """
        with self._database.transaction() as connection:
            if before := _same(connection, job.tenant, key, upload_hash):
                return before
            if _queued(connection) >= most_queued:
                raise queue_full(most_queued)
            connection.execute(
                "INSERT INTO jobs (id, tenant, state, idempotency_key, upload_hash, job)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (job.id, job.tenant, job.state, key, upload_hash, _json(job)),
            )
            _add_event(connection, job.id, "state", _json(job))
        return job

    def queued(self) -> int:
        """Return how many jobs wait."""
        with self._database.transaction() as connection:
            return _queued(connection)

    def find(self, id: str) -> Job | None:
        """Return a job of any tenant, None if there is none of this id."""
        with self._database.transaction() as connection:
            row = connection.execute("SELECT job FROM jobs WHERE id = ?", (id,)).fetchone()
            return _job(row) if row else None

    def get(self, tenant: str, id: str) -> tuple[Job, int]:
        """Return a job, and how many go before it. Raises NotFound (JOB_NOT_FOUND)."""
        with self._database.transaction() as connection:
            row = connection.execute(
                "SELECT number, job FROM jobs WHERE id = ? AND tenant = ?", (id, tenant)
            ).fetchone()
            if row is None:
                raise NotFound("JOB_NOT_FOUND", f"there is no job {id!r}")
            return _with_ahead(connection, row)

    def page(self, tenant: str, before: int, size: int) -> list[tuple[int, Job, int]]:
        """Return at most `size` jobs with numbers below `before`, the newest first: each with its
        number, and with how many go before it."""
        with self._database.transaction() as connection:
            rows = connection.execute(
                "SELECT number, job FROM jobs WHERE tenant = ? AND number < ?"
                " ORDER BY number DESC LIMIT ?",
                (tenant, before, size),
            ).fetchall()
            return [(row["number"], *_with_ahead(connection, row)) for row in rows]

    def unended(self) -> list[Job]:
        """Return the jobs of all tenants that have not ended, the oldest first."""
        with self._database.transaction() as connection:
            rows = connection.execute(f"SELECT job FROM jobs WHERE {UNENDED} ORDER BY number")
            return [_job(row) for row in rows]

    def change(self, id: str, changes: Mapping[str, Any]) -> Job:
        """Change a job and return it as it is then. Raises Ended if it has ended."""
        with self._database.transaction() as connection:
            return _change(connection, _unended(connection, id), changes)

    def cancel(self, tenant: str, id: str) -> tuple[Job, bool]:
        """End a job as CANCELLED and return it; False if it was that before.

        Raises NotFound (JOB_NOT_FOUND), NotReady (JOB_ENDED).
        """
        job, _ = self.get(tenant, id)
        with self._database.transaction() as connection:
            row = connection.execute("SELECT job FROM jobs WHERE id = ?", (id,)).fetchone()
            job = _job(row)
            if job.state == "cancelled":
                return job, False
            if job.state in ENDED:
                raise NotReady("JOB_ENDED", f"the job has ended: it is {job.state.upper()}")
            return _change(connection, job, {"state": "cancelled", "adapter": ""}), True

    def progress(self, id: str, progress: Progress) -> None:
        """Note how far the training of a job has come. Raises Ended if the job has ended."""
        with self._database.transaction() as connection:
            job = replace(_unended(connection, id), progress=progress)
            connection.execute("UPDATE jobs SET job = ? WHERE id = ?", (_json(job), id))
            sequence = _add_event(connection, id, "progress", PROGRESS.dump_json(progress).decode())
            connection.execute(
                "DELETE FROM events WHERE job = ? AND kind = 'progress' AND sequence <= ?",
                (id, sequence - PROGRESS_KEPT),
            )

    def last(self, id: str) -> int:
        """Return the number of a job's latest event."""
        with self._database.transaction() as connection:
            return _last(connection, id)

    def events(self, id: str, after: int, most: int) -> list[Event]:
        """Return at most `most` events of a job behind the one numbered `after`, in order."""
        with self._database.transaction() as connection:
            rows = connection.execute(
                "SELECT sequence, time, kind, value FROM events WHERE job = ? AND sequence > ?"
                " ORDER BY sequence LIMIT ?",
                (id, after, most),
            ).fetchall()
        return [Event(row["sequence"], row["time"], _value(row)) for row in rows]

    def adapters_of(self, job: Job) -> list[str]:
        """Return the adapters that a job registered and that are not deleted."""
        with self._database.transaction() as connection:
            rows = connection.execute(
                "SELECT id FROM adapters WHERE tenant = ? AND deleted = 0"
                " AND json_extract(adapter, '$.adapter.job') = ?",
                (job.tenant, job.id),
            )
            return [row["id"] for row in rows]


def queue_full(most: int) -> Overloaded:
    return Overloaded("QUEUE_FULL", f"{most} jobs wait already; try again later")


def _of_key(connection: Connection, tenant: str, key: str) -> Any:
    if not key:
        return None
    return connection.execute(
        "SELECT job, upload_hash FROM jobs WHERE tenant = ? AND idempotency_key = ?", (tenant, key)
    ).fetchone()


def _same(connection: Connection, tenant: str, key: str, upload_hash: str) -> Job | None:
    row = _of_key(connection, tenant, key)
    if row is None:
        return None
    if row["upload_hash"] != upload_hash:
        raise AlreadyExists(
            "IDEMPOTENCY_KEY_REUSED", "this idempotency key came with another upload before"
        )
    return _job(row)


def _queued(connection: Connection) -> int:
    [count] = connection.execute("SELECT count(*) FROM jobs WHERE state = 'queued'").fetchone()
    return int(count)


def _with_ahead(connection: Connection, row: Any) -> tuple[Job, int]:
    job = _job(row)
    if job.state != "queued":
        return job, 0
    [ahead] = connection.execute(
        f"SELECT count(*) FROM jobs WHERE number < ? AND {UNENDED}", (row["number"],)
    ).fetchone()
    return job, int(ahead)


def _unended(connection: Connection, id: str) -> Job:
    row = connection.execute("SELECT job FROM jobs WHERE id = ?", (id,)).fetchone()
    job = _job(row)
    if job.state in ENDED:
        raise Ended
    return job


def _change(connection: Connection, job: Job, changes: Mapping[str, Any]) -> Job:
    now = time.time()
    left = job.state == "queued" and changes.get("state") != "queued"
    ended = changes.get("state") in ENDED
    job = replace(job, **changes)
    if left and not ended:
        job = replace(job, started=now)
    if ended:
        job = replace(job, ended=now)
    connection.execute(
        "UPDATE jobs SET state = ?, job = ? WHERE id = ?", (job.state, _json(job), job.id)
    )
    _add_event(connection, job.id, "state", _json(job), now)
    return job


def _add_event(
    connection: Connection,
    id: str,
    kind: Literal["state", "progress"],
    value: str,
    now: float | None = None,
) -> int:
    sequence = _last(connection, id) + 1
    connection.execute(
        "INSERT INTO events (job, sequence, time, kind, value) VALUES (?, ?, ?, ?, ?)",
        (id, sequence, now or time.time(), kind, value),
    )
    return sequence


def _last(connection: Connection, id: str) -> int:
    [last] = connection.execute("SELECT max(sequence) FROM events WHERE job = ?", (id,)).fetchone()
    return int(last or 0)


def _value(row: Any) -> Job | Progress:
    if row["kind"] == "progress":
        return PROGRESS.validate_json(row["value"])
    return JOB.validate_json(row["value"])


def _job(row: Any) -> Job:
    return JOB.validate_json(row["job"])


def _json(job: Job) -> str:
    return JOB.dump_json(job).decode()
