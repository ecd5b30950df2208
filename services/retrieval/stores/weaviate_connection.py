"""A connection to Weaviate that knows whether the server is there.

The client hides an outage: it tries again for 63 s, whatever its timeouts say. Here a watcher asks
the server all the time; while it is away calls fail at once, those that wait included.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Self

import httpx
import weaviate
from weaviate import WeaviateAsyncClient
from weaviate.classes.init import AdditionalConfig, Auth, Timeout
from weaviate.config import GrpcConfig
from weaviate.exceptions import WeaviateBaseError

from services.runtime import call
from services.runtime.errors import Overloaded, TooLate, Unavailable

log = logging.getLogger(__name__)
logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every question of the watcher
logging.getLogger("weaviate-client").setLevel(logging.CRITICAL)  # it writes down whole documents

READ_SECONDS = 10.0
WRITE_SECONDS = 60.0
PROBE_EVERY_SECONDS = 0.5
PROBE_SECONDS = 5.0  # a busy server may be slow to say that it is ready
CHANNEL_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5000),  # the time that a connection has to be made
    ("grpc.max_reconnect_backoff_ms", 1000),
]
FULL = ("read-only", "read only", "readonly", "no space left")
ABSENT = "tenant not found"


class TenantAbsent(Exception):
    """The Weaviate tenant does not exist."""


class WeaviateConnection:
    """Use as `async with WeaviateConnection.open(...) as connection`, then `connection.client`
    inside of `connection.reading()` or `connection.writing()`."""

    def __init__(
        self, client: WeaviateAsyncClient, prepare: Callable[[WeaviateAsyncClient], Awaitable[None]]
    ) -> None:
        self.client = client
        self._prepare = prepare
        self._ready, self._state = False, ""
        self._running: set[asyncio.Timeout] = set()

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        http_address: str,
        grpc_address: str,
        api_key: str,
        prepare: Callable[[WeaviateAsyncClient], Awaitable[None]],
    ) -> AsyncIterator[Self]:
        """Connect in the background if the server is away; see `WeaviateStore.open`. `prepare` is
        called whenever the server has come."""
        http_host, _, http_port = http_address.rpartition(":")
        grpc_host, _, grpc_port = grpc_address.rpartition(":")
        client = weaviate.use_async_with_custom(
            http_host=http_host,
            http_port=int(http_port),
            http_secure=False,
            grpc_host=grpc_host,
            grpc_port=int(grpc_port),
            grpc_secure=False,
            auth_credentials=Auth.api_key(api_key),
            additional_config=AdditionalConfig(
                timeout=Timeout(init=PROBE_SECONDS, query=WRITE_SECONDS, insert=WRITE_SECONDS),
                grpc_config=GrpcConfig(channel_options=CHANNEL_OPTIONS),
            ),
            skip_init_checks=True,  # they ask a package index for the newest version
        )
        connection = cls(client, prepare)
        await connection._probe()
        watcher = asyncio.create_task(connection._watch())
        try:
            yield connection
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
            await client.close()

    @asynccontextmanager
    async def reading(self, at_most: float = READ_SECONDS) -> AsyncIterator[WeaviateAsyncClient]:
        """Make calls inside, all within `at_most` seconds and the time of the current call.
        Translates what goes wrong; TenantAbsent if the tenant that was asked does not exist."""
        deadline = call.current.get().deadline
        remaining = at_most if deadline is None else deadline - time.monotonic() - call.MARGIN
        if not self._ready:
            raise self._away()
        try:
            async with asyncio.timeout(min(remaining, at_most)) as timeout:
                self._running.add(timeout)
                try:
                    yield self.client
                finally:
                    self._running.discard(timeout)
        except TimeoutError as error:
            if self._ready and remaining < at_most:
                raise TooLate("DEADLINE", "the time for this call is over") from error
            raise self._away() from error
        except (WeaviateBaseError, httpx.HTTPError) as error:
            raise translated(error) from error

    def writing(self) -> AbstractAsyncContextManager[WeaviateAsyncClient]:
        """As `reading`, with the time that a large import takes."""
        return self.reading(WRITE_SECONDS)

    def _away(self) -> Unavailable:
        return Unavailable("STORE_UNAVAILABLE", "the vector store is away; try again")

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(PROBE_EVERY_SECONDS)
            await self._probe()

    async def _probe(self) -> None:
        """Ask the server whether it is there; say so on the log when the answer is a new one."""
        state = "there"
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                if not self.client.is_connected():
                    await self.client.connect()
                if not await self.client.is_ready():
                    state = "away"
                elif not self._ready:
                    await self._prepare(self.client)
        except Exception as error:  # of the client, httpx, grpc: whatever it is, no call would work
            state = f"away: {type(error).__name__} {error}"
        if state != self._state:
            log.info("Weaviate is %s", state)
        self._state, self._ready = state, state == "there"
        if not self._ready:
            for timeout in self._running:
                if not timeout.expired():
                    timeout.reschedule(0)


def translated(error: Exception) -> Exception:
    """Return what to raise for an error of the client, which tells most apart by text alone."""
    text = str(error).lower()
    if any(sign in text for sign in FULL):
        return Overloaded("STORE_FULL", "the vector store is full")
    if ABSENT in text:
        return TenantAbsent()
    log.warning("Weaviate failed: %s", error)
    return Unavailable("STORE_UNAVAILABLE", "the vector store failed; try again")
