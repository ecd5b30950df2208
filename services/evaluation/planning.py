"""Turns what was asked for into a plan with nothing left open: candidates, adapters, examples."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace

from google.protobuf.json_format import Parse
from tworoads.v1 import answer_pb2, tuning_pb2

from services.evaluation import checks
from services.evaluation.asking import Gateway
from services.evaluation.checks import Start
from services.evaluation.comparison import Candidate, ComparisonFailed, Plan, Question
from services.evaluation.gathering import Gatherer
from services.evaluation.scoring import chosen
from services.questions.normalising import normalised
from services.runtime.call import outgoing
from services.runtime.errors import InvalidInput, NotReady, Unavailable, downstream
from services.runtime.threads import in_thread

SECONDS = 10.0
FEWEST_QUESTIONS = 40  # of which some may be shown as examples
SERVED = (tuning_pb2.ADAPTER_STATE_READY, tuning_pb2.ADAPTER_STATE_UNMEASURED)


class Planner:
    """Looks up what a comparison needs, before it is queued. All methods raise what the proto says
    of CreateComparison, and Unavailable if the gateway or a service behind it is away."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._gatherer = Gatherer(gateway, patience_seconds=0.0)

    async def resolved(self, start: Start) -> Start:
        """Return what was asked for with adapters as NAME@HASH; corpora and adapters are there."""
        names = {one.adapter for one in start.candidates if one.adapter} | set(start.adapters)
        ids = {name: await self._adapter(name) for name in sorted(names)}
        await self._check_writing(start.candidates)
        corpora = {one.corpus for one in start.candidates if one.searches}
        if start.corpus:
            corpora.add(start.corpus)
        for corpus in sorted(corpora):
            await self._check_corpus(corpus)
        return replace(
            start,
            adapters=tuple(dict.fromkeys(ids[name] for name in start.adapters)),
            candidates=tuple(
                replace(one, adapter=ids.get(one.adapter, "")) for one in start.candidates
            ),
        )

    async def plan(self, start: Start, questions: Sequence[Question]) -> Plan:
        """Return the plan for a question set."""
        scoring = await in_thread(chosen, questions, *start.scoring)
        examples = start.examples
        shown = [pair for candidate in start.candidates for pair in _shown(candidate)]
        unscored = _lines_of(questions, [*examples, *shown])
        if not examples and not start.candidates and start.shots:
            examples, unscored = await self._examples(start, questions)
        if len(unscored) == len(questions):
            raise InvalidInput("QUESTIONS_EMPTY", "all questions are among the examples")
        return Plan(
            candidates=start.candidates or _candidates(start, examples),
            corpus=start.corpus,
            adapters=start.adapters,
            examples=examples,
            unscored=unscored,
            scoring=scoring,
            constraints=start.constraints,
            concurrency=start.concurrency,
            margin=start.margin,
            seed=start.seed,
        )

    async def _check_writing(self, candidates: Sequence[Candidate]) -> None:
        """Check against the context length, which is not known while generation is away."""
        with downstream("gateway"):
            info = await self._gateway.answers.GetServerInfo(
                answer_pb2.GetServerInfoRequest(), **outgoing(SECONDS)
            )
        for one in candidates if info.context_length else ():
            options = Parse(one.options, answer_pb2.AnswerOptions())
            checks.check_writing(one.id, options.generate, info.context_length)

    async def _adapter(self, name: str) -> str:
        with downstream("gateway"):
            response = await self._gateway.tuning.GetAdapter(
                tuning_pb2.GetAdapterRequest(adapter=name), **outgoing(SECONDS)
            )
        adapter = response.adapter
        if adapter.state == tuning_pb2.ADAPTER_STATE_VERIFYING:
            raise NotReady("ADAPTER_VERIFYING", f"{adapter.id} is still being measured")
        if adapter.state not in SERVED and not adapter.accepted_by:
            raise NotReady("ADAPTER_NOT_ACCEPTED", f"{adapter.id} is unfaithful and not accepted")
        return str(adapter.id)

    async def _check_corpus(self, name: str) -> None:
        try:
            corpus = await self._gatherer.corpus(name)
        except ComparisonFailed as error:
            raise Unavailable(error.reason, error.message) from error
        if not corpus.documents:
            raise NotReady("CORPUS_EMPTY", f"the corpus {name!r} has no documents")

    async def _examples(
        self, start: Start, questions: Sequence[Question]
    ) -> tuple[tuple[tuple[str, str], ...], tuple[int, ...]]:
        """Choose what few-shot BASE is shown, and return which lines are not scored then."""
        chance = random.Random(start.seed)
        if start.adapters:
            try:
                known = await self._gatherer.examples(start.adapters[0])
            except ComparisonFailed as error:
                raise Unavailable(error.reason, error.message) from error
            asked = {normalised(question.question) for question in questions}
            apart = [one for one in known or () if normalised(one.question) not in asked]
            if apart:
                shown = chance.sample(apart, min(start.shots, len(apart)))
                return tuple((one.question, one.answer) for one in shown), ()
        if len(questions) < FEWEST_QUESTIONS:
            return (), ()
        taken = chance.sample(list(questions), start.shots)
        pairs = tuple((one.question, (one.stale_answers or one.answers)[0]) for one in taken)
        return pairs, tuple(sorted(one.line for one in taken))


def _candidates(start: Start, examples: Sequence[tuple[str, str]]) -> tuple[Candidate, ...]:
    found = [Candidate("base", "base")]
    if examples:
        turns = [{"question": asked, "answer": said} for asked, said in examples]
        found.append(Candidate("few-shot", "base", options=json.dumps({"examples": turns})))
    if start.corpus:
        found.append(Candidate("rag", "rag", corpus=start.corpus))
    several = len(start.adapters) > 1
    for adapter in start.adapters:
        name, _, digest = adapter.partition("@")
        versions = sum(other.partition("@")[0] == name for other in start.adapters)
        end = f"-{name}" if several else ""
        end += f"-{digest}" if versions > 1 else ""
        found.append(Candidate(f"tuned{end}", "tuned", adapter))
        if start.corpus:
            found.append(Candidate(f"hybrid{end}", "hybrid", adapter, start.corpus))
    return tuple(found)


def _shown(candidate: Candidate) -> list[tuple[str, str]]:
    """Return the examples in a candidate's own options."""
    turns = json.loads(candidate.options).get("examples", [])
    return [(turn.get("question", ""), turn.get("answer", "")) for turn in turns]


def _lines_of(
    questions: Sequence[Question], examples: Sequence[tuple[str, str]]
) -> tuple[int, ...]:
    shown = {normalised(asked) for asked, _ in examples}
    return tuple(one.line for one in questions if normalised(one.question) in shown)
