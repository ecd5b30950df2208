"""How many calls a server works on at once, and how many may wait."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.runtime import metrics
from services.runtime.errors import Overloaded


class Admission:
    """At most `running` calls at once; `waiting` more wait in order; the rest are refused at once.

    gRPC's own `maximum_concurrent_rpcs` does not hold its limit in this version.
    """

    def __init__(self, running: int, waiting: int) -> None:
        self._free = asyncio.Semaphore(running)
        self._waiting = 0
        self._most_waiting = waiting

    @asynccontextmanager
    async def admit(self) -> AsyncIterator[None]:
        """Hold one place while the block runs. Raises Overloaded (QUEUE_FULL) if all are taken."""
        if self._free.locked() and self._waiting >= self._most_waiting:
            raise Overloaded("QUEUE_FULL", "the service is busy; try again later")
        self._waiting += 1
        try:
            with metrics.WAITING.track_inprogress():
                await self._free.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._free.release()
