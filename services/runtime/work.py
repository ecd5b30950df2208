"""Queued work and its events in the database. Everything here blocks: not for the event loop.

A kind of work has a noun, such as "job": it names the tables and is in reasons and messages.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from sqlite3 import Connection
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

from pydantic import TypeAdapter

from services.runtime.database import Database
from services.runtime.errors import AlreadyExists, NotFound, NotReady, Overloaded

PROGRESS_KEPT = 1000  # events back from the newest: older progress of a work is forgotten


class Work(Protocol):
    """What can be queued: a frozen dataclass with these fields and with `progress`, which is None
    at first. Its states are "queued", "failed", "cancelled" and others; `started` and `ended` are
    seconds since 1970, 0 before."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def id(self) -> str: ...
    @property
    def tenant(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def message(self) -> str: ...
    @property
    def started(self) -> float: ...
    @property
    def ended(self) -> float: ...


W = TypeVar("W", bound=Work)
P = TypeVar("P")


def schema(noun: str) -> str:
    """Return the SQL of the tables of a kind of work."""
    return f"""
CREATE TABLE {noun}s (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    state TEXT NOT NULL,
    idempotency_key TEXT NOT NULL,
    upload_hash TEXT NOT NULL,
    {noun} TEXT NOT NULL
);
CREATE UNIQUE INDEX keys ON {noun}s (tenant, idempotency_key) WHERE idempotency_key != '';
CREATE TABLE events (
    {noun} TEXT NOT NULL REFERENCES {noun}s (id),
    sequence INTEGER NOT NULL,
    time REAL NOT NULL,
    kind TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY ({noun}, sequence)
) WITHOUT ROWID;
"""


class Ended(Exception):
    """The work has ended meanwhile: nothing about it changes any more."""


@dataclass(frozen=True)
class Event(Generic[W, P]):
    """Something that happened to a work, at `time` in seconds since 1970."""

    sequence: int
    time: float
    value: W | P


class WorkStore(Generic[W, P]):
    """Keeps one kind of work. A change of it and its event are one transaction.

    `ended` are the states that are left no more. `undone` is what fields become when work fails or
    is cancelled. Reasons begin with the noun in capitals, such as JOB_NOT_FOUND. Every method may
    raise Overloaded (STORE_FULL).
    """

    def __init__(
        self,
        database: Database,
        noun: str,
        work: TypeAdapter[W],
        progress: TypeAdapter[P],
        ended: frozenset[str],
        undone: Mapping[str, Any] | None = None,
    ) -> None:
        self.noun = noun
        self.ended = ended
        self._database = database
        self._work = work
        self._progress = progress
        self._undone = undone or {}
        self._unended = f"state NOT IN ({', '.join(repr(state) for state in sorted(ended))})"

    def known(self, tenant: str, key: str) -> bool:
        """Say whether an idempotency key is taken."""
        with self._database.transaction() as connection:
            return self._of_key(connection, tenant, key) is not None

    def same(self, tenant: str, key: str, upload_hash: str) -> W | None:
        """Return the work that an upload with this key made before, None for an empty or new key.

        Raises AlreadyExists (IDEMPOTENCY_KEY_REUSED) if the upload had other content.
        """
        with self._database.transaction() as connection:
            return self._same(connection, tenant, key, upload_hash)

    def add(self, work: W, key: str, upload_hash: str, most_queued: int) -> W:
        """Queue work, or return the one that `same` returns.

        Raises as `same` does, and Overloaded (QUEUE_FULL) if `most_queued` of the tenant's wait.
        """
        with self._database.transaction() as connection:
            if before := self._same(connection, work.tenant, key, upload_hash):
                return before
            if self._queued(connection).get(work.tenant, 0) >= most_queued:
                raise self.full(most_queued)
            connection.execute(
                f"INSERT INTO {self.noun}s"
                f" (id, tenant, state, idempotency_key, upload_hash, {self.noun})"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (work.id, work.tenant, work.state, key, upload_hash, self._json(work)),
            )
            self._add_event(connection, work.id, "state", self._json(work))
        return work

    def full(self, most: int) -> Overloaded:
        """Return what to raise when `most` wait."""
        return Overloaded("QUEUE_FULL", f"{most} {self.noun}s wait already; try again later")

    def queued(self, tenant: str) -> int:
        """Return how many of a tenant wait."""
        with self._database.transaction() as connection:
            return self._queued(connection).get(tenant, 0)

    def find(self, id: str) -> W | None:
        """Return work of any tenant, None if there is none of this id."""
        with self._database.transaction() as connection:
            return self._find(connection, id)

    def get(self, tenant: str, id: str) -> tuple[W, int]:
        """Return work, and how many go before it at most. Raises NotFound (..._NOT_FOUND)."""
        with self._database.transaction() as connection:
            row = connection.execute(
                f"SELECT number, {self.noun} FROM {self.noun}s WHERE id = ? AND tenant = ?",
                (id, tenant),
            ).fetchone()
            if row is None:
                raise self._not_found(id)
            return self._with_ahead(connection, row)

    def page(self, tenant: str, before: int, size: int) -> list[tuple[int, W, int]]:
        """Return at most `size` with numbers below `before`, the newest first: each with its
        number, and with how many go before it."""
        with self._database.transaction() as connection:
            rows = connection.execute(
                f"SELECT number, {self.noun} FROM {self.noun}s WHERE tenant = ? AND number < ?"
                " ORDER BY number DESC LIMIT ?",
                (tenant, before, size),
            ).fetchall()
            return [(row["number"], *self._with_ahead(connection, row)) for row in rows]

    def unended(self) -> list[W]:
        """Return the work of all tenants that has not ended, the oldest first."""
        with self._database.transaction() as connection:
            rows = connection.execute(
                f"SELECT {self.noun} FROM {self.noun}s WHERE {self._unended} ORDER BY number"
            )
            return [self._of(row) for row in rows]

    def change(self, id: str, changes: Mapping[str, Any], event: bool = True) -> W:
        """Change work and return it as it is then. Without an `event` those who watch see the
        change with the next one. Raises Ended if it has ended."""
        with self._database.transaction() as connection:
            return self._change(connection, self._going(connection, id), changes, event)

    def cancel(self, tenant: str, id: str) -> tuple[W, bool]:
        """End work as CANCELLED and return it; False if it was that before.

        Raises NotFound (..._NOT_FOUND), NotReady (..._ENDED).
        """
        with self._database.transaction() as connection:
            work = self._find(connection, id)
            if work is None or work.tenant != tenant:
                raise self._not_found(id)
            if work.state == "cancelled":
                return work, False
            if work.state in self.ended:
                raise NotReady(
                    f"{self.noun.upper()}_ENDED",
                    f"the {self.noun} has ended: it is {work.state.upper()}",
                )
            return self._change(connection, work, {"state": "cancelled"}), True

    def progress(self, id: str, progress: P) -> None:
        """Note how far work has come. Raises Ended if it has ended."""
        with self._database.transaction() as connection:
            changes: dict[str, Any] = {"progress": progress}
            work = replace(self._going(connection, id), **changes)
            connection.execute(
                f"UPDATE {self.noun}s SET {self.noun} = ? WHERE id = ?", (self._json(work), id)
            )
            value = self._progress.dump_json(progress).decode()
            sequence = self._add_event(connection, id, "progress", value)
            connection.execute(
                f"DELETE FROM events WHERE {self.noun} = ? AND kind = 'progress' AND sequence <= ?",
                (id, sequence - PROGRESS_KEPT),
            )

    def last(self, id: str) -> int:
        """Return the number of the latest event of a work."""
        with self._database.transaction() as connection:
            return self._last(connection, id)

    def events(self, id: str, after: int, most: int) -> list[Event[W, P]]:
        """Return at most `most` events of a work behind the one numbered `after`, in order."""
        with self._database.transaction() as connection:
            rows = connection.execute(
                "SELECT sequence, time, kind, value FROM events"
                f" WHERE {self.noun} = ? AND sequence > ? ORDER BY sequence LIMIT ?",
                (id, after, most),
            ).fetchall()
        return [Event(row["sequence"], row["time"], self._value(row)) for row in rows]

    def _of_key(self, connection: Connection, tenant: str, key: str) -> Any:
        if not key:
            return None
        return connection.execute(
            f"SELECT {self.noun}, upload_hash FROM {self.noun}s"
            " WHERE tenant = ? AND idempotency_key = ?",
            (tenant, key),
        ).fetchone()

    def _same(self, connection: Connection, tenant: str, key: str, upload_hash: str) -> W | None:
        row = self._of_key(connection, tenant, key)
        if row is None:
            return None
        if row["upload_hash"] != upload_hash:
            raise AlreadyExists(
                "IDEMPOTENCY_KEY_REUSED", "this idempotency key came with another upload before"
            )
        return self._of(row)

    def _queued(self, connection: Connection) -> dict[str, int]:
        """Return how many of each tenant wait."""
        return dict(
            tuple(row)
            for row in connection.execute(
                f"SELECT tenant, count(*) FROM {self.noun}s WHERE state = 'queued' GROUP BY tenant"
            )
        )

    def _with_ahead(self, connection: Connection, row: Any) -> tuple[W, int]:
        work = self._of(row)
        if work.state != "queued":
            return work, 0
        [begun] = connection.execute(
            f"SELECT count(*) FROM {self.noun}s WHERE state != 'queued' AND {self._unended}"
        ).fetchone()
        [own] = connection.execute(
            f"SELECT count(*) FROM {self.noun}s"
            " WHERE state = 'queued' AND tenant = ? AND number < ?",
            (work.tenant, row["number"]),
        ).fetchone()
        # Tenants take turns: each of the others goes once before each of these.
        others = [n for tenant, n in self._queued(connection).items() if tenant != work.tenant]
        return work, begun + own + sum(min(count, own + 1) for count in others)

    def _find(self, connection: Connection, id: str) -> W | None:
        row = connection.execute(
            f"SELECT {self.noun} FROM {self.noun}s WHERE id = ?", (id,)
        ).fetchone()
        return self._of(row) if row else None

    def _going(self, connection: Connection, id: str) -> W:
        work = self._find(connection, id)
        if work is None or work.state in self.ended:
            raise Ended
        return work

    def _not_found(self, id: str) -> NotFound:
        return NotFound(f"{self.noun.upper()}_NOT_FOUND", f"there is no {self.noun} {id!r}")

    def _change(
        self, connection: Connection, work: W, changes: Mapping[str, Any], event: bool = True
    ) -> W:
        now = time.time()
        state = changes.get("state", work.state)
        times: dict[str, Any] = {}
        if state in self.ended:
            times["ended"] = now
        elif work.state == "queued" and state != "queued":
            times["started"] = now
        undone = self._undone if state in ("failed", "cancelled") else {}
        work = replace(work, **{**changes, **times, **undone})
        connection.execute(
            f"UPDATE {self.noun}s SET state = ?, {self.noun} = ? WHERE id = ?",
            (work.state, self._json(work), work.id),
        )
        if event:
            self._add_event(connection, work.id, "state", self._json(work), now)
        return work

    def _add_event(
        self,
        connection: Connection,
        id: str,
        kind: Literal["state", "progress"],
        value: str,
        now: float | None = None,
    ) -> int:
        sequence = self._last(connection, id) + 1
        connection.execute(
            f"INSERT INTO events ({self.noun}, sequence, time, kind, value) VALUES (?, ?, ?, ?, ?)",
            (id, sequence, now or time.time(), kind, value),
        )
        return sequence

    def _last(self, connection: Connection, id: str) -> int:
        [last] = connection.execute(
            f"SELECT max(sequence) FROM events WHERE {self.noun} = ?", (id,)
        ).fetchone()
        return int(last or 0)

    def _value(self, row: Any) -> W | P:
        if row["kind"] == "progress":
            return self._progress.validate_json(row["value"])
        return self._work.validate_json(row["value"])

    def _of(self, row: Any) -> W:
        return self._work.validate_json(row[self.noun])

    def _json(self, work: W) -> str:
        return self._work.dump_json(work).decode()
