"""A name server on loopback for one name, whose addresses a test changes."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

HEADER = struct.Struct("!HHHHHH")  # RFC 1035, 4.1.1: id, flags, and the counts of four sections
ANSWER = struct.Struct("!HHHIH")  # 4.1.3: name, type, class, seconds to live, length of the data
QUESTION_NAME = 0xC00C  # 4.1.4: "the name that stands behind the header"
TYPE_A, CLASS_IN, SECONDS_TO_LIVE = 1, 1, 1
IS_ANSWER, NO_SUCH_NAME = 0x8180, 3


class DnsServer(asyncio.DatagramProtocol):
    """Answers every question for an address with `addresses`; without any there is no such name.

    `asked` counts the questions for IPv4 addresses.
    """

    def __init__(self, addresses: Iterable[str] = ()) -> None:
        self.addresses = list(addresses)
        self.asked = 0
        self.port = 0

    def target(self, port: int) -> str:
        """Return the gRPC target that asks this server for the hosts of a port."""
        return f"dns://127.0.0.1:{self.port}/generation.test:{port}"

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self.port = transport.get_extra_info("sockname")[1]

    def datagram_received(self, data: bytes, sender: Any) -> None:
        end = data.index(b"\0", HEADER.size) + 5
        number, question = data[:2], data[HEADER.size : end]
        (kind,) = struct.unpack_from("!H", data, end - 4)
        addresses = self.addresses if kind == TYPE_A else []
        self.asked += kind == TYPE_A
        flags = IS_ANSWER if self.addresses else IS_ANSWER | NO_SUCH_NAME
        header = HEADER.pack(*struct.unpack("!H", number), flags, 1, len(addresses), 0, 0)
        answers = [
            ANSWER.pack(QUESTION_NAME, TYPE_A, CLASS_IN, SECONDS_TO_LIVE, 4) + socket.inet_aton(ip)
            for ip in addresses
        ]
        self._transport.sendto(b"".join([header, question, *answers]), sender)


@asynccontextmanager
async def dns_server(*addresses: str) -> AsyncIterator[DnsServer]:
    """Answer on a free port of the loopback interface while the block runs."""
    loop = asyncio.get_running_loop()
    transport, server = await loop.create_datagram_endpoint(
        lambda: DnsServer(addresses), local_addr=("127.0.0.1", 0)
    )
    try:
        yield server
    finally:
        transport.close()
