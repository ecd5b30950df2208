"""How a question is answered: the path is chosen, passages are searched, the model writes, and
every sentence is checked against what the model was shown."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tworoads.v1 import answer_pb2 as pb
from tworoads.v1 import generation_pb2
from tworoads.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tworoads.v1.generation_pb2_grpc import GenerationServiceStub
from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub

from services.gateway.adapters import Adapters
from services.gateway.checking import Checking
from services.gateway.evidence import Evidence, query_of, search
from services.gateway.routes import REFUSALS, Route, closed, route_of, with_adapter
from services.prompts.words import (
    DEFAULT_VERSION,
    Message,
    Shown,
    conversation,
    rewriting,
    stops,
)
from services.runtime.call import current, outgoing
from services.runtime.errors import (
    NotReady,
    Overloaded,
    ServiceError,
    TooLate,
    Unavailable,
    downstream,
)

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
CHARACTERS_OF_A_TOKEN = 4  # about, in English


@dataclass
class Answering:
    """Answers one question. `events` is the whole story."""

    request: pb.AnswerRequest
    retrieval: RetrievalServiceStub
    embedding: EmbeddingServiceStub
    generation: GenerationServiceStub
    adapters: Adapters
    model: str
    started: float = field(default_factory=time.perf_counter)

    async def events(self) -> AsyncIterator[pb.AnswerResponse]:
        """Yield the answer's events, in the order of AnswerService.Answer."""
        route, evidence = await self._prepared()
        events = self._answered(route, evidence)
        head: list[pb.AnswerResponse] = []
        if route.may_close:  # nothing is said before generation has taken the adapter
            try:
                head = await _until_written(events)
            except ServiceError as error:
                if error.reason not in REFUSALS:
                    raise
                events = self._answered(*await self._closed(str(error), evidence))
        for event in head:
            yield event
        async for event in events:
            yield event

    async def _answered(
        self, route: Route, evidence: Evidence | None
    ) -> AsyncIterator[pb.AnswerResponse]:
        yield self._started(route, evidence)
        if evidence is not None:
            passages = pb.AnswerPassages(passages=evidence.passages)
            yield pb.AnswerResponse(passages=passages)
            if not evidence.passages:
                reason = pb.ANSWER_FINISH_REASON_NO_EVIDENCE
                yield self._finished(pb.AnswerFinished(reason=reason), route, evidence)
                return
        async for event in self._written(route, evidence):
            yield event

    async def _prepared(self) -> tuple[Route, Evidence | None]:
        """Choose the route and search; look its adapter up at the same time."""
        route = await route_of(self.request, self.retrieval, self.embedding)
        if not route.asked:
            evidence = await self._evidence(route)
        else:
            async with asyncio.TaskGroup() as group:
                looking_up = group.create_task(with_adapter(route, self.adapters))
                evidence = await self._evidence(route)
            searched, route = route.searches, looking_up.result()
            if route.searches and not searched:  # a policy's TUNED that is closed
                evidence = await self._evidence(route)
        if route.searches and evidence is None:
            route = route.without_documents()
        if evidence and evidence.embedder_gone and route.follows_policy:
            route = closed("another embedding model runs now", "index")
        return route, evidence

    async def _closed(self, why: str, evidence: Evidence | None) -> tuple[Route, Evidence | None]:
        """Search instead of using the adapter of a policy, if HYBRID has not searched already."""
        route = closed(why)
        evidence = evidence or await self._evidence(route)
        return route if evidence else route.without_documents(), evidence

    async def _evidence(self, route: Route) -> Evidence | None:
        """Search, if the route does; None too if that fails and the caller allows it."""
        if not route.searches:
            return None
        query = await self._query()
        try:
            return await search(self.retrieval, self.request, query)
        except NotReady as error:
            if error.reason != "EMBEDDER_MISMATCH" or route.reason == "ASKED":
                raise
            return await search(self.retrieval, self.request, query, embedder_gone=True)
        except (Unavailable, Overloaded, TooLate):
            if not self.request.options.allow_degraded:
                raise
            return None

    async def _query(self) -> str:
        request = self.request
        if not (request.options.rewrite_query and request.history):
            return query_of(request)
        messages = rewriting(request.question, _turns(request.history))
        options = generation_pb2.GenerateOptions(max_tokens=REWRITTEN_TOKENS)
        text = ""
        with downstream("generation"), _counting() as used:
            async for response in self.generation.Generate(
                generation_pb2.GenerateRequest(messages=_messages(messages), options=options),
                **outgoing(),
            ):
                used.add(response)
                text += response.text
        return text.strip() or query_of(request)

    async def _written(
        self, route: Route, evidence: Evidence | None
    ) -> AsyncIterator[pb.AnswerResponse]:
        request = self.request
        version = route.adapter.prompt_version if route.adapter else DEFAULT_VERSION
        passages = evidence.passages if evidence else []
        shown = [Shown(passage.id, passage.title, passage.text) for passage in passages]
        messages = conversation(
            request.question,
            shown if evidence else None,
            _turns(request.history),
            _turns(request.options.examples),
            version,
        )
        options = generation_pb2.GenerateOptions()
        options.CopyFrom(request.options.generate)
        options.stop.extend(stops(version)[: MOST_STOPS - len(options.stop)])
        prompt = generation_pb2.PromptInfo()
        finish = generation_pb2.GenerateFinish()
        first_text = 0.0
        checking = Checking(passages, version)
        with downstream("generation"), _counting() as used:
            call = self.generation.Generate(
                generation_pb2.GenerateRequest(
                    messages=_messages(messages),
                    adapter=route.adapter.id if route.adapter else "",
                    options=options,
                    every_token=request.options.every_token,
                ),
                **outgoing(),
            )
            try:
                async for response in call:
                    used.add(response)
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
                reason=FINISH.get(finish.reason, pb.ANSWER_FINISH_REASON_UNSPECIFIED),
                input_tokens=prompt.tokens,
                output_tokens=finish.tokens,
                cached_tokens=prompt.cached_tokens,
                unused_passages=[p.id for p in passages if p.id not in set(prompt.used_parts)],
                timings=timings,
            ),
            route,
            evidence,
        )

    def _started(self, route: Route, evidence: Evidence | None) -> pb.AnswerResponse:
        code, sentence = route.warning or ("", "")
        return pb.AnswerResponse(
            started=pb.AnswerStarted(
                request_id=current.get().request_id,
                path=route.path,
                reason=route.reason,
                explanation="; ".join(filter(None, (route.explanation, sentence))),
                adapter=route.adapter.id if route.adapter else "",
                model=self.model,
                corpus_version=evidence.corpus_version if evidence else "",
                query=evidence.query if evidence else "",
                warnings=[code] if code else [],
            )
        )

    def _finished(
        self, finished: pb.AnswerFinished, route: Route, evidence: Evidence | None
    ) -> pb.AnswerResponse:
        finished.timings.total = self._elapsed()
        finished.degraded.extend(route.degraded)
        if evidence:
            finished.timings.embed = evidence.embed_ms
            finished.timings.search = evidence.search_ms
            finished.degraded.extend(evidence.degraded)
        return pb.AnswerResponse(finished=finished)

    def _elapsed(self) -> float:
        return (time.perf_counter() - self.started) * 1e3


class _Used:
    """Counts the tokens of one generation."""

    def __init__(self) -> None:
        self._read = self._written = self._characters = 0

    @property
    def tokens(self) -> int:
        """Tokens read and written. Of a generation that broke off nobody says how many it wrote:
        they are guessed from the text."""
        return self._read + max(self._written, self._characters // CHARACTERS_OF_A_TOKEN)

    def add(self, response: generation_pb2.GenerateResponse) -> None:
        self._read += response.prompt.tokens
        self._characters += len(response.text)
        if response.HasField("finish"):
            self._written, self._characters = response.finish.tokens, 0


@contextmanager
def _counting() -> Iterator[_Used]:
    """Have the caller's quota pay for a generation, however the block ends."""
    entry, used = current.get().entry, _Used()
    try:
        yield used
    finally:
        entry.spent(used.tokens)


async def _until_written(events: AsyncIterator[pb.AnswerResponse]) -> list[pb.AnswerResponse]:
    """Take the events up to the first that is neither `started` nor `passages`."""
    taken = []
    async for event in events:
        taken.append(event)
        if event.WhichOneof("event") not in ("started", "passages"):
            break
    return taken


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
