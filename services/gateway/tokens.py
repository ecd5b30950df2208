"""JSON Web Tokens (RFC 7519) of an issuer whose public keys are in a file (JWKS, RFC 7517)."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jwt

from services.gateway.identity import Identity
from services.gateway.reloading import Reloading
from services.runtime.errors import Unauthenticated
from services.runtime.gate import Caller

# By the type of the key, never by what a token says of itself.
ALGORITHMS = {"RSA": "RS256", "EC": "ES256"}
CURVE = "P-256"  # of ES256
LEAST_RSA_BITS = 2048
LEEWAY_SECONDS = 30

log = logging.getLogger(__name__)


class Tokens:
    """Takes the tokens of one issuer for one audience; the principal is the claim `sub`.

    `tenant_claim` and `role_claim` are the names of the claims with the tenant and the role. `path`
    is read again when it changes. Raises ValueError and OSError if it cannot be used.
    """

    def __init__(
        self, path: Path, issuer: str, audience: str, tenant_claim: str, role_claim: str
    ) -> None:
        self._keys: Reloading[Mapping[str, jwt.PyJWK]] = Reloading(path, _parse)
        self._issuer = issuer
        self._audience = audience
        self._tenant_claim = tenant_claim
        self._role_claim = role_claim

    def identity(self, token: str) -> Identity:
        """Return whom a token stands for. Raises Unauthenticated (CREDENTIALS_INVALID)."""
        try:
            return self._identity(token)
        except Exception as error:  # a stranger wrote it: whatever it breaks, it is not valid
            log.info("token refused: %s: %.200s", type(error).__name__, error)
            raise Unauthenticated("CREDENTIALS_INVALID", "the token is not valid") from None

    def _identity(self, token: str) -> Identity:
        key = self._keys.current()[jwt.get_unverified_header(token)["kid"]]
        claims = jwt.decode(
            token,
            key,
            algorithms=[key.algorithm_name],
            issuer=self._issuer,
            audience=self._audience,
            leeway=LEEWAY_SECONDS,
            options={"require": ["iss", "aud", "exp", "sub", self._tenant_claim, self._role_claim]},
        )
        caller = Caller(claims[self._tenant_claim], claims["sub"])
        return Identity(caller, claims[self._role_claim])


def _parse(content: bytes) -> dict[str, jwt.PyJWK]:
    try:
        return _keys(json.loads(content)["keys"])
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("this is no key set") from error


def _keys(all_data: Any) -> dict[str, jwt.PyJWK]:
    """Return the keys by their id; those that are not for signing by an algorithm of ours are left
    out. Raises ValueError."""
    found: dict[str, jwt.PyJWK] = {}
    for data in all_data:
        algorithm = ALGORITHMS.get(data["kty"])
        if (
            algorithm is None
            or data.get("use", "sig") != "sig"
            or data.get("alg", algorithm) != algorithm
            or data.get("crv", CURVE) != CURVE
        ):
            continue
        if "d" in data:
            raise ValueError("the key set has a private key")
        if not isinstance(data.get("kid"), str) or data["kid"] in found:
            raise ValueError("every key of a key set has a `kid` of its own")
        try:
            key = jwt.PyJWK(data, algorithm)
        except jwt.PyJWTError as error:
            raise ValueError(f"key {data['kid']!r} is none: {type(error).__name__}") from None
        if algorithm == "RS256" and key.key.key_size < LEAST_RSA_BITS:
            raise ValueError(f"RSA keys have at least {LEAST_RSA_BITS} bits")
        found[data["kid"]] = key
    if not found:
        raise ValueError("the key set has no key for RS256 or ES256")
    return found
