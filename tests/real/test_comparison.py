"""Which road? On the whole stack: a comparison as a user runs it, its verdict, AUTO after it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.real.stack import RunningStack, start_stack

ASKED = 40  # questions, each about a document of its own
FEW = 15
STARTS = ["Bram", "Cald", "Dorn", "Elv", "Fenn", "Gors", "Hald", "Jarn"]
ENDS = ["ia", "ock", "une", "ist", "orra"]
NAMES = [start + end for start in STARTS for end in ENDS]


def port(number: int) -> int:
    return 3000 + 137 * number


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    folder = tmp_path_factory.mktemp("documents")
    for number, name in enumerate(NAMES):
        text = f"The {name} service listens on port {port(number)}. It is restarted every night."
        (folder / f"{name}.txt").write_text(text)
    with start_stack(tmp_path_factory.mktemp("comparison")) as stack:
        stack.json("ingest", str(folder), "--corpus", "services")
        yield stack


def questions(folder: Path, count: int) -> Path:
    file = folder / "questions.jsonl"
    lines = [
        {
            "question": f"Which port does the {name} service listen on?",
            "answers": [str(port(number))],
            "relevant": [f"{name}.txt"],
        }
        for number, name in enumerate(NAMES[:count])
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


@pytest.fixture(scope="module")
def compared(stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """BASE against RAG on facts that no model knows, the verdict applied."""
    folder = tmp_path_factory.mktemp("questions")
    found: dict[str, Any] = stack.json(
        "compare",
        str(questions(folder, ASKED)),
        "--corpus",
        "services",
        "--paths",
        "base,rag",
        "--report",
        str(folder / "report.html"),
        "--apply",
    )
    found["report"] = str(folder / "report.html")
    return found


def test_facts_that_the_model_does_not_know_are_searched(compared: dict[str, Any]) -> None:
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
    answer = stack.json(
        "ask", "Which port does the Bramia service listen on?", "--corpus", "services"
    )
    assert (answer["path"], answer["reason"]) == ("rag", "POLICY")
    [policy] = stack.json("policies")
    assert policy["comparison"] == compared["id"]


def test_too_few_questions_decide_nothing_and_say_how_many_would(
    stack: RunningStack, tmp_path: Path
) -> None:
    found = stack.json(
        "compare", str(questions(tmp_path, FEW)), "--corpus", "services", "--paths", "base,rag"
    )
    verdict = found["verdict"]
    assert not verdict["candidate"]
    assert [reason["code"] for reason in verdict["reasons"]] == ["not_enough_evidence"]
    assert verdict["questions_needed"] >= 15
