"""The metrics API that the autoscaler asks, with values that a test sets.

In production an adapter answers it from Prometheus. Here a small server on loopback does, behind
the API server's aggregation layer, as adapters are.
"""

import base64
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.k8s.cluster import Cluster

GROUP, VERSION = "external.metrics.k8s.io", "v1beta1"
API = f"{GROUP}/{VERSION}"
API_SERVICE = f"{VERSION}.{GROUP}"
LISTING = {
    "kind": "APIResourceList",
    "groupVersion": API,
    "resources": [
        {"name": "any", "namespaced": True, "kind": "ExternalMetricValueList", "verbs": ["get"]}
    ],
}
HOST = "127.0.0.1"
SERVICE = "metrics"  # in the namespace default


class Metrics:
    """What the autoscaler is told: `total[metric]`. Any other metric is unknown (404)."""

    def __init__(self) -> None:
        self.total: dict[str, float] = {}

    def answer(self, path: str) -> dict[str, Any] | None:
        """Return the body for an API path, or None if there is nothing."""
        *_, last = path.split("/")
        if path == f"/apis/{API}":
            return LISTING
        value = self.total.get(last)
        if not path.startswith(f"/apis/{API}/") or value is None:
            return None
        item = {
            "metricName": last,
            "metricLabels": {},
            "timestamp": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "value": f"{value * 1000:.0f}m",
        }
        kind = "ExternalMetricValueList"
        return {"kind": kind, "apiVersion": API, "metadata": {}, "items": [item]}


@contextmanager
def metrics_api(cluster: Cluster) -> Iterator[Metrics]:
    """Answer the API of external metrics of the cluster while the block runs."""
    metrics = Metrics()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = metrics.answer(unquote(urlsplit(self.path).path))
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(found).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass  # the autoscaler asks every second

    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate = _certificate(cluster.folder / "metrics.pem")
    tls.load_cert_chain(cluster.folder / "metrics.pem")
    with ThreadingHTTPServer((HOST, 0), Handler) as server:
        server.daemon_threads = True
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            cluster.apply(_registration(server.server_port, certificate))
            api_service = f"apiservice/{API_SERVICE}"
            cluster.kubectl("wait", "--for=condition=Available", "--timeout=120s", api_service)
            yield metrics
        finally:
            server.shutdown()


def _registration(port: int, certificate: bytes) -> Iterator[dict[str, Any]]:
    """Yield what leads the API server to a port of loopback, where endpoints must not point."""
    yield {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": SERVICE, "namespace": "default"},
        "spec": {"type": "ExternalName", "externalName": HOST, "ports": [{"port": port}]},
    }
    yield {
        "apiVersion": "apiregistration.k8s.io/v1",
        "kind": "APIService",
        "metadata": {"name": API_SERVICE},
        "spec": {
            "group": GROUP,
            "version": VERSION,
            "service": {"name": SERVICE, "namespace": "default", "port": port},
            "caBundle": base64.b64encode(certificate).decode(),
            "groupPriorityMinimum": 100,
            "versionPriority": 100,
        },
    }


def _certificate(path: Path) -> bytes:
    """Write a certificate for the service, with its key, to `path`; return the certificate, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, SERVICE)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName(f"{SERVICE}.default.svc")]), critical=False
        )
        .sign(key, hashes.SHA256())
    ).public_bytes(serialization.Encoding.PEM)
    path.touch(0o600)
    path.write_bytes(
        certificate
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return certificate
