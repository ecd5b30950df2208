"""A question set in a folder, ingested into a running stack for one measurement."""

import json
import os
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from clients import files
from clients.client import Client
from clients.documents import Ingested


@dataclass(frozen=True)
class Question:
    """A question, the answers that are right, and the ids of the documents that hold them."""

    id: str
    text: str
    answers: list[str]
    relevant: list[str]


@dataclass(frozen=True)
class QuestionSet:
    """A folder with corpus.jsonl {id, title, text} and questions.jsonl {id, question, answers,
    relevant}."""

    folder: Path

    def questions(self) -> list[Question]:
        with (self.folder / "questions.jsonl").open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        return [
            Question(str(r["id"]), r["question"], r.get("answers", []), r.get("relevant", []))
            for r in rows
        ]

    @asynccontextmanager
    async def ingested(self, client: Client) -> AsyncIterator[str]:
        """Ingest the corpus under a name of its own; delete it at the end."""
        name = f"benchmark-{uuid.uuid4().hex[:8]}"
        await client.create_corpus(name, allow_existing=False)
        try:
            found = files.find([self.folder / "corpus.jsonl"])
            async for news in client.ingest(name, files.documents(found)):
                if isinstance(news, Ingested) and news.outcome == "failed":
                    raise RuntimeError(f"{news.id}: {news.message}")
            yield name
        finally:
            await client.delete_corpus(name)


def question_set(argument: str) -> QuestionSet:
    """Return the question set that an argument or TWOROADS_DATA names; end with a sentence if there
    is none."""
    folder = Path(argument or os.environ.get("TWOROADS_DATA", ""))
    if not (folder / "corpus.jsonl").is_file() or not (folder / "questions.jsonl").is_file():
        sys.exit("Name a folder with corpus.jsonl and questions.jsonl, or set TWOROADS_DATA to it.")
    return QuestionSet(folder)
