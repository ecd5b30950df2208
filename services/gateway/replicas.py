"""The replicas of generation: how many there are, and how busy each is."""

import asyncio
import socket
import time
from collections.abc import Callable

import grpc
from tworoads.v1 import answer_pb2 as pb
from tworoads.v1.generation_pb2 import GenerationServiceGetModelRequest
from tworoads.v1.generation_pb2_grpc import GenerationServiceStub

from services.runtime.call import outgoing

LOOK_SECONDS = 1.5
KEPT_SECONDS = 1.0  # many who ask at once cost one look


class Replicas:
    """Looks at every replica behind `target` (HOST:PORT or dns:///HOST:PORT) by a channel of its
    own, which `connect` opens for an address."""

    def __init__(self, target: str, connect: Callable[[str], grpc.aio.Channel]) -> None:
        self._host, _, self._port = target.removeprefix("dns:///").rpartition(":")
        self._connect = connect
        self._looking = asyncio.Lock()
        self._looked = -KEPT_SECONDS
        self._seen: list[pb.Replica] = []

    async def look(self) -> list[pb.Replica]:
        """Return the replicas, numbered: their addresses are nobody's business. Raises TooLate."""
        async with self._looking:
            if time.monotonic() - self._looked > KEPT_SECONDS:
                asked = map(self._ask, enumerate(await self._addresses(), 1))
                self._seen = list(await asyncio.gather(*asked))
                self._looked = time.monotonic()
            return self._seen

    async def _addresses(self) -> list[str]:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(
                self._host.strip("[]"), self._port, type=socket.SOCK_STREAM
            )
        except OSError:
            return []
        addresses = {(family, sockaddr[0]) for family, _, _, _, sockaddr in found}
        return [
            f"ipv6:[{host}]:{self._port}"
            if family == socket.AF_INET6
            else f"ipv4:{host}:{self._port}"
            for family, host in sorted(addresses)
        ]

    async def _ask(self, numbered: tuple[int, str]) -> pb.Replica:
        number, address = numbered
        replica = pb.Replica(name=f"generation-{number}")
        async with self._connect(address) as channel:
            try:
                model = await GenerationServiceStub(channel).GetModel(
                    GenerationServiceGetModelRequest(), **outgoing(LOOK_SECONDS)
                )
            except grpc.aio.AioRpcError:
                return replica
        replica.ready = True
        replica.running = model.running
        replica.waiting = model.waiting
        replica.cache_use = model.cache_use
        return replica
