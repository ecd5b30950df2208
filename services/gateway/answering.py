"""How a question is answered: the path is chosen, passages are searched, the model writes, and
every sentence is checked against what the model was shown."""

import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

from tworoads.v1 import answer_pb2 as pb
from tworoads.v1 import generation_pb2, retrieval_pb2
from tworoads.v1.generation_pb2_grpc import GenerationServiceStub
from tworoads.v1.retrieval_pb2 import (
    PATH_AUTO,
    PATH_BASE,
    PATH_HYBRID,
    PATH_RAG,
    PATH_TUNED,
    PATH_UNSPECIFIED,
    Path,
)
from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub

from services.gateway.checking import Checking
from services.gateway.evidence import Evidence, query_of, search
from services.prompts.words import Message, Shown, conversation, rewriting, stops
from services.runtime.call import current, outgoing
from services.runtime.errors import NotFound, NotReady, Overloaded, TooLate, Unavailable, downstream

ROLES = {
    "system": generation_pb2.ROLE_SYSTEM,
    "user": generation_pb2.ROLE_USER,
    "assistant": generation_pb2.ROLE_ASSISTANT,
}
FINISH = {
    generation_pb2.FINISH_REASON_STOP: pb.ANSWER_FINISH_REASON_STOP,
    generation_pb2.FINISH_REASON_LENGTH: pb.ANSWER_FINISH_REASON_LENGTH,
}
REWRITTEN_TOKENS = 64
MOST_STOPS = 8  # of GenerateOptions.stop


@dataclass(frozen=True)
class Route:
    """The path that is taken, and why."""

    path: Path.ValueType
    reason: str
    explanation: str


