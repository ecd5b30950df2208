"""The sample's questions: what they ask stands in the sample's documents."""

import json
from pathlib import Path

import pytest

from clients.documents import Ingested
from clients.files import documents, find
from services.questions.normalising import normalised
from services.retrieval.parsing import parse

EXAMPLES = Path(__file__).parents[1] / "examples"


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (EXAMPLES / name).read_text().splitlines()]


QUESTIONS = lines("handbook-questions.jsonl")


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """The text of each document of the handbook, by the id that an ingest gives it."""
    found = {}
    for document in documents(find([EXAMPLES / "handbook"])):
        assert not isinstance(document, Ingested)
        found[document.id] = " ".join(parse(document.content, document.media_type).text.split())
    return found


def test_every_right_answer_stands_in_the_relevant_document(texts):
    for line in QUESTIONS:
        for id in line["relevant"]:
            missing = [answer for answer in line["answers"] if answer not in texts[id]]
            assert not missing, line
        assert line["answers"] and line["relevant"]


def test_every_document_is_asked_about(texts):
    assert {id for line in QUESTIONS for id in line["relevant"]} == set(texts)
    assert len(QUESTIONS) >= 60


def test_no_question_is_asked_twice_or_is_training_data(texts):
    asked = [normalised(line["question"]) for line in QUESTIONS]
    trained = {normalised(line["question"]) for line in lines("house-style.jsonl")}
    trained |= {normalised(line["question"]) for line in lines("handbook/answers.jsonl")}
    assert len(set(asked)) == len(asked) and not trained & set(asked)
