"""Certificates in files, which are read again when they change."""

import logging
import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

log = logging.getLogger(__name__)

Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Certificates:
    """Who somebody is, and whose certificates they take from others. All are PEM."""

    chain: bytes
    key: bytes
    authorities: bytes | None


class CertificateFolder:
    """A folder with tls.crt, tls.key and, if both sides show a certificate (`mutual`), ca.crt.

    Raises ValueError if they are not there or do not belong together.
    """

    def __init__(self, path: Path, *, mutual: bool = True) -> None:
        names = ("tls.crt", "tls.key", "ca.crt") if mutual else ("tls.crt", "tls.key")
        self._path = path
        self._files = [path / name for name in names]
        self._stamp = self._look()
        try:
            self.current = self._read()
        except OSError as error:
            needed = ", ".join(names)
            raise ValueError(f"cannot take {needed} from the folder {path}: {error}") from error

    def changed(self) -> bool:
        """Read the files again if they changed, and return whether `current` is new.

        This is asked at every handshake; as long as nothing changes it costs three system calls.
        Files that do not belong together are logged, and `current` stays until they change again.
        """
        stamp = self._look()
        if stamp == self._stamp:
            return False
        try:
            found = self._read()
        except OSError as error:
            self._stamp = stamp
            log.error("the certificate in %s stays the old one: %s", self._path, error)
            return False
        if self._look() != stamp:  # somebody is writing: take all of it next time
            return False
        self._stamp, self.current = stamp, found
        log.info("the certificate in %s is a new one", self._path)
        return True

    def _look(self) -> Stamp:
        return tuple(_stamp(file) for file in self._files)

    def _read(self) -> Certificates:
        certificate, key, *authorities = self._files
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # gRPC finds out at the first handshake, and too late. Nobody is asked for a pass phrase.
        context.load_cert_chain(certificate, key, password=lambda: "")
        for file in authorities:
            context.load_verify_locations(file)
        return Certificates(
            certificate.read_bytes(),
            key.read_bytes(),
            authorities[0].read_bytes() if authorities else None,
        )


def _stamp(file: Path) -> tuple[int, int, int]:
    try:
        found = os.stat(file)
    except OSError:
        return 0, 0, 0
    return found.st_ino, found.st_mtime_ns, found.st_size


def server_credentials(path: Path, *, mutual: bool) -> Any:
    """Return what a server shows, from the files in `path` as they are at each handshake.

    With `mutual` it demands a certificate of the authority in ca.crt from whoever calls. Raises
    ValueError if the files cannot be used now.
    """
    folder = CertificateFolder(path, mutual=mutual)

    def configuration() -> Any:
        now = folder.current
        return grpc.ssl_server_certificate_configuration([(now.key, now.chain)], now.authorities)

    def fetch() -> Any:
        return configuration() if folder.changed() else None

    return grpc.dynamic_ssl_server_credentials(configuration(), fetch, mutual)


def client_credentials(certificates: Certificates) -> Any:
    """Return what a client of our own services shows, and whom it believes."""
    return grpc.ssl_channel_credentials(
        certificates.authorities, certificates.key, certificates.chain
    )


def public_credentials(ca: Path | None) -> Any:
    """Return what believes the authorities in the file `ca`, by default those of the system."""
    file = ca or ssl.get_default_verify_paths().cafile  # without one, gRPC brings a list
    return grpc.ssl_channel_credentials(Path(file).read_bytes() if file else None)
