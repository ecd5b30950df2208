"""A LanceDB table that looks after itself: one writer at a time, indexed in the background."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta

import pyarrow as pa
from lancedb import AsyncTable
from lancedb.index import IvfFlat
from lancedb.query import AsyncQueryBase

from services.runtime.errors import NotFound, Overloaded, Unavailable

log = logging.getLogger(__name__)

EXACT_ROWS = 50_000  # up to here a vector search compares with every row: some 10 ms in 10,000 rows
QUIET_SECONDS = 1.0
MANY_WRITES = 64  # every write adds a file
MANY_ROWS = 1000  # full-text search reads rows that are not in the index yet: 30 ms in so many
SHARE = 0.1  # of the rows: tidying rewrites the table, so a large one is tidied less often
KEEP = timedelta(minutes=1)  # for searches that still read an older state of the table

FULL = ("No space left", "File too large", "quota exceeded")


@contextmanager
def translated() -> Iterator[None]:
    """Translate the exceptions of LanceDB, which tells them apart by their texts alone."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        if any(sign in str(error) for sign in FULL):
            raise Overloaded("STORE_FULL", "the disk of the store is full") from error
        log.warning("LanceDB failed", exc_info=True)
        raise Unavailable("STORE_UNAVAILABLE", "the store failed; try again") from error


class Table:
    """A table with the schema that it has now. Close it with `close` or `retire`."""

    def __init__(self, lance: AsyncTable, schema: pa.Schema) -> None:
        self.lance = lance
        self.schema = schema
        self._retired = False
        self._lock = asyncio.Lock()
        self._upkeep: asyncio.Task[None] | None = None
        self._rows = self._writes = 0
        self._tidied_rows = 0
        self._timer = asyncio.get_running_loop().call_later(QUIET_SECONDS, self._tidy_soon)

    @classmethod
    async def opened(cls, lance: AsyncTable) -> "Table":
        """Wrap an open table."""
        return cls(lance, await lance.schema())

    @asynccontextmanager
    async def writing(self, rows: int = 0) -> AsyncIterator[None]:
        """Hold the table while `rows` are written: LanceDB lets writers that change the same rows
        or the columns fail. Raises NotFound if the table was dropped meanwhile."""
        async with self._lock:
            if self._retired:
                raise NotFound("CORPUS_NOT_FOUND", "the corpus was deleted")
            yield
        self._rows += rows
        self._writes += 1
        if self._writes >= MANY_WRITES or self._rows >= max(MANY_ROWS, SHARE * self._tidied_rows):
            self._tidy_soon()
        else:
            self._timer.cancel()
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(QUIET_SECONDS, self._tidy_soon)

    async def add_columns(self, fields: list[pa.Field]) -> None:
        """Add columns, empty. To be called while writing."""
        if fields:
            await self.lance.add_columns(fields)
            self.schema = await self.lance.schema()

    async def read(self, query: AsyncQueryBase) -> pa.Table:
        """Return the rows of a query.

        A query whose caller is cancelled runs to its end all the same: LanceDB shares what it
        loads, and if the one that loads is broken off, those that wait for it may wait forever.
        """
        reading = asyncio.ensure_future(_rows(query))
        reading.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return await asyncio.shield(reading)

    async def tidy(self) -> None:
        """Join small files, index new rows, and index the vectors of a table that outgrew an exact
        search. Happens by itself after writes."""
        async with self._lock:
            self._rows = self._writes = 0
            await self.lance.optimize(cleanup_older_than=KEEP)
        self._tidied_rows = await self.lance.count_rows()
        if self._tidied_rows > EXACT_ROWS and "vector" in self.schema.names:
            if not any("vector" in index.columns for index in await self.lance.list_indices()):
                await self.lance.create_index("vector", config=IvfFlat(distance_type="cosine"))

    async def close(self) -> None:
        """Stop the upkeep."""
        self._retired = True
        self._timer.cancel()
        if self._upkeep:
            self._upkeep.cancel()
            with suppress(asyncio.CancelledError):
                await self._upkeep

    async def retire(self) -> None:
        """Stop the upkeep, let the writer that writes finish, and refuse those that come."""
        await self.close()
        async with self._lock:
            self.lance.close()  # type: ignore[no-untyped-call]

    def _tidy_soon(self) -> None:
        self._timer.cancel()
        if not self._retired and (self._upkeep is None or self._upkeep.done()):
            self._upkeep = asyncio.create_task(self._tidy_quietly())

    async def _tidy_quietly(self) -> None:
        try:
            await self.tidy()
        except (RuntimeError, OSError):  # the next write tries again
            log.warning("a table could not be tidied", exc_info=True)


async def _rows(query: AsyncQueryBase) -> pa.Table:
    try:
        return await query.to_arrow()
    except (RuntimeError, OSError):  # a file that tidying removed just then; not so again
        return await query.to_arrow()
