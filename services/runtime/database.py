"""What survives a restart besides files: one SQLite database of a service."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.runtime.errors import Overloaded

VERSION = 1


class Database:
    """One connection that all threads share, a transaction at a time."""

    def __init__(self, path: Path, schema: str) -> None:
        """Open the database, or make it by the SQL of `schema`.

        Raises ValueError if a newer version of it is there, which stays as it is.
        """
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._connection.row_factory = sqlite3.Row
        [found] = self._connection.execute("PRAGMA user_version").fetchone()
        if found > VERSION:
            self._connection.close()
            raise ValueError(f"{path} was written by a newer version of this service")
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        if found < VERSION:
            self._connection.executescript(f"BEGIN; {schema} PRAGMA user_version = 1; COMMIT;")

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Commit what the block does, or nothing of it.

        Raises Overloaded (STORE_FULL) when the disk is full. Blocks: not for the event loop.
        """
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException as error:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError) and "full" in str(error):
                    raise Overloaded("STORE_FULL", "the disk is full") from error
                raise

    def close(self) -> None:
        with self._lock:
            self._connection.close()
