"""Asks the gateway one question on behalf of a candidate, as any client does."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from google.protobuf.json_format import Parse
from tworoads.v1 import answer_pb2
from tworoads.v1 import evaluation_pb2 as pb
from tworoads.v1.answer_pb2_grpc import AnswerServiceStub
from tworoads.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tworoads.v1.generation_pb2 import PRIORITY_BATCH
from tworoads.v1.retrieval_pb2 import PATH_BASE, PATH_HYBRID, PATH_RAG, PATH_TUNED, Path
from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub
from tworoads.v1.tuning_pb2_grpc import TuningServiceStub

from services.evaluation.answers import PHASES
from services.evaluation.comparison import (
    Candidate,
    ComparisonFailed,
    PathName,
    Phase,
    Plan,
    Question,
)
from services.evaluation.failures import right_answers
from services.evaluation.judge import Judge
from services.evaluation.scoring import score
from services.runtime.call import outgoing
from services.runtime.errors import ServiceError, Unavailable, downstream
from services.runtime.threads import in_thread

PATHS: dict[PathName, Path.ValueType] = {
    "base": PATH_BASE,
    "rag": PATH_RAG,
    "tuned": PATH_TUNED,
    "hybrid": PATH_HYBRID,
}
SECONDS = 300.0  # for one answer
FIRST_WAIT, LONGEST_WAIT = 0.25, 5.0  # seconds between two tries


@dataclass(frozen=True)
class Gateway:
    """Stubs of the gateway's services."""

    answers: AnswerServiceStub
    retrieval: RetrievalServiceStub
    tuning: TuningServiceStub
    embedding: EmbeddingServiceStub


def passes(error: ServiceError) -> bool:
    """Say whether trying again later may help: a service is away, or busy."""
    return isinstance(error, Unavailable) or error.reason == "QUEUE_FULL"


class Patience:
    """Lets calls be tried again for `seconds` while a service is away or full."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: float | None = None
        self._wait = FIRST_WAIT

    async def wait(self, error: ServiceError) -> None:
        """Wait before the next try. Raises ComparisonFailed if it has been too long."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if now - self._since > self._seconds:
            raise ComparisonFailed(error.reason, f"it was away for too long: {error}") from error
        await asyncio.sleep(self._wait)
        self._wait = min(2 * self._wait, LONGEST_WAIT)


class Asker:
    """Asks and scores for one comparison; `changing` says whether its documents change."""

    def __init__(
        self,
        gateway: Gateway,
        plan: Plan,
        changing: bool,
        judge: Judge | None,
        patience_seconds: float,
    ) -> None:
        self._gateway = gateway
        self._plan = plan
        self._changing = changing
        self._judge = judge if plan.scoring.judge else None
        self._patience_seconds = patience_seconds
        self._options = {candidate.id: _options(candidate, plan) for candidate in plan.candidates}

    async def ask(
        self, candidate: Candidate, phase: Phase, question: Question
    ) -> pb.ComparisonAnswer:
        """Return the answer and its scores. An error that trying again does not help is in the
        answer. Raises ComparisonFailed (the reason of the error) if others last too long."""
        request = self._request(candidate, phase, question)
        right = right_answers(question, phase, self._changing)
        patience = Patience(self._patience_seconds)
        while True:
            answer = pb.ComparisonAnswer(
                candidate=candidate.id,
                phase=PHASES[phase],
                line=question.line,
                question=question.question,
                type=question.type,
                right_answers=right,
            )
            answer.time.GetCurrentTime()
            try:
                await self._answered(request, answer)
            except ServiceError as error:
                if not passes(error):
                    answer.error = error.reason
                    return answer
                await patience.wait(error)
            except RuntimeError:
                answer.error = "INTERNAL"
                return answer
            else:
                await self._score(question, right, answer)
                return answer

    async def _answered(
        self, request: answer_pb2.AnswerRequest, answer: pb.ComparisonAnswer
    ) -> None:
        start = time.perf_counter()
        texts: list[str] = []
        try:
            with downstream("gateway"):
                call = self._gateway.answers.Answer(request, **outgoing(SECONDS))
                try:
                    async for response in call:
                        if response.text and not texts:
                            answer.first_text_ms = (time.perf_counter() - start) * 1e3
                        _take(response, answer, texts)
                finally:
                    call.cancel()
        finally:
            answer.total_ms = (time.perf_counter() - start) * 1e3
            answer.text = "".join(texts)

    async def _score(
        self, question: Question, right: tuple[str, ...], answer: pb.ComparisonAnswer
    ) -> None:
        scoring = self._plan.scoring
        scored: Callable[..., tuple[float, float]] = score
        if scoring.strict == "regex":  # a pattern may take its time
            strict, blind = await in_thread(scored, scoring, answer.text, right)
        else:
            strict, blind = scored(scoring, answer.text, right)
        answer.strict, answer.format_blind = strict, blind
        if self._judge:
            judged = await self._judge.score(question.question, right, answer.text)
            if judged is not None:
                answer.judge = judged

    def _request(
        self, candidate: Candidate, phase: Phase, question: Question
    ) -> answer_pb2.AnswerRequest:
        options = answer_pb2.AnswerOptions()
        options.CopyFrom(self._options[candidate.id])
        path, corpus = candidate.path, candidate.corpus
        if phase == "oracle":
            path = "hybrid" if candidate.adapter else "rag"
            corpus = corpus or self._plan.corpus
            options.pinned_documents.extend(question.relevant)
            options.limit = len(question.relevant)
        return answer_pb2.AnswerRequest(
            question=question.question,
            corpus=corpus,
            path=PATHS[path],
            adapter=candidate.adapter,
            options=options,
        )


def oracle_question(question: Question, known: frozenset[str]) -> Question | None:
    """Return a question with those of its relevant documents that there are, at most as many as can
    be pinned; None if there is none."""
    relevant = tuple(id for id in question.relevant if id in known)[:50]
    return replace(question, relevant=relevant) if relevant else None


def _options(candidate: Candidate, plan: Plan) -> answer_pb2.AnswerOptions:
    options = Parse(candidate.options, answer_pb2.AnswerOptions())
    options.generate.priority = PRIORITY_BATCH  # users come first
    if not options.generate.HasField("seed"):
        options.generate.seed = plan.seed
    return options


def _take(
    response: answer_pb2.AnswerResponse, answer: pb.ComparisonAnswer, texts: list[str]
) -> None:
    match response.WhichOneof("event"):
        case "started":
            answer.started.CopyFrom(response.started)
        case "passages":
            answer.passages.extend(passage.id for passage in response.passages.passages)
            answer.documents.extend(passage.document_id for passage in response.passages.passages)
        case "text":
            texts.append(response.text)
        case "citation":
            answer.citations.append(response.citation)
        case "unsupported":
            answer.unsupported.append(response.unsupported)
        case "finished":
            answer.finished.CopyFrom(response.finished)
