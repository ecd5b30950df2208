"""Threads that outlive no task: what they write to has an owner until they end."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """Run `function` as asyncio.to_thread does. A task that is cancelled meanwhile ends when the
    thread has ended, so that it may remove the files that the thread used."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *args))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        work.exception()  # nobody else asks for it
        raise
