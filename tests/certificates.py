"""An authority for tests, and the folders that services read their certificates from."""

import os
import secrets
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


class Authority:
    """Signs certificates; `pem` is its own."""

    def __init__(self, name: str = "authority") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named(name)
        certificate = (
            _begun(self._name, self._name, self._key, days=1)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.pem = certificate.public_bytes(Encoding.PEM)

    def issue(self, *names: str, days: int = 1) -> tuple[bytes, bytes]:
        """Return a certificate for DNS names and numbers, and its key. It ends in so many days."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _begun(_named(names[0] if names else "nobody"), self._name, key, days)
        if names:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_alternative(name) for name in names]), critical=False
            )
        certificate = builder.sign(self._key, hashes.SHA256())
        return certificate.public_bytes(Encoding.PEM), key.private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        )

    def folder(self, path: Path, *names: str, trusts: bytes = b"", days: int = 1) -> Path:
        """Write tls.crt, tls.key and ca.crt as Kubernetes does: all three change in one moment.

        `trusts` is the content of ca.crt, by default this authority.
        """
        certificate, key = self.issue(*names, days=days)
        return write(path, certificate, key, trusts or self.pem)


def write(path: Path, certificate: bytes, key: bytes, authorities: bytes) -> Path:
    path.mkdir(exist_ok=True)
    version = path / f"..{secrets.token_hex(8)}"
    version.mkdir()
    for name, content in (("tls.crt", certificate), ("tls.key", key), ("ca.crt", authorities)):
        (version / name).write_bytes(content)
        if not (path / name).is_symlink():
            (path / name).symlink_to(f"..data/{name}")
    (path / "..next").symlink_to(version.name)
    os.replace(path / "..next", path / "..data")
    return path


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _begun(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + timedelta(days=days))
    )


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)
