"""Asks services whether they are ready."""

import asyncio
import urllib.request
from collections.abc import AsyncGenerator
from contextlib import aclosing

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
POLL_SECONDS = 0.3
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never by a proxy
OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5000),  # the time that a connection has to be made
    ("grpc.max_reconnect_backoff_ms", 300),
]


async def watch(address: str, health: str) -> AsyncGenerator[bool, None]:
    """Yield whether a service is ready when it says so, at each change or more often, for ever.

    `health` is the full name of a gRPC service at `address`, or a URL that answers 200 when ready.
    """
    if health.startswith("http"):
        while True:
            yield await asyncio.to_thread(_answers, health)
            await asyncio.sleep(POLL_SECONDS)
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while True:
            try:
                async for answer in stub.Watch(
                    health_pb2.HealthCheckRequest(service=health), wait_for_ready=True
                ):
                    yield answer.status == SERVING
            except grpc.aio.AioRpcError:
                pass  # not up yet, or the connection has reached its greatest age
            await asyncio.sleep(POLL_SECONDS)


async def is_ready(address: str, health: str, timeout: float = 2.0) -> bool:
    """Return whether a service says within `timeout` seconds that it is ready."""
    try:
        async with asyncio.timeout(timeout), aclosing(watch(address, health)) as answers:
            return await anext(answers)
    except TimeoutError:
        return False


def _answers(url: str) -> bool:
    try:
        with DIRECT.open(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False
