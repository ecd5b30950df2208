"""Why wrong answers are wrong."""

import pytest

from services.evaluation.comparison import Answer, Candidate, Plan, Question, Scoring
from services.evaluation.failures import kinds, right_answers

BASE = Candidate("base", "base")
RAG = Candidate("rag", "rag", corpus="docs")
TUNED = Candidate("tuned", "tuned", adapter="cards@1")
HYBRID = Candidate("hybrid", "hybrid", adapter="cards@1", corpus="docs")
CANDIDATES = (BASE, RAG, TUNED, HYBRID)
# Whose id the oracle answers of a candidate have: those of its adapter.
ORACLE = {"base": "rag", "rag": "rag", "tuned": "hybrid", "hybrid": "hybrid"}
FACTS = Scoring("exact_match", "contains", strict_decides=False)
LABELS = Scoring("label", "contains", strict_decides=True)
JSON = Scoring("json", "token_f1", strict_decides=True)
REGEX = Scoring("regex", "contains", strict_decides=True)
QUESTIONS = (
    Question(1, "Who owns Varel?", ("yuki",), ("varel",)),
    Question(2, "Who owns Solgan?", ("clara",)),
)


def answer(sequence, candidate, strict=0.0, blind=0.0, **more):
    more = {"phase": "answers", "line": 1, "text": "lena", **more}
    return Answer(
        sequence, candidate, time=0.0, total_ms=1.0, strict=strict, format_blind=blind, **more
    )


def kind(scoring, wrong, oracle=None, corpus="docs"):
    candidates = CANDIDATES if corpus else (BASE, TUNED)
    plan = Plan(candidates, corpus=corpus, scoring=scoring)
    given = [] if oracle is None else [oracle]
    found = kinds(plan, QUESTIONS, [wrong, *given])
    assert set(found) == {wrong.sequence}
    return found[wrong.sequence]


@pytest.mark.parametrize(
    ("candidate", "documents", "expected"),
    [
        ("base", (), "knowledge_gap"),
        ("tuned", (), "knowledge_gap"),
        ("rag", ("solgan", "port"), "retrieval_miss"),
        ("rag", (), "retrieval_miss"),
        ("hybrid", ("solgan",), "retrieval_miss"),
        ("rag", ("solgan", "varel"), "reading_failure"),
        ("hybrid", ("varel",), "reading_failure"),
    ],
)
def test_what_is_right_with_the_document_lacks_it_or_did_not_read_it(
    candidate, documents, expected
):
    oracle = answer(9, ORACLE[candidate], 1.0, 1.0, phase="oracle", text="yuki")
    assert kind(FACTS, answer(1, candidate, documents=documents), oracle) == expected


@pytest.mark.parametrize("candidate", ["base", "rag", "tuned", "hybrid"])
@pytest.mark.parametrize(
    ("scoring", "text", "blind", "expected"),
    [
        (LABELS, "clara", 0.0, "reading_failure"),  # another label: the form is right
        (LABELS, "Clara.", 0.0, "reading_failure"),
        (LABELS, "It is Yuki", 1.0, "behaviour_gap"),
        (LABELS, "somebody", 0.0, "behaviour_gap"),
        (JSON, '{"owner": "lena"}', 0.0, "reading_failure"),
        (JSON, '```json\n{"owner": "yuki"}\n```', 1.0, "behaviour_gap"),
        (JSON, "lena", 0.0, "behaviour_gap"),
        (REGEX, "It is yuki", 1.0, "behaviour_gap"),
        (REGEX, "lena", 0.0, "reading_failure"),
        (FACTS, "lena", 0.0, "reading_failure"),
    ],
)
def test_what_is_wrong_even_with_the_document_is_wrong_in_form_or_in_substance(
    candidate, scoring, text, blind, expected
):
    oracle = answer(9, ORACLE[candidate], 0.0, blind, phase="oracle", text=text)
    assert kind(scoring, answer(1, candidate, text="somebody"), oracle) == expected


@pytest.mark.parametrize(
    ("scoring", "wrong", "expected"),
    [
        (LABELS, answer(1, "base", text="no label"), "behaviour_gap"),
        (LABELS, answer(1, "base", text="clara"), "unspecified"),
        (LABELS, answer(1, "rag", text="no label"), "behaviour_gap"),
        (FACTS, answer(1, "base"), "unspecified"),
        (FACTS, answer(1, "rag", documents=("solgan",)), "retrieval_miss"),
        (FACTS, answer(1, "rag", documents=("varel",)), "reading_failure"),
        (FACTS, answer(1, "rag", documents=("varel",), line=2), "unspecified"),
        (FACTS, answer(1, "rag", line=2), "unspecified"),
        (JSON, answer(1, "hybrid", text="{"), "behaviour_gap"),
    ],
)
def test_without_an_answer_with_the_document_less_can_be_told(scoring, wrong, expected):
    assert kind(scoring, wrong) == expected


def test_an_oracle_answer_that_failed_tells_nothing():
    failed = answer(9, "rag", None, None, phase="oracle", error="GENERATION_UNAVAILABLE")
    assert kind(FACTS, answer(1, "base"), failed) == "unspecified"


def test_the_oracle_of_another_adapter_or_line_tells_nothing():
    other = answer(9, "hybrid", 1.0, 1.0, phase="oracle")
    assert kind(FACTS, answer(1, "base"), other) == "unspecified"
    other = answer(9, "rag", 1.0, 1.0, phase="oracle", line=2)
    assert kind(FACTS, answer(1, "base"), other) == "unspecified"


def test_without_a_corpus_nothing_is_asked_with_the_document():
    assert kind(LABELS, answer(1, "base", text="?"), corpus="") == "behaviour_gap"
    assert kind(LABELS, answer(1, "tuned", text="clara"), corpus="") == "unspecified"


def test_only_wrong_answers_that_are_scored_have_a_kind():
    plan = Plan(CANDIDATES, corpus="docs", scoring=FACTS, unscored=(2,))
    answers = [
        answer(1, "base", 0.0, 1.0),  # the format-blind score decides
        answer(2, "base", 1.0, 0.49),
        answer(3, "base", 0.0, 0.5),
        answer(4, "base", None, None, error="GENERATION_UNAVAILABLE"),
        answer(5, "base", line=2),
        answer(8, "base", error="DEADLINE"),  # failed half way
        answer(6, "base", phase="staleness"),
        answer(7, "rag", phase="oracle"),
    ]
    assert set(kinds(plan, QUESTIONS, answers)) == {2}


def test_the_strict_score_decides_where_it_is_to():
    plan = Plan(CANDIDATES, corpus="docs", scoring=LABELS)
    answers = [answer(1, "base", 0.0, 1.0), answer(2, "base", 1.0, 0.0)]
    assert kinds(plan, QUESTIONS, answers) == {1: "behaviour_gap"}


@pytest.mark.parametrize(
    ("phase", "changing", "right"),
    [
        ("answers", True, ("old",)),
        ("oracle", True, ("old",)),
        ("staleness", True, ("new",)),
        ("analysis", True, ("new",)),
        ("answers", False, ("new",)),
        ("oracle", False, ("new",)),
    ],
)
def test_stale_answers_are_right_until_the_documents_change(phase, changing, right):
    question = Question(1, "Who?", ("new",), stale_answers=("old",))
    assert right_answers(question, phase, changing) == right
    unchanged = Question(1, "Who?", ("new",))
    assert right_answers(unchanged, phase, changing) == ("new",)
