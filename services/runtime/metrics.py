"""Prometheus metrics that every service has. Labels take few values: never a tenant, never text."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import nan
from pathlib import Path

from prometheus_client import Counter, Gauge, Histogram, start_http_server

CALLS = Counter("tworoads_calls", "Calls that ended.", ["method", "code"])
SECONDS = Histogram(
    "tworoads_call_seconds",
    "Time from a call's arrival to its end, in seconds.",
    ["method"],
    buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
RUNNING = Gauge("tworoads_calls_running", "Calls that are worked on.", ["method"])
WAITING = Gauge("tworoads_calls_waiting", "Calls that wait for others to end.")
ERRORS = Counter("tworoads_call_errors", "Calls that ended with a reason for it.", ["reason"])
WORK = Gauge("tworoads_work", "Jobs or comparisons that have not ended.", ["kind", "state"])
WORK_ENDED = Counter("tworoads_work_ended", "Jobs or comparisons that ended.", ["kind", "state"])
EXPIRY = Gauge(
    "tworoads_certificate_expiry_seconds",
    "When the certificate that is shown ends, in seconds since 1970.",
    ["side"],
)

UNSERVED = Counter(
    "tworoads_unserved",
    "Calls to another service that failed because no replica of it answered.",
    ["service"],
)
for _service in ("embedding", "retrieval", "generation", "tuning", "evaluation"):
    UNSERVED.labels(_service)  # from the start: what goes up must have been zero to be seen


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


def certificate(side: str, file: Path) -> None:
    """Tell when a certificate, PEM in a file that may be replaced, ends. `side` is inside or
    public."""
    from cryptography.x509 import load_pem_x509_certificate  # only where there is TLS

    def expiry() -> float:
        try:
            shown = load_pem_x509_certificate(file.read_bytes())
            return shown.not_valid_after_utc.timestamp()
        except (OSError, ValueError):
            return nan

    EXPIRY.labels(side).set_function(expiry)


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
