"""Opens a channel to a service: balancing, health checks, retries, keepalive."""

import json
import os
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor_pb2 import MethodOptions
from google.protobuf.descriptor_pool import Default

from services.runtime.address import is_loopback
from services.runtime.renewing import Renewing
from services.runtime.tls import CertificateFolder, client_credentials, public_credentials

MEBIBYTE = 1024 * 1024
OPTIONS = {
    "grpc.max_receive_message_length": 32 * MEBIBYTE,
    # A frozen peer is noticed within 10 s. Without the ping's own timeout it never is, and without
    # leave to ping when nothing is sent it is not on a stream that was silent for a while.
    "grpc.keepalive_time_ms": 5_000,
    "grpc.keepalive_timeout_ms": 5_000,
    "grpc.http2.ping_timeout_ms": 5_000,
    "grpc.http2.max_pings_without_data": 0,
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.initial_reconnect_backoff_ms": 200,
    # What its name does not say: the time that TCP, TLS and HTTP/2 have to connect.
    "grpc.min_reconnect_backoff_ms": 5_000,
    "grpc.max_reconnect_backoff_ms": 5_000,
    # Channels of one process to one address would share a connection, and gRPC's health checks race
    # on it: the process dies of a null pointer when it reconnects (seen in 1.78.2).
    "grpc.use_local_subchannel_pool": 1,
    "grpc.enable_http_proxy": 0,  # a proxy for the web would get the calls to loopback as well
}

# One replica in four, at least one, gets no calls for a while if nearly all of its calls fail
# although it reports SERVING: it would take as many as the others. What the caller did wrong counts
# as well, and so does a full queue; hence "nearly all", and never more than that part.
OUTLIERS = {
    "interval": "5s",
    "baseEjectionTime": "5s",  # and as much longer each time in a row
    "maxEjectionTime": "60s",
    "maxEjectionPercent": 25,
    "failurePercentageEjection": {
        "threshold": 90,
        "enforcementPercentage": 100,
        "minimumHosts": 2,
        "requestVolume": 10,
    },
}


def connect(
    address: str,
    *services: str,
    tls: Path | None = None,
    key: str = "",
    ca: Path | None = None,
    public: bool = False,
) -> grpc.aio.Channel:
    """Return a channel to the services of these full names at `address` (HOST:PORT or a gRPC URI).

    The modules that describe them must be imported. Every replica behind the address gets its
    share; one that does not report the first name as SERVING gets none.

    `tls` is the folder with our own certificate, as ServerSettings.tls; whoever answers must be the
    first service by its certificate, wherever that is. With `public`, or a file `ca` of authorities
    (by default those of the system), whoever answers must be the host of the address. Without any
    of these nothing is encrypted. `key` goes with every call. Raises ValueError if the files cannot
    be used, and for a key that would go over a network in the clear, unless TWOROADS_INSECURE=1.
    """
    is_uri = "://" in address or address.startswith(("ipv4:", "ipv6:", "unix:"))
    target = address if is_uri else f"dns:///{address}"
    options: dict[str, Any] = {
        "grpc.service_config": json.dumps(_service_config(services)),
        "grpc.dns_min_time_between_resolutions_ms": round(_dns_seconds() * 1000),
        **OPTIONS,
    }
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    if tls:
        folder = CertificateFolder(tls)
        options["grpc.ssl_target_name_override"] = _word(services[0])

        def shown() -> grpc.aio.Channel:
            credentials = client_credentials(folder.current)
            return grpc.aio.secure_channel(target, credentials, [*options.items()])

        return Renewing(shown, folder.changed, metadata)
    if public or ca:
        credentials = public_credentials(ca)
        return Renewing(
            lambda: grpc.aio.secure_channel(target, credentials, [*options.items()]),
            metadata=metadata,
        )
    if key and not is_loopback(address) and os.environ.get("TWOROADS_INSECURE") != "1":
        raise ValueError(
            f"the key would go to {address} for all to read: use TLS, or set TWOROADS_INSECURE=1 if"
            " nobody else can listen"
        )
    return Renewing(
        lambda: grpc.aio.insecure_channel(target, [*options.items()]), metadata=metadata
    )


def _word(service: str) -> str:
    """Return the DNS name in the certificates of a service."""
    word = service.rpartition(".")[2].removesuffix("Service").lower()
    return "gateway" if word == "answer" else word


def _dns_seconds() -> float:
    """Return how long what a name stood for is believed, at least."""
    return float(os.environ.get("TWOROADS_DNS_SECONDS", "5"))


def _service_config(services: tuple[str, ...]) -> dict[str, object]:
    return {
        "loadBalancingConfig": [
            {"outlier_detection_experimental": OUTLIERS | {"childPolicy": [{"round_robin": {}}]}}
        ],
        "healthCheckConfig": {"serviceName": services[0]},
        # Covers the 50 calls that a replica may take with it when it dies; in a longer outage, one
        # retry for ten answers.
        "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
        "methodConfig": [
            {
                "name": [name for service in services for name in _retryable(service)],
                "retryPolicy": {
                    "maxAttempts": 3,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "0.5s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
    }


def _retryable(service: str) -> list[dict[str, str]]:
    """Reads, and streams of text, which gRPC retries only before their first message."""
    methods = Default().FindServiceByName(service).methods
    return [
        {"service": service, "method": method.name}
        for method in methods
        if method.GetOptions().idempotency_level == MethodOptions.NO_SIDE_EFFECTS
        or method.name == "Generate"
    ]
