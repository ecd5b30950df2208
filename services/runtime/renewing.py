"""A channel that is made anew when it finds nobody, while the calls on the old one run on."""

import asyncio
import time
from collections.abc import Callable
from functools import partialmethod
from typing import Any

import grpc
from grpc import ChannelConnectivity

STALE_SECONDS = 1.0
LOOK_SECONDS = 5.0
POLL_SECONDS = 0.1


class Renewing(grpc.aio.Channel):
    """Calls go over what `make` returned last, each with `metadata` added.

    It is asked again when `stale` says so, which calls ask at most once a second. The new channel
    takes over when it is connected, or at once if the old one is not: certificates that the others
    do not know yet break nothing.

    It is asked again as well when a call finds nobody. gRPC itself asks for a name that has no
    address ever more rarely, at last every two minutes, and nothing can set that: a service that
    comes back from zero replicas would be found as late. So a new channel looks for it meanwhile;
    calls fail at once until it is connected.

    A channel that is dropped takes no call with it: gRPC frees it when its last call has ended.
    """

    def __init__(
        self,
        make: Callable[[], grpc.aio.Channel],
        stale: Callable[[], bool] = lambda: False,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> None:
        self._make = make
        self._stale = stale
        self._ask_at = time.monotonic() + STALE_SECONDS
        self._metadata = metadata
        self._channel = make()
        self._looking: asyncio.Task[None] | None = None
        self._taking_over: asyncio.Task[None] | None = None

    def _method(self, kind: str, *args: Any, **kwargs: Any) -> Any:
        def call(*request: Any, metadata: Any = None, **options: Any) -> Any:
            if self._metadata:
                metadata = (*(metadata or ()), *self._metadata)
            return getattr(self._now(), kind)(*args, **kwargs)(
                *request, metadata=metadata, **options
            )

        return call

    unary_unary = partialmethod(_method, "unary_unary")
    unary_stream = partialmethod(_method, "unary_stream")
    stream_unary = partialmethod(_method, "stream_unary")
    stream_stream = partialmethod(_method, "stream_stream")

    def get_state(self, try_to_connect: bool = False) -> ChannelConnectivity:
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()

    async def close(self, grace: float | None = None) -> None:
        for task in (self._looking, self._taking_over):
            if task:
                task.cancel()
        await self._channel.close(grace)

    async def __aenter__(self) -> "Renewing":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def _now(self) -> grpc.aio.Channel:
        now = time.monotonic()
        if now >= self._ask_at:
            self._ask_at = now + STALE_SECONDS
            if self._stale():
                self._renew()
        if self._found_nobody() and (self._looking is None or self._looking.done()):
            self._looking = asyncio.create_task(self._look())
        return self._channel

    def _renew(self) -> None:
        for task in (self._looking, self._taking_over):
            if task:
                task.cancel()
        new = self._make()
        if self._channel.get_state() is ChannelConnectivity.READY:
            self._taking_over = asyncio.create_task(self._take_over(new))
        else:
            self._channel = new

    async def _take_over(self, new: grpc.aio.Channel) -> None:
        while new.get_state(try_to_connect=True) is not ChannelConnectivity.READY:
            await asyncio.sleep(POLL_SECONDS)
        self._channel = new

    def _found_nobody(self) -> bool:
        return self._channel.get_state() is ChannelConnectivity.TRANSIENT_FAILURE

    async def _look(self) -> None:
        channel = self._make()
        end = asyncio.get_running_loop().time() + LOOK_SECONDS
        while self._found_nobody() and asyncio.get_running_loop().time() < end:
            if channel.get_state(try_to_connect=True) is ChannelConnectivity.READY:
                self._channel = channel
            await asyncio.sleep(POLL_SECONDS)
