"""Opens a channel to a service: balancing, health checks, retries, keepalive."""

import json

import grpc
from google.protobuf.descriptor_pb2 import MethodOptions
from google.protobuf.descriptor_pool import Default

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
    "grpc.dns_min_time_between_resolutions_ms": 5_000,
    "grpc.initial_reconnect_backoff_ms": 200,
    "grpc.min_reconnect_backoff_ms": 200,
    "grpc.max_reconnect_backoff_ms": 5_000,
    # Channels of one process to one address would share a connection, and gRPC's health checks race
    # on it: the process dies of a null pointer when it reconnects (seen in 1.78.2).
    "grpc.use_local_subchannel_pool": 1,
    "grpc.enable_http_proxy": 0,  # a proxy for the web would get the calls to loopback as well
}


def connect(address: str, *services: str) -> grpc.aio.Channel:
    """Return a channel to the services of these full names at `address` (HOST:PORT or a gRPC URI).

    The modules that describe them must be imported. Every replica behind the address gets its
    share; one that does not report the first name as SERVING gets none.
    """
    is_uri = "://" in address or address.startswith(("ipv4:", "ipv6:", "unix:"))
    target = address if is_uri else f"dns:///{address}"
    return grpc.aio.insecure_channel(
        target,
        options=[
            ("grpc.service_config", json.dumps(_service_config(services))),
            *OPTIONS.items(),
        ],
    )


def _service_config(services: tuple[str, ...]) -> dict[str, object]:
    return {
        "loadBalancingConfig": [{"round_robin": {}}],
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
