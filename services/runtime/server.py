"""Runs one service: health, reflection, interceptors, and a stop that drains."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.runtime import logs, metrics, tracing
from services.runtime.address import is_loopback
from services.runtime.admission import Admission
from services.runtime.gate import Gate, Inside, Open
from services.runtime.interceptors import CallInterceptor
from services.runtime.settings import ServerSettings
from services.runtime.tls import server_credentials

MEBIBYTE = 1024 * 1024
OPTIONS = {
    "grpc.max_receive_message_length": 16 * MEBIBYTE,
    "grpc.so_reuseport": 0,  # a taken port is an error, not a second server behind it
    # Clients ping every 5 s (channel.py); the default minimum would end such a connection.
    "grpc.http2.min_ping_interval_without_data_ms": 2_000,
    "grpc.keepalive_permit_without_calls": 1,
    # A caller that froze or was cut off would hold its streams for two hours.
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 10_000,
    "grpc.http2.ping_timeout_ms": 10_000,
    "grpc.http2.max_pings_without_data": 0,
    # gRPC looks at the size of a message when it is unpacked: a stranger's 16 MiB would become 16
    # GiB. So no message may be compressed: 1 is the algorithm that leaves it as it is.
    "grpc.compression_enabled_algorithms_bitset": 1,
    # Of one connection: more than are ever worked on, but no end of health checks.
    "grpc.max_concurrent_streams": 1024,
}

log = logging.getLogger(__name__)


class Server:
    """A server that answers health from the start and calls once `serve` gave it a servicer."""

    def __init__(
        self,
        settings: ServerSettings,
        server: grpc.aio.Server,
        calls: CallInterceptor,
        names: Sequence[str],
        port: int,
        metrics_port: int | None,
    ) -> None:
        self.port = port
        self.metrics_port = metrics_port
        self.health_port: int | None = None
        self.health = health.aio.HealthServicer()
        self._settings = settings
        self._server = server
        self._calls = calls
        self._names = names
        self._stop = asyncio.Event()

    async def serve(self, *add_to_server: Callable[[grpc.aio.Server], None]) -> None:
        """Register the servicers and report SERVING."""
        for add in add_to_server:
            add(self._server)
        self._calls.serving = True
        await self.report(health_pb2.HealthCheckResponse.SERVING)

    async def report(self, status: Any) -> None:
        """Set the health of every name of this server."""
        for name in ("", *self._names):
            await self.health.set(name, status)

    def stop(self) -> None:
        """Make `until_stopped` return."""
        self._stop.set()

    async def stopping(self) -> None:
        """Return when the stop begins, while calls still run."""
        await self._stop.wait()

    async def until_stopped(self) -> None:
        """Return on `stop`, SIGTERM or SIGINT, when the calls have ended and what they use may be
        closed. A second signal ends the process at once."""
        loop = asyncio.get_running_loop()

        def on_signal() -> None:
            if self._stop.is_set():
                os._exit(130)
            self._stop.set()

        for sig in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sig, on_signal)
        log.info("%s serves on port %d", self._names[0], self.port)
        await self._stop.wait()
        await self.drain()

    async def drain(self) -> None:
        """Refuse new calls, let the running ones end within the grace, then close."""
        await self.health.enter_graceful_shutdown()
        if self._calls.serving:
            await asyncio.sleep(self._settings.drain_seconds)
        self._calls.serving = False
        # Not gRPC's own grace: that waits for those who watch the health, and they never leave.
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.grace_seconds):
                await self._calls.ended()
        await self._server.stop(None)


@asynccontextmanager
async def running(
    settings: ServerSettings,
    names: Sequence[str],
    gate: Gate | None = None,
    *,
    public_tls: Path | None = None,
) -> AsyncIterator[Server]:
    """Listen while the block runs, then drain. `names` are the full names of the services.

    Without a `gate`, or with `Inside`, the server is for our own services alone: `settings.tls` is
    its certificate, and callers must have one. With another gate it is for clients: `public_tls` is
    its certificate, in a folder with tls.crt and tls.key, and callers need none.

    Health is NOT_SERVING until `Server.serve`; calls are refused with UNAVAILABLE until then.
    Raises OSError if an address is taken, ValueError if certificates cannot be used or if it would
    serve other machines unguarded.
    """
    admission = Admission(settings.max_running, settings.max_waiting)
    gate = gate or Inside(settings.callers)
    inside = isinstance(gate, Inside)
    tls = settings.tls if inside else public_tls
    _refuse_exposure(settings, gate, tls)
    if tls:
        metrics.certificate("inside" if inside else "public", tls / "tls.crt")
    calls = CallInterceptor(admission, gate)
    with metrics.serving(settings.metrics) as metrics_port:
        grpc_server = grpc.aio.server(
            interceptors=[calls],
            options=[
                *OPTIONS.items(),
                # A connection that lives for ever never learns of new replicas nor certificates.
                # Calls on an old one may end in their own time, however long that is: the grace is
                # unlimited by default.
                ("grpc.max_connection_age_ms", round(settings.connection_age_seconds * 1000)),
            ],
        )
        credentials = server_credentials(tls, mutual=inside) if tls else None
        port = _add_port(grpc_server, settings.listen, credentials)
        server = Server(settings, grpc_server, calls, names, port, metrics_port)
        health_pb2_grpc.add_HealthServicer_to_server(server.health, grpc_server)
        reflection.enable_server_reflection(
            (*names, health.SERVICE_NAME, reflection.SERVICE_NAME), grpc_server
        )
        await server.report(health_pb2.HealthCheckResponse.NOT_SERVING)
        async with _health_alone(server, settings.health):
            await grpc_server.start()
            try:
                yield server
            finally:
                await server.drain()


@asynccontextmanager
async def _health_alone(server: Server, address: str) -> AsyncIterator[None]:
    """Answer health checks at an address of their own, where probes need no certificate."""
    if not address:
        yield
        return
    grpc_server = grpc.aio.server(options=[*OPTIONS.items()])
    server.health_port = _add_port(grpc_server, address)
    health_pb2_grpc.add_HealthServicer_to_server(server.health, grpc_server)
    await grpc_server.start()
    try:
        yield
    finally:
        await grpc_server.stop(None)


def _add_port(server: grpc.aio.Server, address: str, credentials: Any = None) -> int:
    try:
        if credentials:
            port: int = server.add_secure_port(address, credentials)
        else:
            port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: is the port taken?") from error
    return port


def _refuse_exposure(settings: ServerSettings, gate: Gate, tls: Path | None) -> None:
    """Raise ValueError if other machines could call and nothing would tell who they are."""
    if settings.insecure or is_loopback(settings.listen):
        return
    if isinstance(gate, Open):
        missing = "nothing tells who calls: name a file of keys, or who issues tokens (--jwt-keys)"
    elif tls:
        return
    elif isinstance(gate, Inside):
        missing = "nothing tells who calls: name a folder of certificates (--tls)"
    else:
        missing = "keys would travel in the clear: name a folder with a certificate (--public-tls)"
    raise ValueError(
        f"{settings.listen} serves other machines, and {missing}, listen on 127.0.0.1,"
        " or say --insecure"
    )


def run(main: Callable[[], Coroutine[Any, Any, None]], settings: ServerSettings) -> None:
    """Run a service's `main` to its end. What stops it is logged, and the exit code is 1."""
    logs.configure(settings.log_level)
    try:
        with tracing.exporting(_word(settings), settings.traces):
            uvloop.run(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        log.critical("stopped: %s", error, exc_info=True)
        sys.exit(1)


def _word(settings: ServerSettings) -> str:
    """Return the service's short word, which its package and its settings have as name."""
    return type(settings).__module__.split(".")[:2][-1]
