"""Callers that ask and search all the time, and check every word of what they get."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from clients.client import Client, TworoadsError
from tests.real.stack import until

PAUSE_SECONDS = 0.2  # so that a service that starts gets some of the processor


@dataclass(frozen=True)
class Fact:
    """A question, the document that answers it, and the sentence of it that does."""

    question: str
    document: str
    sentence: str


class Load:
    """Asks for facts of a corpus, and searches them, until its `running` block ends.

    The model is made to answer with the very sentence of the fact, so that an answer that is cut,
    mixed with another caller's, or made from other passages shows.
    """

    def __init__(self, client: Client, corpus: str, facts: list[Fact]) -> None:
        self.failures: list[TworoadsError] = []
        self.asked = 0
        self.searched = 0
        self._client = client
        self._corpus = corpus
        self._facts = facts

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """A wrong answer ends the block with an AssertionError."""
        async with asyncio.TaskGroup() as callers:
            tasks = [
                callers.create_task(self._repeat(call, fact))
                for fact in self._facts
                for call in (self._ask, self._search)
            ]
            yield
            for task in tasks:
                task.cancel()

    async def answered(self) -> None:
        """Wait until calls of both kinds that have not begun yet were answered."""
        under_way = len(self._facts)
        asked, searched = self.asked + under_way, self.searched + under_way
        await until(lambda: self.asked > asked and self.searched > searched)

    async def _repeat(self, call: Callable[[Fact], Awaitable[None]], fact: Fact) -> None:
        while True:
            try:
                await call(fact)
            except TworoadsError as error:
                self.failures.append(error)
            await asyncio.sleep(PAUSE_SECONDS)

    async def _ask(self, fact: Fact) -> None:
        schema = json.dumps({"const": fact.sentence})
        answer = await self._client.ask(
            fact.question, self._corpus, "rag", limit=2, json_schema=schema
        )
        assert answer.text == json.dumps(fact.sentence)
        assert (answer.path, answer.finish) == ("rag", "stop")
        assert answer.passages[0].document == fact.document
        assert fact.sentence in answer.passages[0].text
        assert [c.document for c in answer.citations] == [fact.document]
        assert answer.citations[0].quote == fact.sentence
        self.asked += 1

    async def _search(self, fact: Fact) -> None:
        passages = await self._client.search(fact.question, self._corpus)
        assert passages[0].document == fact.document
        assert fact.sentence in passages[0].text
        self.searched += 1
