import json
import os
from pathlib import Path

import pytest

from services.evaluation import report
from services.evaluation.comparison import Answer, Candidate, Comparison, Plan, Question
from services.evaluation.outcome import (
    CandidateResult,
    Estimate,
    Latency,
    Outcome,
    PairDifference,
    Reason,
    Scores,
    Verdict,
)

NASTY = '<script>alert(1)</script>"><img src=x onerror=alert(2)> \u202eevil\x00 [a](http://b)'
SOME = Estimate(0.6, 0.5, 0.7)


def _write(folder: Path, count: int = 50, nasty: str = NASTY) -> tuple[str, str, dict[str, object]]:
    candidates = (Candidate("base", "base"), Candidate("rag", "rag", corpus="c"))
    comparison = Comparison(
        "c1", "t", "finished", Plan(candidates, "c"), count, 30, "h", 0.0, model="m"
    )
    questions = [Question(n, f"{nasty} {n}", (nasty,), type=nasty) for n in range(1, count + 1)]
    answers = [
        Answer(n * 2 + k, name, "answers", n, 0.0, 9.0, nasty, strict=float(k), format_blind=k)
        for n in range(1, count + 1)
        for k, name in enumerate(("base", "rag"))
    ]
    warm = Latency(count, 4, 10, 20, 100, 200)
    results = tuple(
        CandidateResult(
            name, Scores(count, SOME, SOME), warm=warm, cost_per_thousand=cost, errors={"E": 1}
        )
        for name, cost in (("base", 0.01), ("rag", 0.5))
    )
    pair = PairDifference(
        "rag", "base", count, SOME, SOME, 9, 1, 0.01, 0.02, True, False, 0.1, 0, False
    )
    verdict = Verdict("rag", "", "rag", (Reason("knowledge_gap", nasty),), nasty)
    report.write(folder, comparison, questions, answers, Outcome(results, (pair,), verdict))
    html, markdown = ((folder / f"report.{end}").read_text() for end in ("html", "md"))
    return html, markdown, json.loads((folder / "report.json").read_text())


def test_markup_of_strangers_is_shown_as_text(tmp_path: Path) -> None:
    html, markdown, _ = _write(tmp_path)
    for text in (html, markdown):
        assert "<script" not in text and "<img" not in text
        assert "&lt;script&gt;" in text
        assert "\u202e" not in text and "\x00" not in text
    assert "[a](" not in markdown
    assert "default-src 'none'" in html


def test_the_json_twin_has_everything(tmp_path: Path) -> None:
    data = _write(tmp_path)[2]
    assert data["outcome"]["verdict"]["candidate"] == "rag"  # type: ignore[index]
    assert data["comparison"]["questions"] == 50  # type: ignore[index]


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    html, markdown, _ = _write(tmp_path)
    for title in ("Retrieval", "After the documents changed", "By type of question"):
        assert f"<h2>{title}" not in html and f"## {title}" not in markdown
    assert "intervals are unreliable" in html
    assert "<h2>Differences" in html and "## Differences" in markdown


def test_ten_thousand_questions_with_long_texts_make_a_small_report(tmp_path: Path) -> None:
    html, markdown, _ = _write(tmp_path, 10_000, "x" * 100_000)
    assert len(html.encode()) < 2**20 and len(markdown.encode()) < 2**20
    assert "[… cut]" in html
    assert html.count('class="example"') == 10


def test_a_full_disk_leaves_the_report_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _write(tmp_path)[0]

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        _write(tmp_path, 60)
    assert (tmp_path / "report.html").read_text() == before
    assert not list(tmp_path.glob("*.part"))
