"""Streams that go on after the connection broke."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Any

import grpc

from clients.uploads import Upload
from services.runtime.status import real_status

# Seconds before each new try of a stream that broke off, as long as none of them brings anything.
# A service that is started again is back within them.
WAITS = (0.25, 0.5, 1.0, 2.0, 4.0, 5.0, 5.0, 5.0, 5.0, 5.0)
TRIES_TO_SEND = 3


async def sent(
    method: Callable[[AsyncIterator[Any]], Any],
    requests: Callable[[], AsyncIterator[Any]],
    again: bool,
) -> AsyncGenerator[Any, None]:
    """Yield what a service answers to an upload, which is sent `again` if the connection breaks.

    The service has to know that it is the same upload; its answers may then come twice.
    """
    waits = iter(WAITS[: TRIES_TO_SEND - 1] if again else ())
    while True:
        upload = Upload(requests())
        call = method(upload.requests())
        try:
            async with real_status(call):
                with upload.raising():
                    async for response in call:
                        yield response
            return
        except grpc.aio.AioRpcError as error:
            wait = _before_the_next(waits, error)
        finally:
            call.cancel()
        await asyncio.sleep(wait)


async def resumed(call_again: Callable[[], Any]) -> AsyncGenerator[Any, None]:
    """Yield the responses of a stream, which is called again where it broke off.

    Before the first response gRPC itself tries again, so that what never answers fails at once.
    """
    waits: Iterator[float] = iter(())
    while True:
        call = call_again()
        try:
            async for response in call:
                waits = iter(WAITS)
                yield response
            return
        except grpc.aio.AioRpcError as error:
            wait = _before_the_next(waits, error)
        finally:
            call.cancel()
        await asyncio.sleep(wait)


def _before_the_next(waits: Iterator[float], error: grpc.aio.AioRpcError) -> float:
    """Return how long to wait before the next try, in seconds; raise the error if there is none."""
    wait = next(waits, None) if error.code() is grpc.StatusCode.UNAVAILABLE else None
    if wait is None:
        raise error
    return wait
