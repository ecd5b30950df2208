"""What a policy may say, and the messages that say it."""

import base64
import math
from collections.abc import Iterable
from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp
from tworoads.v1 import retrieval_pb2 as pb

from services.retrieval.corpora import Policy, TypePath
from services.runtime.errors import InvalidInput

WITH_ADAPTER = (pb.PATH_TUNED, pb.PATH_HYBRID)
WITHOUT_ADAPTER = (pb.PATH_BASE, pb.PATH_RAG)
MOST_TYPES = 100
MOST_TYPE = 64  # code points
MOST_DIMENSION = 16_384


def checked(request: pb.SetPolicyRequest, author: str) -> Policy:
    """Return the policy that a caller asks for.

    Raises InvalidInput (PATH_INVALID, ADAPTER_INVALID, ROUTER_INVALID).
    """
    _check_path(request.path, request.adapter)
    for type in request.types:
        _check_path(type.path, type.adapter)
    _check_router(request)
    return Policy(
        corpus=request.corpus,
        path=request.path,
        adapter=request.adapter,
        comparison=request.comparison,
        author=author,
        updated=datetime.min,
        types=tuple(TypePath(type.type, type.path, type.adapter) for type in request.types),
        router=base64.b64encode(request.router.SerializeToString()).decode(),
    )


def message_of(policy: Policy) -> pb.Policy:
    """Return a policy as callers get it."""
    updated = Timestamp()
    updated.FromDatetime(policy.updated)
    return pb.Policy(
        corpus=policy.corpus,
        path=pb.Path.ValueType(policy.path),
        adapter=policy.adapter,
        comparison=policy.comparison,
        author=policy.author,
        update_time=updated,
        etag=policy.etag,
        types=[
            pb.TypePath(type=t.type, path=pb.Path.ValueType(t.path), adapter=t.adapter)
            for t in policy.types
        ],
        router=pb.Router.FromString(base64.b64decode(policy.router)) if policy.router else None,
    )


def _check_path(path: int, adapter: str) -> None:
    if path not in (*WITH_ADAPTER, *WITHOUT_ADAPTER):
        raise InvalidInput("PATH_INVALID", "a policy names BASE, RAG, TUNED or HYBRID")
    if bool(adapter) != (path in WITH_ADAPTER):
        raise InvalidInput(
            "ADAPTER_INVALID", "TUNED and HYBRID need an adapter, the other paths take none"
        )


def _check_router(request: pb.SetPolicyRequest) -> None:
    if bool(request.types) != request.HasField("router"):
        raise InvalidInput("ROUTER_INVALID", "types need a router, and a router needs types")
    if not request.types:
        return
    router = request.router
    names = [entry.type for entry in router.classes]
    if not router.embedder_hash:
        raise InvalidInput("ROUTER_INVALID", "a router names the model of its embeddings")
    if not 2 <= len(names) <= MOST_TYPES or not _distinct(names):
        raise InvalidInput("ROUTER_INVALID", f"a router has 2 to {MOST_TYPES} types, each once")
    if not all(0 < len(name) <= MOST_TYPE for name in names):
        raise InvalidInput("ROUTER_INVALID", f"a type has 1 to {MOST_TYPE} characters")
    if not {type.type for type in request.types} <= set(names) or not _distinct(
        type.type for type in request.types
    ):
        raise InvalidInput("ROUTER_INVALID", "each type with a path is one of the router's, once")
    sizes = {len(entry.weights) for entry in router.classes}
    if len(sizes) != 1 or not 1 <= sizes.pop() <= MOST_DIMENSION:
        raise InvalidInput("ROUTER_INVALID", "all types have equally many weights, at least one")
    numbers = (number for entry in router.classes for number in (*entry.weights, entry.bias))
    if not all(map(math.isfinite, numbers)):
        raise InvalidInput("ROUTER_INVALID", "weights are finite numbers")


def _distinct(names: Iterable[str]) -> bool:
    names = list(names)
    return len(names) == len(set(names))
