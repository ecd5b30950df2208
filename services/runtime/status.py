"""What a call that sends a stream really failed with."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import grpc

WRITE_FAILED = "Internal error from Core"  # the details that gRPC makes up
SECONDS = 1.0


@asynccontextmanager
async def real_status(call: grpc.aio.Call) -> AsyncIterator[None]:
    """Raise what the service said if it ended `call` while that was still being sent.

    gRPC then fails to write, makes INTERNAL of that, and lets it hide the status that the service
    sent, whichever of them comes first (seen in 1.78.2). Only failures are found again: a service
    reads a stream to its end before it answers with OK.
    """
    said: asyncio.Future[grpc.aio.AioRpcError] = asyncio.get_running_loop().create_future()

    def note(ended: grpc.aio.Call) -> None:  # called for each status that replaces the one before
        code, details = now(ended.code()), now(ended.details())
        if code is not grpc.StatusCode.OK and details != WRITE_FAILED and not said.done():
            trailing = now(ended.trailing_metadata())
            said.set_result(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details))

    call.add_done_callback(note)
    try:
        yield
    except grpc.aio.AioRpcError as error:
        if error.details() != WRITE_FAILED:
            raise
        await asyncio.wait([said], timeout=SECONDS)
        raise (said.result() if said.done() else error) from None


def now(answer: Coroutine[Any, Any, Any]) -> Any:
    """Return what a coroutine of a call that has ended returns: it has nothing to wait for."""
    try:
        answer.send(None)
    except StopIteration as returned:
        return returned.value
    raise RuntimeError("the call has not ended")
