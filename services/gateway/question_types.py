"""Which type of question the caller asks, as a policy's router tells types apart."""

import numpy as np
from tworoads.v1 import embedding_pb2
from tworoads.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tworoads.v1.retrieval_pb2 import Router

from services.runtime.call import outgoing
from services.runtime.errors import ServiceError, downstream

SECONDS = 2.0


async def type_of(embedding: EmbeddingServiceStub, router: Router, question: str) -> str | None:
    """Return the type with the greatest weights x embedding + bias; None if it cannot be told,
    because embedding is away or runs another model than the one that the router was made with."""
    try:
        with downstream("embedding"):
            response = await embedding.Embed(
                embedding_pb2.EmbedRequest(texts=[question], kind=embedding_pb2.EMBED_KIND_QUERY),
                **outgoing(SECONDS),
            )
    except (ServiceError, RuntimeError):
        return None
    if response.model_hash != router.embedder_hash:
        return None
    vector = np.array(response.vectors[0].values)
    if any(len(entry.weights) != len(vector) for entry in router.classes):
        return None
    best = max(router.classes, key=lambda entry: np.dot(entry.weights, vector) + entry.bias)
    return str(best.type)
