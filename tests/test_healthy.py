"""The question that a container's health check asks."""

import asyncio
import sys

import pytest

from clients.stack import free_addresses
from services.runtime.server import running
from services.runtime.settings import ServerSettings
from tests.probe import NAMES, handlers


async def ask(address: str) -> int | None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "services.runtime.healthy", address
    )
    return await asyncio.wait_for(process.wait(), 20)


@pytest.mark.parametrize(("serving", "status"), [(True, 0), (False, 1)])
async def test_a_server_is_healthy_while_it_serves(serving: bool, status: int) -> None:
    async with running(ServerSettings(grace_seconds=0), NAMES) as server:
        if serving:
            await server.serve(handlers())
        assert await ask(f"127.0.0.1:{server.port}") == status


async def test_where_nobody_listens_nobody_is_healthy() -> None:
    [address] = free_addresses(1)
    assert await ask(address) == 1