@dataclass
class Answering:
    """Answers one question. `events` is the whole story."""

    request: pb.AnswerRequest
    retrieval: RetrievalServiceStub
    generation: GenerationServiceStub
    model: str
    started: float = field(default_factory=time.perf_counter)

    async def events(self) -> AsyncIterator[pb.AnswerResponse]:
        """Yield the answer's events, in the order of AnswerService.Answer."""
        route = await self._route()
        evidence = None
        if route.path == PATH_RAG:
            query = await self._query()
            try:
                evidence = await search(self.retrieval, self.request, query)
            except (Unavailable, Overloaded, TooLate):
                if not self.request.options.allow_degraded:
                    raise
                route = Route(
                    PATH_BASE, "DEGRADED", "retrieval is away: the model answers without documents"
                )
        yield self._started(route, evidence)
        if evidence is not None:
            passages = pb.AnswerPassages(passages=evidence.passages)
            yield pb.AnswerResponse(passages=passages)
            if not evidence.passages:
                yield self._no_evidence(evidence)
                return
        degraded = ["RETRIEVAL"] if route.reason == "DEGRADED" else []
        async for event in self._written(evidence, degraded):
            yield event

    async def _route(self) -> Route:
        path = self.request.path
        if path in (PATH_TUNED, PATH_HYBRID):
            if not self.request.adapter:
                raise NotReady("ADAPTER_MISSING", "this path needs an adapter: say which one")
            raise NotReady("PATH_CLOSED", "this path needs a tuning service, and none is running")
        if path not in (PATH_AUTO, PATH_UNSPECIFIED):
            return Route(path, "ASKED", "the caller asked for this path")
        if not self.request.corpus:
            return Route(
                PATH_BASE, "NO_CORPUS", "no corpus was given, so there is nothing to search"
            )
        try:
            with downstream("retrieval"):
                response = await self.retrieval.GetPolicy(
                    retrieval_pb2.GetPolicyRequest(corpus=self.request.corpus), **outgoing()
                )
        except NotFound as error:
            if error.reason != "POLICY_NOT_FOUND":
                raise
            return Route(PATH_RAG, "NO_POLICY", "the corpus has no policy yet, so it is searched")
        except Unavailable:
            return Route(PATH_RAG, "NO_POLICY", "the corpus's policy cannot be read")
        if response.policy.path in (PATH_TUNED, PATH_HYBRID):
            return Route(
                PATH_RAG, "POLICY_CLOSED", "the policy names an adapter, which cannot be served now"
            )
        return Route(response.policy.path, "POLICY", "the corpus's policy names this path")

    async def _query(self) -> str:
        request = self.request
        if not (request.options.rewrite_query and request.history):
            return query_of(request)
        messages = rewriting(request.question, _turns(request.history))
        options = generation_pb2.GenerateOptions(max_tokens=REWRITTEN_TOKENS)
        text = ""
        with downstream("generation"):
            async for response in self.generation.Generate(
                generation_pb2.GenerateRequest(messages=_messages(messages), options=options),
                **outgoing(),
            ):
                text += response.text
        return text.strip() or query_of(request)

    async def _written(
        self, evidence: Evidence | None, degraded: list[str]
    ) -> AsyncIterator[pb.AnswerResponse]:
        request = self.request
        passages = evidence.passages if evidence else []
        shown = [Shown(passage.id, passage.title, passage.text) for passage in passages]
        messages = conversation(
            request.question,
            shown if evidence else None,
            _turns(request.history),
            _turns(request.options.examples),
        )
        options = generation_pb2.GenerateOptions()
        options.CopyFrom(request.options.generate)
        options.stop.extend(stops()[: MOST_STOPS - len(options.stop)])
        prompt = generation_pb2.PromptInfo()
        finish = generation_pb2.GenerateFinish()
        first_text = 0.0
        checking = Checking(passages)
        with downstream("generation"):
            call = self.generation.Generate(
                generation_pb2.GenerateRequest(
                    messages=_messages(messages),
                    options=options,
                    every_token=request.options.every_token,
                ),
                **outgoing(),
            )
            try:
                async for response in call:
                    if response.HasField("prompt"):
                        prompt = response.prompt
                        first_text = self._elapsed()
                        await checking.begin(prompt.used_parts)
                    if response.HasField("finish"):
                        finish = response.finish
                    if response.text:
                        yield pb.AnswerResponse(text=response.text)
                        for event in checking.feed(response.text):
                            yield event
            finally:
                call.cancel()
                checking.close()
        for event in checking.finish():
            yield event
        timings = pb.Timings(
            queue=finish.queue_ms,
            prefill=finish.prefill_ms,
            decode=finish.decode_ms,
            first_text=first_text,
        )
        yield self._finished(
            pb.AnswerFinished(
                reason=FINISH[finish.reason],
                input_tokens=prompt.tokens,
                output_tokens=finish.tokens,
                cached_tokens=prompt.cached_tokens,
                degraded=degraded,
                unused_passages=[p.id for p in passages if p.id not in set(prompt.used_parts)],
                timings=timings,
            ),
            evidence,
        )

    def _started(self, route: Route, evidence: Evidence | None) -> pb.AnswerResponse:
        return pb.AnswerResponse(
            started=pb.AnswerStarted(
                request_id=current.get().request_id,
                path=route.path,
                reason=route.reason,
                explanation=route.explanation,
                model=self.model,
                corpus_version=evidence.corpus_version if evidence else "",
                query=evidence.query if evidence else "",
            )
        )

    def _no_evidence(self, evidence: Evidence) -> pb.AnswerResponse:
        reason = pb.ANSWER_FINISH_REASON_NO_EVIDENCE
        return self._finished(pb.AnswerFinished(reason=reason), evidence)

    def _finished(
        self, finished: pb.AnswerFinished, evidence: Evidence | None
    ) -> pb.AnswerResponse:
        finished.timings.total = self._elapsed()
        if evidence:
            finished.timings.embed = evidence.embed_ms
            finished.timings.search = evidence.search_ms
            finished.degraded.extend(evidence.degraded)
        return pb.AnswerResponse(finished=finished)

    def _elapsed(self) -> float:
        return (time.perf_counter() - self.started) * 1e3


def _turns(turns: Iterable[pb.Turn]) -> list[tuple[str, str]]:
    return [(turn.question, turn.answer) for turn in turns]


def _messages(messages: list[Message]) -> list[generation_pb2.Message]:
    return [
        generation_pb2.Message(
            role=ROLES[message.role],
            parts=[
                generation_pb2.Part(text=part.text, id=part.id, droppable=part.droppable)
                for part in message.parts
            ],
        )
        for message in messages
    ]
