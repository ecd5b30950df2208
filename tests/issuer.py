"""Who issues tokens, with keys of its own, and writes them wrong when it is told to."""

import base64
import hashlib
import hmac
import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from services.gateway.tokens import Tokens

ISSUER, AUDIENCE = "https://issuer.example", "tworoads"


@cache
def rsa_key(name: str = "rsa", bits: int = 2048) -> rsa.RSAPrivateKey:
    """Return the key of this name: the same each time."""
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


@cache
def ec_key(name: str = "ec", curve: type[ec.EllipticCurve] = ec.SECP256R1) -> Any:
    return ec.generate_private_key(curve())


def jwk(key: Any, kid: str, **fields: Any) -> dict[str, Any]:
    """Return the public half as a member of a key set."""
    algorithm = RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else ECAlgorithm
    return {**algorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid, **fields}


def write_keys(path: Path, *keys: dict[str, Any]) -> Path:
    """Write a key set; by default the one of `token`."""
    chosen = keys or (jwk(rsa_key(), "rsa"), jwk(ec_key(), "ec", use="sig", alg="ES256"))
    path.write_text(json.dumps({"keys": chosen}))
    return path


def tokens(path: Path) -> Tokens:
    return Tokens(path, ISSUER, AUDIENCE, "tenant", "role")


def claims(**changes: Any) -> dict[str, Any]:
    """Return claims that are in order but for the changes; None leaves one out."""
    said = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "ann",
        "exp": time.time() + 300,
        "tenant": "acme",
        "role": "writer",
        **changes,
    }
    return {name: value for name, value in said.items() if value is not None}


def token(
    key: Any = None,
    algorithm: str = "RS256",
    header: dict[str, Any] | None = None,
    **changes: Any,
) -> str:
    """Return a signed token: good without arguments."""
    headers = {"kid": "rsa"} if header is None else header
    return jwt.encode(claims(**changes), key or rsa_key(), algorithm, headers)


def by_hand(header: Any, said: Any = None, signature: bytes | None = None, secret: bytes = b""):
    """Return a token that no library would write; by default an HMAC with `secret` signs it."""
    parts = [
        part if isinstance(part, bytes) else _json(part) for part in (header, said or claims())
    ]
    signed = b".".join(map(_base64, parts))
    if signature is None:
        signature = hmac.digest(secret, signed, hashlib.sha256)
    return (signed + b"." + _base64(signature)).decode()


def public_pem() -> bytes:
    return (
        rsa_key()
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _base64(value: bytes) -> bytes:
    return base64.urlsafe_b64encode(value).rstrip(b"=")
