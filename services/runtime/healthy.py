"""`python -m services.runtime.healthy HOST:PORT` exits with 0 if the server serves, else with 1.

For images, which have no other program that could ask.
"""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SECONDS = 3.0


def is_healthy(address: str, seconds: float = SECONDS) -> bool:
    """Return whether a server reports within `seconds` that it serves. Blocks."""
    options = [("grpc.enable_http_proxy", 0)]  # a proxy for the web would get the question
    with grpc.insecure_channel(address, options) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=seconds
            )
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    sys.exit(not is_healthy(sys.argv[1]))
