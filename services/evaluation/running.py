"""Runs a comparison: asks all that is to be asked, then has it analysed and reported."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from tworoads.v1 import evaluation_pb2 as pb

from services.evaluation import answers as kept
from services.evaluation.answers import PHASES, AnswerFile
from services.evaluation.asking import Asker, Gateway, oracle_question
from services.evaluation.changing import Change, Changer
from services.evaluation.comparison import (
    ANSWERS,
    OUTCOME,
    QUESTIONS,
    Candidate,
    Comparison,
    ComparisonFailed,
    Phase,
    Progress,
    Question,
)
from services.evaluation.gathering import Gatherer, each
from services.evaluation.judge import Judge
from services.evaluation.outcome import Outcome
from services.evaluation.questions import load
from services.evaluation.tally import Tally
from services.runtime.disk import put, space
from services.runtime.errors import NotFound, ServiceError
from services.runtime.threads import in_thread

SLICE = 50  # questions that all candidates are asked before the next ones
NOTE_SECONDS = 1.0
WRITE_SECONDS = 0.5
MOST_NAMED = 5  # documents
DOCUMENTS = "documents.json"
SEARCHES = "searches.json"

OUTCOMES = TypeAdapter(Outcome)
Note = Callable[[Progress], Awaitable[None]]
SetFields = Callable[[Mapping[str, Any]], Awaitable[Comparison]]


@dataclass(frozen=True)
class GatewayRunner:
    """Runs comparisons by asking the gateway. `patience_seconds` is how long a service may be away
    before a comparison fails."""

    gateway: Gateway
    judge: Judge | None = None
    patience_seconds: float = 300.0

    async def run(
        self, comparison: Comparison, folder: Path, note: Note, change: SetFields
    ) -> None:
        """Do what the protocol Runner says."""
        questions = await in_thread(load, folder / QUESTIONS)
        unscored = set(comparison.plan.unscored)
        asked = [question for question in questions if question.line not in unscored]
        run = _Run(self, comparison, folder, asked, note)
        with space():
            await run.whole(change)


class _Run:
    """One run of one comparison."""

    def __init__(
        self,
        runner: GatewayRunner,
        comparison: Comparison,
        folder: Path,
        questions: Sequence[Question],
        note: Note,
    ) -> None:
        self._gateway = runner.gateway
        self._comparison = comparison
        self._plan = comparison.plan
        self._folder = folder
        self._questions = questions
        self._changing = comparison.changed_documents > 0
        self._gatherer = Gatherer(runner.gateway, runner.patience_seconds)
        self._asker = Asker(
            runner.gateway, self._plan, self._changing, runner.judge, runner.patience_seconds
        )
        self._note = note
        self._noted = 0.0
        self._tally = Tally(self._plan.candidates)
        self._done: set[tuple[str, int, int]] = set()  # candidate, phase, line
        self._file: AnswerFile | None = None
        self._last = 0
        self._unwritten: list[pb.ComparisonAnswer] = []
        self._written = 0.0
        self._writing = asyncio.Lock()

    async def whole(self, change: SetFields) -> None:
        await self._begin(change)
        try:
            oracles = await self._oracle_questions()
            stale = [q for q in self._questions if q.stale_answers] if self._changing else []
            self._expect(oracles, stale)
            await self._answers()
            await self._oracle(oracles)
            await self._write()  # before the documents change, for good
            found = await self._searches()
            changed = await self._change_documents() if self._changing else Change()
            stale = [one for one in stale if changed.refused.keys().isdisjoint(one.relevant)]
            self._expect(oracles, stale)
            await self._staleness(stale)
            await self._write()
        finally:
            await self._end()
        await self._note(self._progress("analysis"))
        await self._analyse(found, changed)

    async def _begin(self, change: SetFields) -> None:
        def open_file() -> AnswerFile:
            return AnswerFile(self._folder / ANSWERS)

        self._file = await in_thread(open_file)
        self._last = self._file.last
        for answer in await in_thread(kept.load, self._folder / ANSWERS):
            self._done.add((answer.candidate, PHASES[answer.phase], answer.line))
            self._tally.add(answer.candidate, answer.strict, answer.format_blind, answer.error)
        changes: dict[str, Any] = {}
        if not self._comparison.model:
            changes["model"] = await self._gatherer.model()
        if self._plan.corpus and not self._comparison.corpus_version:
            try:
                changes["corpus_version"] = (await self._gatherer.corpus(self._plan.corpus)).version
            except NotFound as error:
                raise ComparisonFailed(error.reason, str(error)) from error
        if changes:
            self._comparison = await change(changes)

    async def _oracle_questions(self) -> dict[str, list[Question]]:
        """Return what is asked with the relevant documents alone, by candidate. Which of these
        there are is looked up once: later ones may be what the change brings."""
        path = self._folder / DOCUMENTS
        corpora = {
            id: self._candidate(id).corpus or self._plan.corpus
            for id in self._plan.oracles().values()
        }
        if not path.exists():
            ids = {id for question in self._questions for id in question.relevant}
            made = {
                corpus: sorted(await self._gatherer.known(corpus, ids))
                for corpus in sorted(set(corpora.values()))
            }
            await in_thread(put, path, json.dumps(made).encode())
        known = json.loads(await in_thread(path.read_text))
        found = {}
        for id, corpus in corpora.items():
            there = frozenset(known[corpus])
            questions = (oracle_question(question, there) for question in self._questions)
            found[id] = [question for question in questions if question]
        return found

    def _expect(self, oracles: Mapping[str, Sequence[Question]], stale: Sequence[Question]) -> None:
        for candidate in self._plan.candidates:
            total = len(self._questions) + len(oracles.get(candidate.id, ())) + len(stale)
            self._tally.expect(candidate.id, total)

    async def _change_documents(self) -> Change:
        changer = Changer(self._gateway, self._gatherer, self._comparison, self._folder)
        return await changer.change()

    async def _answers(self) -> None:
        candidates = list(self._plan.candidates)
        for number, start in enumerate(range(0, len(self._questions), SLICE)):
            turn = number % len(candidates)
            for candidate in candidates[turn:] + candidates[:turn]:
                await self._block(candidate, "answers", self._questions[start : start + SLICE])

    async def _oracle(self, oracles: Mapping[str, Sequence[Question]]) -> None:
        for candidate in self._plan.candidates:
            await self._block(candidate, "oracle", oracles.get(candidate.id, ()))

    async def _staleness(self, questions: Sequence[Question]) -> None:
        # Those that search first: how soon they follow is measured.
        for candidate in sorted(self._plan.candidates, key=lambda one: not one.searches):
            await self._block(candidate, "staleness", questions)

    async def _block(
        self, candidate: Candidate, phase: Phase, questions: Sequence[Question]
    ) -> None:
        """Ask one candidate all of these that it was not asked, nobody else meanwhile."""

        async def ask(question: Question) -> None:
            if reason := self._tally.given_up(candidate.id):
                answer = _failed(candidate, phase, question, reason)
            else:
                answer = await self._asker.ask(candidate, phase, question)
            await self._keep(answer, phase)

        left = [
            question
            for question in questions
            if (candidate.id, PHASES[phase], question.line) not in self._done
        ]
        if left:
            await self._tell(phase)
            await each(left, ask, self._plan.concurrency)

    async def _keep(self, answer: pb.ComparisonAnswer, phase: Phase) -> None:
        self._last += 1
        answer.sequence = self._last
        strict = answer.strict if answer.HasField("strict") else None
        blind = answer.format_blind if answer.HasField("format_blind") else None
        self._tally.add(answer.candidate, strict, blind, answer.error, answer.total_ms)
        self._unwritten.append(answer)
        if time.monotonic() - self._written >= WRITE_SECONDS and not self._writing.locked():
            await self._write()
        await self._tell(phase)

    async def _write(self) -> None:
        async with self._writing:
            answers, self._unwritten = self._unwritten, []
            if answers and self._file:
                await in_thread(self._file.add, answers)
            self._written = time.monotonic()

    async def _end(self) -> None:
        """Keep what has been answered, however the run ends."""
        if self._file:
            try:
                await self._write()
            finally:
                self._file.close()
                self._file = None

    async def _tell(self, phase: Phase) -> None:
        if time.monotonic() - self._noted >= NOTE_SECONDS:
            self._noted = time.monotonic()
            await self._note(self._progress(phase))

    def _progress(self, phase: Phase) -> Progress:
        candidates = self._tally.progress(self._plan.concurrency)
        left = [one.seconds_left for one in candidates]
        known = [seconds for seconds in left if seconds is not None]
        return Progress(phase, sum(known) if len(known) == len(left) else None, candidates)

    async def _searches(self) -> dict[str, dict[int, tuple[str, ...]]]:
        """Return what a search alone finds, by corpus: once, before the documents change."""
        path = self._folder / SEARCHES
        if not path.exists():
            asked = [question for question in self._questions if question.relevant]
            corpora = {one.corpus for one in self._plan.candidates if one.searches}
            made = {}
            for corpus in sorted(corpora) if asked else ():
                try:
                    made[corpus] = await self._gatherer.found(corpus, asked)
                except ServiceError:  # what its candidates answered says more
                    continue
            await in_thread(put, path, json.dumps(made).encode())
        read = json.loads(await in_thread(path.read_text))
        return {
            corpus: {int(line): tuple(ids) for line, ids in lines.items()}
            for corpus, lines in read.items()
        }

    async def _analyse(
        self,
        found: Mapping[str, Mapping[int, tuple[str, ...]]],
        changed: Change,
    ) -> None:
        # Late, for these are half a second of work that only this needs.
        from services.evaluation import report
        from services.evaluation.analysis import Measured, analyse

        adapters = sorted({one.adapter for one in self._plan.candidates if one.adapter})
        overlaps = {name: await self._gatherer.overlap(name, self._questions) for name in adapters}
        training = {name: await self._gatherer.training_seconds(name) for name in adapters}
        embeddings, embedder = None, ""
        if len({question.type for question in self._questions if question.type}) > 1:
            texts = [question.question for question in self._questions]
            try:
                embeddings, embedder = await self._gatherer.embeddings(texts)
            except (ServiceError, ComparisonFailed, RuntimeError):  # then there is no router
                pass
        answers = await in_thread(kept.load, self._folder / ANSWERS)
        measured = Measured(
            plan=self._plan,
            prices=self._comparison.prices,
            questions=self._questions,
            answers=answers,
            found=found,
            overlaps={name: lines for name, lines in overlaps.items() if lines is not None},
            training_seconds={n: seconds for n, seconds in training.items() if seconds is not None},
            indexing_seconds={self._plan.corpus: changed.seconds} if self._changing else {},
            changed_at=changed.time,
            embeddings=embeddings,
            embedder_hash=embedder,
        )
        outcome = await in_thread(analyse, measured)
        if all(result.failed for result in outcome.results):
            reasons = Counter[str]()
            for result in outcome.results:
                reasons.update(result.errors)
            named = ", ".join(f"{reason} {count} times" for reason, count in reasons.most_common(3))
            raise ComparisonFailed("EVERY_CANDIDATE_FAILED", f"every candidate failed: {named}")
        if changed.refused:
            unknown = (_unchanged(changed.refused), *outcome.verdict.unknown)
            outcome = replace(outcome, verdict=replace(outcome.verdict, unknown=unknown))
        await in_thread(put, self._folder / OUTCOME, OUTCOMES.dump_json(outcome))
        await in_thread(
            report.write, self._folder, self._comparison, self._questions, answers, outcome
        )

    def _candidate(self, id: str) -> Candidate:
        return next(one for one in self._plan.candidates if one.id == id)


def _failed(
    candidate: Candidate, phase: Phase, question: Question, reason: str
) -> pb.ComparisonAnswer:
    answer = pb.ComparisonAnswer(
        candidate=candidate.id,
        phase=PHASES[phase],
        line=question.line,
        question=question.question,
        type=question.type,
        error=reason,
    )
    answer.time.GetCurrentTime()
    return answer


def _unchanged(refused: Mapping[str, str]) -> str:
    """Say which documents could not be changed, and why."""
    named = "; ".join(f"{id}: {why}" for id, why in list(refused.items())[:MOST_NAMED])
    more = f"; and {len(refused) - MOST_NAMED:,} more" if len(refused) > MOST_NAMED else ""
    return (
        f"{len(refused):,} of the changed documents could not be indexed and stayed as they were "
        f"({named}{more}); how the candidates follow the questions about them is not measured."
    )
