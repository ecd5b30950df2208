"""What all uploads share, so that no tenant keeps out another: memory, and turns at the parser."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

BYTES_AT_ONCE = 128 * 1024 * 1024
LARGE_AT_ONCE = 4  # documents that arrive, of over 1 MiB


class Room:
    """A budget of bytes, of which a tenant has at most half. What is larger goes alone."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: Counter[str] = Counter()
        self._given = asyncio.Event()

    async def take(self, tenant: str, size: int) -> None:
        """Wait until there is room, and take it."""
        while self._is_full(tenant, size):
            self._given.clear()
            await self._given.wait()
        self._taken[tenant] += size

    def give(self, tenant: str, size: int) -> None:
        """Give back what was taken."""
        self._taken[tenant] -= size
        if not self._taken[tenant]:
            del self._taken[tenant]
        self._given.set()

    def _is_full(self, tenant: str, size: int) -> bool:
        mine, all = self._taken[tenant], self._taken.total()
        return (mine > 0 and mine + size > self._most // 2) or (all > 0 and all + size > self._most)


class Share:
    """What one upload has taken of a room."""

    def __init__(self, room: Room, tenant: str) -> None:
        self._room = room
        self._tenant = tenant
        self._taken = 0

    async def take(self, size: int) -> None:
        await self._room.take(self._tenant, size)
        self._taken += size

    def give(self, size: int) -> None:
        self._taken -= size
        self._room.give(self._tenant, size)

    def close(self) -> None:
        """Give back all that is left."""
        self.give(self._taken)


class Sharing:
    """`contents` is room for documents as they were sent, from their last byte to their commit;
    `texts` for what they say, from the parser on. A tenant may have `at_once` documents between
    the two: in the parser, in its queue, or waiting with their text for room."""

    def __init__(self, at_once: int) -> None:
        self.contents = Room(BYTES_AT_ONCE)
        self.texts = Room(BYTES_AT_ONCE)
        self._at_once = at_once
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._arriving: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)

    def turns(self, tenant: str) -> asyncio.Semaphore:
        """Return what to hold from before the parser until there is room for the text."""
        return self._turns.setdefault(tenant, asyncio.Semaphore(self._at_once))

    @asynccontextmanager
    async def receiving(self, tenant: str) -> AsyncIterator[None]:
        """Hold what a large document needs to arrive whole: of a tenant one does at a time."""
        async with self._arriving.setdefault(tenant, asyncio.Lock()), self._large:
            yield
