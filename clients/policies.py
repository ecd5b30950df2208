"""Policies as plain values: which path AUTO takes."""

from dataclasses import dataclass
from datetime import datetime

from tworoads.v1 import retrieval_pb2 as pb

from clients.messages import plain


@dataclass(frozen=True)
class RouterClass:
    """One class of a router: the greatest `weights` x embedding + `bias` wins."""

    type: str
    weights: tuple[float, ...]
    bias: float


@dataclass(frozen=True)
class Router:
    """Tells types of question apart by their embeddings."""

    embedder_hash: str
    classes: tuple[RouterClass, ...]


@dataclass(frozen=True)
class TypePath:
    """The path that AUTO takes for one type of question."""

    type: str
    path: str
    adapter: str = ""


@dataclass(frozen=True)
class Policy:
    """The path that AUTO takes for a corpus; `comparison` is empty if it was set by hand."""

    corpus: str
    path: str
    adapter: str
    comparison: str
    author: str
    updated: datetime | None
    etag: str
    types: tuple[TypePath, ...]
    router: Router | None


def policy_of(policy: pb.Policy) -> Policy:
    """Return the plain value of a policy."""
    return plain(Policy, policy)


def router_message(router: Router) -> pb.Router:
    """Return a router as it is sent."""
    return pb.Router(
        embedder_hash=router.embedder_hash,
        classes=[pb.RouterClass(**vars(one)) for one in router.classes],
    )
