"""Which road? On the whole stack: a comparison as a user runs it, its verdict, AUTO after it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.real.stack import RunningStack, start_stack

EXAMPLES = Path(__file__).parents[2] / "examples"
ASKED = 32  # questions: the fewest that a verdict needs, and two more
FEW = 15


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    with start_stack(tmp_path_factory.mktemp("comparison")) as stack:
        stack.json("ingest", str(EXAMPLES / "handbook"), "--corpus", "handbook")
        yield stack


def questions(folder: Path, count: int) -> Path:
    """The first questions of the sample, spread over its documents."""
    lines = (EXAMPLES / "handbook-questions.jsonl").read_text().splitlines()
    step = max(1, len(lines) // count)
    file = folder / "questions.jsonl"
    file.write_text("\n".join(lines[::step][:count]))
    return file


@pytest.fixture(scope="module")
def compared(stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """BASE against RAG on the sample company, the verdict applied."""
    folder = tmp_path_factory.mktemp("questions")
    found: dict[str, Any] = stack.json(
        "compare",
        str(questions(folder, ASKED)),
        "--corpus",
        "handbook",
        "--paths",
        "base,rag",
        "--report",
        str(folder / "report.html"),
        "--apply",
    )
    found["report"] = str(folder / "report.html")
    return found


def test_the_sample_company_should_search_and_is_told_why(compared: dict[str, Any]) -> None:
    verdict = compared["verdict"]
    assert verdict["path"] == "rag", verdict
    assert "knowledge_gap" in [reason["code"] for reason in verdict["reasons"]]
    scores = {result["candidate"]: result["scores"] for result in compared["results"]}
    assert scores["rag"]["format_blind"]["value"] > scores["base"]["format_blind"]["value"] + 0.3
    assert scores["rag"]["answers"] == ASKED


def test_the_report_names_the_verdict_and_every_candidate(compared: dict[str, Any]) -> None:
    text = Path(compared["report"]).read_text()
    assert compared["verdict"]["summary"].split(".")[0] in text
    assert all(result["candidate"] in text for result in compared["results"])


def test_every_answer_is_kept_with_its_citations(
    stack: RunningStack, compared: dict[str, Any]
) -> None:
    printed = stack.tworoads("comparisons", "answers", compared["id"])
    answers = [json.loads(line) for line in printed.splitlines()]
    first_pass = [answer for answer in answers if answer["phase"] == "answers"]
    assert len(first_pass) == 2 * ASKED
    assert {answer["candidate"] for answer in first_pass} == {"base", "rag"}
    assert any(answer["phase"] == "oracle" for answer in answers)
    assert any(answer["citations"] for answer in first_pass)


def test_auto_follows_the_verdict(stack: RunningStack, compared: dict[str, Any]) -> None:
    answer = stack.json("ask", "How many days of paid leave?", "--corpus", "handbook")
    assert (answer["path"], answer["reason"]) == ("rag", "POLICY")
    assert compared["id"] in answer["explanation"]


def test_too_few_questions_decide_nothing_and_say_how_many_would(
    stack: RunningStack, tmp_path: Path
) -> None:
    found = stack.json(
        "compare", str(questions(tmp_path, FEW)), "--corpus", "handbook", "--paths", "base,rag"
    )
    verdict = found["verdict"]
    assert not verdict["candidate"]
    assert [reason["code"] for reason in verdict["reasons"]] == ["not_enough_evidence"]
    assert verdict["questions_needed"] >= 15
