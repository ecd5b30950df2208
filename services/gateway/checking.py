"""Checks an answer's sentences against what the model was shown, while it is being written."""

import asyncio
from collections.abc import Iterable, Sequence

from tworoads.v1 import answer_pb2 as pb
from tworoads.v1.retrieval_pb2 import Passage

from services.gateway.citations.checker import Citation, CitationChecker, Source, Unsupported
from services.prompts.words import DEFAULT_VERSION, abstention


class Checking:
    """The check of one answer: `begin` when the model has read its prompt, `feed` each text, then
    `finish`. Without passages there is nothing to check against, and no verdicts come. `version` is
    that of the prompt."""

    def __init__(self, passages: Sequence[Passage], version: str = DEFAULT_VERSION) -> None:
        self._sources = [Source(p.id, p.document_id, p.start, p.text) for p in passages]
        self._checker: CitationChecker | None = None
        self._answer = ""
        self._abstention = abstention(version)
        # Preparing the sources takes milliseconds: they pass while the model reads the prompt.
        prepare = asyncio.to_thread(CitationChecker, self._sources)
        self._preparing = asyncio.create_task(prepare)

    async def begin(self, used: Iterable[str]) -> None:
        """Say which passages, by id, the model was really shown: only they support anything."""
        if not self._sources:
            return
        used = set(used)
        if all(source.passage_id in used for source in self._sources):
            self._checker = await self._preparing
        else:
            sources = [source for source in self._sources if source.passage_id in used]
            self._checker = await asyncio.to_thread(CitationChecker, sources)

    def feed(self, text: str) -> list[pb.AnswerResponse]:
        """Return the verdicts on the sentences that end in this text."""
        if self._checker is None:
            return []
        self._answer += text
        return self._events(self._checker.feed(text))

    def finish(self) -> list[pb.AnswerResponse]:
        """Return the verdicts on what is left."""
        return self._events(self._checker.finish()) if self._checker else []

    def close(self) -> None:
        """Stop preparing."""
        self._preparing.cancel()

    def _events(self, verdicts: list[Citation | Unsupported]) -> list[pb.AnswerResponse]:
        return [_event(verdict) for verdict in verdicts if not self._abstains(verdict)]

    def _abstains(self, verdict: Citation | Unsupported) -> bool:
        """Say whether the sentence only says that the passages hold no answer."""
        sentence = self._answer[verdict.answer_start : verdict.answer_end]
        return isinstance(verdict, Unsupported) and sentence == self._abstention


def _event(verdict: Citation | Unsupported) -> pb.AnswerResponse:
    if isinstance(verdict, Unsupported):
        return pb.AnswerResponse(
            unsupported=pb.Unsupported(
                answer_start=verdict.answer_start, answer_end=verdict.answer_end
            )
        )
    return pb.AnswerResponse(
        citation=pb.Citation(
            answer_start=verdict.answer_start,
            answer_end=verdict.answer_end,
            passage_id=verdict.passage_id,
            document_id=verdict.document_id,
            source_start=verdict.source_start,
            source_end=verdict.source_end,
            quote=verdict.quote,
            support=verdict.support,
        )
    )
