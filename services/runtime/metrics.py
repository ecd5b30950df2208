"""Prometheus metrics of the calls that a server gets."""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import Counter, Gauge, Histogram, start_http_server

CALLS = Counter("tworoads_calls", "Calls that ended.", ["method", "code"])
SECONDS = Histogram(
    "tworoads_call_seconds",
    "Time from a call's arrival to its end, in seconds.",
    ["method"],
    buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
RUNNING = Gauge("tworoads_calls_running", "Calls that are worked on.", ["method"])


@contextmanager
def running(method: str) -> Iterator[None]:
    """Count a call as running while the block runs."""
    gauge = RUNNING.labels(method)
    gauge.inc()
    try:
        yield
    finally:
        gauge.dec()


def finished(method: str, code: str, seconds: float) -> None:
    """Count a call that ended with the status `code` after `seconds`."""
    CALLS.labels(method, code).inc()
    SECONDS.labels(method).observe(seconds)


@contextmanager
def serving(address: str) -> Iterator[int | None]:
    """Serve all metrics of this process at http://ADDRESS/metrics while the block runs.

    Yields the port; an empty address serves nothing and yields None. Raises OSError if the address
    is taken.
    """
    if not address:
        yield None
        return
    host, _, port = address.rpartition(":")
    try:
        server, thread = start_http_server(int(port), host.strip("[]"))
    except OSError as error:
        raise OSError(f"cannot serve metrics on {address}: {error.strerror}") from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
