import json
import re
import resource
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from services.evaluation import report
from services.evaluation.comparison import Answer, Candidate, Comparison, Plan, Question
from services.evaluation.outcome import (
    CandidateResult,
    Estimate,
    FailureShare,
    Latency,
    Outcome,
    PairDifference,
    Reason,
    Scores,
    Verdict,
)
from services.evaluation.report import pictures
from services.runtime.disk import FULL

NASTY = '<script>alert(1)</script>"><img src=x onerror=alert(2)> \u202eevil\x00 [a](http://b)'
SOME = Estimate(0.6, 0.5, 0.7)
RAG = Candidate("rag", "rag", corpus="c")
WRONG = (FailureShare("retrieval_miss", 30, (1,)), FailureShare("reading_failure", 10, ()))


def _write(
    folder: Path, count: int = 50, nasty: str = NASTY, rag: Candidate = RAG, corpus: str = "c"
) -> tuple[str, str, dict[str, object]]:
    candidates = (Candidate("base", "base"), rag)
    comparison = Comparison(
        "c1", "t", "finished", Plan(candidates, corpus), count, 30, "h", 0.0, model="m"
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
            name,
            Scores(count, SOME, SOME),
            warm=warm,
            cost_per_thousand=cost,
            errors={"E": 1},
            failures=WRONG,
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


@pytest.mark.parametrize(
    ("rag", "corpus", "follows"),
    [
        (RAG, "c", True),
        (
            replace(RAG, options='{"limit": 3, "generate": {"max_tokens": 256, "seed": "7"}}'),
            "c",
            True,
        ),
        (replace(RAG, options='{"limit": 9}'), "c", False),
        (replace(RAG, options='{"examples": [{"question": "q", "answer": "a"}]}'), "c", False),
        (replace(RAG, corpus="other"), "c", False),
        (RAG, "", False),
    ],
)
def test_the_next_step_is_told_only_where_a_policy_can_say_it(
    tmp_path: Path, rag: Candidate, corpus: str, follows: bool
) -> None:
    html, markdown, _ = _write(tmp_path, rag=rag, corpus=corpus)
    assert ("comparisons apply c1" in html) == ("comparisons apply c1" in markdown) == follows


def test_wrong_answers_are_stacked_by_kind_in_bars_as_long_as_they_are_many(tmp_path: Path) -> None:
    html, _, _ = _write(tmp_path)
    found = re.findall(
        r'<rect class="(retrieval_miss|reading_failure)" .*? width="([0-9.]+)" h', html
    )
    bars = [(kind, float(width) + 1) for kind, width in found if width != "12"]
    assert [kind for kind, _ in bars] == ["retrieval_miss", "reading_failure"] * 2
    assert bars[0][1] == pytest.approx(3 * bars[1][1], rel=0.01)


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


def test_a_full_disk_leaves_the_report_that_was_there(tmp_path: Path) -> None:
    before = _write(tmp_path)[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # no file may be larger
    try:
        with pytest.raises(OSError) as error:
            _write(tmp_path, 60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno in FULL
    assert (tmp_path / "report.html").read_text() == before
    assert not list(tmp_path.glob("*.part"))


def test_names_of_candidates_that_are_near_each_other_do_not_overlap() -> None:
    names = [f"rag, {limit} passages" for limit in range(3, 9)]
    comparison = Comparison("c1", "t", "finished", Plan((RAG,), "c"), 50, 30, "h", 0.0, model="m")
    results = tuple(
        CandidateResult(name, Scores(50, SOME, SOME), cost_per_thousand=0.5) for name in names
    )
    verdict = Verdict("rag", "", "rag", (), "")
    drawn = str(pictures.quality(comparison, Outcome(results, (), verdict)))
    places = re.findall(r'class="label" x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]+)<', drawn)
    assert [name for _, _, name in places] == names
    for (x, y, name), (its_x, its_y, its_name) in combinations(places, 2):
        apart = abs(float(x) - float(its_x)) >= 3.5 * (len(name) + len(its_name))
        assert apart or abs(float(y) - float(its_y)) >= 14
