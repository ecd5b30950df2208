"""Which path a question takes, and why."""

from dataclasses import dataclass, replace

from tworoads.v1 import answer_pb2 as pb
from tworoads.v1 import retrieval_pb2
from tworoads.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tworoads.v1.retrieval_pb2 import (
    PATH_AUTO,
    PATH_BASE,
    PATH_HYBRID,
    PATH_RAG,
    PATH_TUNED,
    PATH_UNSPECIFIED,
    Path,
    Policy,
)
from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub
from tworoads.v1.tuning_pb2 import TRAINING_CONTEXT_NONE, TRAINING_CONTEXT_RETRIEVED

from services.gateway.adapters import Adapter, Adapters
from services.gateway.question_types import type_of
from services.runtime.call import outgoing
from services.runtime.errors import InvalidInput, NotFound, NotReady, Unavailable, downstream

WARNINGS = {
    (PATH_HYBRID, TRAINING_CONTEXT_NONE): (
        "ADAPTER_WITHOUT_CONTEXT",
        "the adapter never saw passages in training, and may read them worse than the model alone",
    ),
    (PATH_TUNED, TRAINING_CONTEXT_RETRIEVED): (
        "ADAPTER_NEEDS_CONTEXT",
        "the adapter never answered without passages in training",
    ),
}
# What generation refuses an adapter with: the model alone could still answer.
REFUSALS = (
    "ADAPTER_NAME_INVALID",
    "ADAPTER_NOT_FOUND",
    "ADAPTER_VERIFYING",
    "ADAPTER_NOT_ACCEPTED",
    "ADAPTER_ALTERED",
    "ADAPTER_INCOMPATIBLE",
    "ADAPTERS_FULL",
    "STORE_FULL",
    "TUNING_UNAVAILABLE",
)


@dataclass(frozen=True)
class Route:
    """The path that is taken, and why. `asked` is the name of the adapter that it needs, empty if
    none; `adapter` is what `with_adapter` found under it."""

    path: Path.ValueType
    reason: str
    explanation: str
    asked: str = ""
    adapter: Adapter | None = None

    @property
    def searches(self) -> bool:
        return self.path in (PATH_RAG, PATH_HYBRID)

    @property
    def may_close(self) -> bool:
        """Whether it gives way to a search if generation refuses its adapter."""
        return self.follows_policy and self.adapter is not None

    @property
    def follows_policy(self) -> bool:
        return self.reason in ("POLICY", "POLICY_TYPE")

    @property
    def warning(self) -> tuple[str, str] | None:
        """What a person should know of path and adapter, as a code and a sentence."""
        return WARNINGS.get((self.path, self.adapter.context)) if self.adapter else None

    @property
    def degraded(self) -> list[str]:
        """What was left out on the way to this route."""
        left_out = ["RETRIEVAL"] if self.reason == "DEGRADED" else []
        return left_out if self.adapter is None or self.adapter.newest else [*left_out, "TUNING"]

    def without_documents(self) -> "Route":
        """Return the route that is left when retrieval is away."""
        return replace(
            self,
            path=PATH_TUNED if self.adapter else PATH_BASE,
            reason="DEGRADED",
            explanation="retrieval is away: the model answers without documents",
        )


async def route_of(
    request: pb.AnswerRequest, retrieval: RetrievalServiceStub, embedding: EmbeddingServiceStub
) -> Route:
    """Return the path that was asked for, or the one that the corpus's policy names.

    Raises what retrieval raises for a corpus that does not exist.
    """
    if request.path not in (PATH_AUTO, PATH_UNSPECIFIED):
        asked = request.adapter if request.path in (PATH_TUNED, PATH_HYBRID) else ""
        return Route(request.path, "ASKED", "the caller asked for this path", asked)
    if not request.corpus:
        return Route(PATH_BASE, "NO_CORPUS", "no corpus was given, so there is nothing to search")
    try:
        with downstream("retrieval"):
            response = await retrieval.GetPolicy(
                retrieval_pb2.GetPolicyRequest(corpus=request.corpus), **outgoing()
            )
    except NotFound as error:
        if error.reason != "POLICY_NOT_FOUND":
            raise
        return await _without_policy(request.corpus, retrieval)
    except Unavailable:
        return Route(PATH_RAG, "NO_POLICY", "the corpus's policy cannot be read")
    route = await _by_policy(response.policy, request.question, embedding)
    if route.path not in Path.values():
        return closed("only a newer version of this server knows it", "path")
    return route


async def _without_policy(corpus: str, retrieval: RetrievalServiceStub) -> Route:
    """Return the route to search a corpus, or to answer without if there is nothing in it."""
    try:
        with downstream("retrieval"):
            response = await retrieval.GetCorpus(
                retrieval_pb2.GetCorpusRequest(name=corpus), **outgoing()
            )
    except Unavailable:
        return Route(PATH_RAG, "NO_POLICY", "the corpus has no policy yet, so it is searched")
    if response.corpus.documents:
        return Route(PATH_RAG, "NO_POLICY", "the corpus has no policy yet, so it is searched")
    return Route(PATH_BASE, "CORPUS_EMPTY", "the corpus has no policy and no documents yet")


async def _by_policy(policy: Policy, question: str, embedding: EmbeddingServiceStub) -> Route:
    proof = f" (comparison {policy.comparison})" if policy.comparison else ""
    explanation = f"the corpus's policy names this path{proof}"
    if not policy.types:
        return Route(policy.path, "POLICY", explanation, policy.adapter)
    type = await type_of(embedding, policy.router, question)
    if type is None:
        explanation += "; the type of the question cannot be told now"
        return Route(policy.path, "POLICY", explanation, policy.adapter)
    for own in policy.types:
        if own.type == type:
            explanation = f"the corpus's policy names this path for questions like {type}{proof}"
            return Route(own.path, "POLICY_TYPE", explanation, own.adapter)
    return Route(policy.path, "POLICY", f"{explanation} for questions like {type}", policy.adapter)


async def with_adapter(route: Route, adapters: Adapters) -> Route:
    """Return the route with the adapter that it asks for. A policy whose adapter cannot be used is
    closed: the corpus is searched instead. Raises what Adapters.resolve raises."""
    try:
        adapter = await adapters.resolve(route.asked)
    except (NotFound, InvalidInput, NotReady, Unavailable) as error:
        if route.follows_policy:
            return closed(str(error))
        raise
    except RuntimeError:
        if route.follows_policy:
            return closed("the tuning service, which knows it, failed")
        raise
    if route.follows_policy and not adapter.served:
        return closed("it is still being measured, or it was found unfaithful and not accepted")
    return replace(route, adapter=adapter)


def closed(why: str, what: str = "adapter") -> Route:
    """Return the route of a policy that cannot be followed: its adapter cannot be used, or the
    vectors of its corpus cannot."""
    explanation = f"the {what} that the corpus's policy rests on cannot be used: {why}"
    return Route(PATH_RAG, "POLICY_CLOSED", explanation)
