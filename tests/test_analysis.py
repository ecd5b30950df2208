from dataclasses import replace

import numpy as np
import pytest

from services.evaluation.analysis import Measured, analyse
from services.evaluation.comparison import (
    Answer,
    Candidate,
    Plan,
    Prices,
    Question,
    Quote,
    Scoring,
)
from services.questions.overlap import Overlap

BASE = Candidate("base", "base")
RAG = Candidate("rag", "rag", corpus="papers")
TUNED = Candidate("tuned", "tuned", adapter="tone@1")
HYBRID = Candidate("hybrid", "hybrid", adapter="tone@1", corpus="papers")
PRICES = Prices("EUR", answering_second=0.01, training_second=0.1, answers_per_training=1000)
QUOTE = Quote(0, 5, "d1", "words")


def questions(count, **fields):
    return [
        Question(line, f"What is {line}?", (f"right {line}",), (f"d{line}",), **fields)
        for line in range(1, count + 1)
    ]


def answer(sequence, candidate, line, right=True, **fields):
    """Return an answer, sent at its sequence number in seconds, that takes 500 ms."""
    fields = {
        "phase": "answers",
        "time": float(sequence),
        "total_ms": 500.0,
        "first_text_ms": 100.0,
        "text": f"right {line}" if right else "wrong",
        "strict": float(right),
        "format_blind": float(right),
        **fields,
    }
    if fields.get("error"):
        fields |= {"strict": None, "format_blind": None, "text": "", "first_text_ms": None}
    return Answer(sequence=sequence, candidate=candidate, line=line, **fields)


def answers(candidate, rights, first=1, **fields):
    """Return an answer to each question from line 1 on, right or wrong."""
    return [
        answer(first + number, candidate, number + 1, bool(right), **fields)
        for number, right in enumerate(rights)
    ]


def errors(candidate, reasons, first=1):
    return [
        answer(first + number, candidate, number + 1, error=reason)
        for number, reason in enumerate(reasons)
    ]


def measured(asked, given, candidates=(BASE,), corpus="papers", plan=None, **fields):
    fields = {
        "plan": Plan(candidates, corpus=corpus, concurrency=2, **(plan or {})),
        "prices": PRICES,
        "questions": asked,
        "answers": given,
        "found": {},
        "overlaps": {},
        "training_seconds": {},
        "indexing_seconds": {},
        "changed_at": 0.0,
        "embeddings": None,
        "embedder_hash": "",
        **fields,
    }
    return Measured(**fields)


def result(outcome, candidate):
    return next(result for result in outcome.results if result.candidate == candidate)


def test_scores_are_means_of_what_was_answered():
    given = answers("base", [1, 1, 0, 1, 0, 0, 0, 0, 0])
    given += [answer(10, "base", 10, error="GENERATION_UNAVAILABLE")]
    given = [replace(one, strict=None if one.error else 0.0) for one in given]
    base = result(analyse(measured(questions(10), given)), "base")
    assert not base.failed
    assert base.errors == {"GENERATION_UNAVAILABLE": 1}
    assert base.scores.answers == 9
    assert base.scores.strict.value == 0.0
    assert base.scores.format_blind.value == pytest.approx(3 / 9)
    assert 0 <= base.scores.format_blind.low < 3 / 9 < base.scores.format_blind.high <= 1
    assert base.scores.judge is None


def test_what_the_judge_says_is_a_mean_of_its_own():
    given = [replace(one, judge=0.25) for one in answers("base", [1, 1, 0])]
    assert result(analyse(measured(questions(3), given)), "base").scores.judge.value == 0.25


@pytest.mark.parametrize(("failures", "failed"), [(0, False), (2, False), (3, True), (10, True)])
def test_a_candidate_that_failed_on_more_than_a_fifth_is_named_and_not_compared(failures, failed):
    given = errors("base", ["QUEUE_FULL"] * failures)
    given += [answer(line, "base", line) for line in range(failures + 1, 11)]
    given += answers("rag", [1, 0] * 5, first=20)
    outcome = analyse(measured(questions(10), given, (BASE, RAG)))
    base = result(outcome, "base")
    assert base.failed is failed
    assert base.errors == ({"QUEUE_FULL": failures} if failures else {})
    assert base.scores.answers == (0 if failed else 10 - failures)
    assert (base.scores.strict is None) is failed
    assert len(outcome.differences) == (0 if failed else 1)
    assert not result(outcome, "rag").failed


def test_errors_are_counted_by_reason():
    given = errors("base", ["QUEUE_FULL", "STOPPING", "QUEUE_FULL"])
    base = result(analyse(measured(questions(3), given)), "base")
    assert base.errors == {"QUEUE_FULL": 2, "STOPPING": 1}


def test_every_pair_that_did_not_fail_is_compared_on_what_both_answered():
    given = answers("base", [0] * 10) + answers("rag", [1] * 10, first=20)
    given += answers("tuned", [1] * 9, first=40) + [answer(60, "tuned", 10, error="QUEUE_FULL")]
    given += errors("hybrid", ["QUEUE_FULL"] * 10, first=80)
    outcome = analyse(measured(questions(10), given, (BASE, RAG, TUNED, HYBRID)))
    pairs = {(pair.first, pair.second): pair for pair in outcome.differences}
    assert set(pairs) == {("base", "rag"), ("base", "tuned"), ("rag", "tuned")}
    assert pairs["base", "rag"].questions == 10
    assert pairs["base", "tuned"].questions == 9
    assert pairs["base", "rag"].format_blind.value == -1.0


def test_the_later_answer_counts_if_a_question_was_asked_twice():
    given = errors("base", ["STOPPING"]) + [answer(2, "base", 1), answer(3, "base", 2, False)]
    base = result(analyse(measured(questions(2), given)), "base")
    assert (base.scores.answers, base.scores.strict.value, base.errors) == (2, 0.5, {})


def test_what_degraded_or_found_nothing_is_counted_and_scored():
    given = [
        answer(1, "rag", 1, degraded=("RERANKING",)),
        answer(2, "rag", 2, no_evidence=True),
        answer(3, "rag", 3),
    ]
    rag = result(analyse(measured(questions(3), given, (RAG,))), "rag")
    assert (rag.degraded, rag.no_evidence, rag.scores.answers) == (1, 1, 3)


def test_tokens_are_means_of_what_was_answered():
    given = [
        answer(1, "base", 1, input_tokens=10, output_tokens=1),
        answer(2, "base", 2, input_tokens=20, output_tokens=4),
        answer(3, "base", 3),
        answer(4, "base", 4),
        answer(5, "base", 5),
        answer(6, "base", 6, error="QUEUE_FULL", input_tokens=1000),
    ]
    base = result(analyse(measured(questions(6), given)), "base")
    assert (base.input_tokens, base.output_tokens) == (6.0, 1.0)


def test_the_first_answers_are_cold_and_the_others_warm():
    given = [
        answer(number, "base", number, time=100.0 - number, total_ms=10.0 * number)
        for number in range(1, 8)
    ]
    given[0] = replace(given[0], first_text_ms=None)  # an answer without text: its end counts
    base = result(analyse(measured(questions(7), given)), "base")
    # Those sent first are the last two of the list.
    assert (base.cold.answers, base.cold.concurrency) == (2, 2)
    assert (base.cold.total_p50_ms, base.cold.first_text_p50_ms) == (65.0, 100.0)
    assert (base.warm.answers, base.warm.concurrency) == (5, 2)
    assert (base.warm.total_p50_ms, base.warm.total_p95_ms) == (30.0, pytest.approx(48.0))
    assert base.warm.first_text_p95_ms == 100.0


def test_a_comparison_as_small_as_its_concurrency_has_no_warm_latency():
    base = result(analyse(measured(questions(2), answers("base", [1, 0]))), "base")
    assert base.warm is None
    assert base.cold.answers == 2


def test_costs_are_those_of_the_seconds_in_which_any_answer_was_on_its_way():
    given = [
        answer(1, "tuned", 1, time=0.0, total_ms=2000.0),
        answer(2, "tuned", 2, time=0.5, total_ms=500.0),  # within the first
        answer(3, "tuned", 3, False, time=1.5, total_ms=1500.0),
        answer(4, "tuned", 4, False, time=100.0, total_ms=1000.0),
    ]
    plain = measured(questions(4), given, (TUNED,))
    tuned = result(analyse(plain), "tuned")
    assert tuned.training_seconds is None
    assert tuned.cost_per_thousand == pytest.approx(1000 * 4 / 4 * 0.01)
    assert tuned.cost_per_correct == pytest.approx(4 * 0.01 / 2)
    trained = replace(plain, training_seconds={"tone@1": 50.0})
    tuned = result(analyse(trained), "tuned")
    assert tuned.training_seconds == 50.0
    assert tuned.cost_per_thousand == pytest.approx(1000 * (0.01 + 50 * 0.1 / 1000))
    assert tuned.cost_per_correct == pytest.approx((0.01 + 50 * 0.1 / 1000) * 2)


def test_failed_answers_cost_too():
    given = answers("base", [1] * 4) + [answer(5, "base", 5, error="TIMEOUT", total_ms=2000.0)]
    base = result(analyse(measured(questions(5), given)), "base")
    assert base.cost_per_thousand == pytest.approx(1000 * (4 * 0.5 + 2.0) / 4 * 0.01)


def test_without_a_right_answer_none_has_a_cost():
    base = result(analyse(measured(questions(3), answers("base", [0, 0, 0]))), "base")
    assert base.cost_per_correct is None
    assert base.cost_per_thousand > 0


@pytest.mark.parametrize(("strict_decides", "right"), [(False, 2), (True, 1)])
def test_what_is_right_is_told_by_the_score_that_decides(strict_decides, right):
    given = [answer(1, "base", 1, strict=0.0, format_blind=0.5), answer(2, "base", 2)]
    scoring = Scoring(strict_decides=strict_decides)
    base = result(analyse(measured(questions(2), given, plan={"scoring": scoring})), "base")
    assert base.cost_per_correct == pytest.approx(2 * 0.5 * 0.01 / right)


def test_what_search_found_is_measured_where_relevant_documents_are_known():
    asked = [
        Question(1, "a", ("x",), ("d1", "d2")),
        Question(2, "b", ("x",), ("d3",)),
        Question(3, "c", ("x",), ("d4",)),
        Question(4, "d", ("x",)),
    ]
    found = {"papers": {1: ("d1", "d9", "d2"), 2: ("d9", "d8", "d7", "d3"), 3: (), 4: ("d1",)}}
    given = answers("rag", [1] * 4) + answers("base", [1] * 4, first=10)
    outcome = analyse(measured(asked, given, (BASE, RAG), found=found))
    quality = result(outcome, "rag").retrieval
    assert quality.questions == 3
    assert [(at.k, at.recall.value) for at in quality.recall] == [
        (1, pytest.approx(0.5 / 3)),
        (3, pytest.approx(1 / 3)),
        (5, pytest.approx(2 / 3)),
        (10, pytest.approx(2 / 3)),
    ]
    both = (1 + 1 / np.log2(4)) / (1 + 1 / np.log2(3))
    assert quality.ndcg_10.value == pytest.approx((both + 1 / np.log2(5)) / 3)
    assert result(outcome, "base").retrieval is None


@pytest.mark.parametrize("found", [{}, {"papers": {}}, {"papers": {1: ("d1",)}}])
def test_without_relevant_documents_search_is_not_measured(found):
    asked = [replace(question, relevant=()) for question in questions(2)]
    rag = result(analyse(measured(asked, answers("rag", [1, 0]), (RAG,), found=found)), "rag")
    assert rag.retrieval is None
    assert rag.oracle is None


def test_supported_is_the_share_of_sentences():
    given = [
        answer(1, "rag", 1, quotes=(QUOTE, QUOTE, QUOTE), unsupported=1),
        answer(2, "rag", 2, unsupported=1),
        answer(3, "rag", 3),
    ]
    rag = result(analyse(measured(questions(3), given, (RAG,))), "rag")
    assert rag.supported.value == pytest.approx(3 / 5)
    base = [replace(one, candidate="base") for one in given]
    assert result(analyse(measured(questions(3), base)), "base").supported is None


def test_an_oracle_belongs_to_all_candidates_with_its_adapter():
    given = answers("base", [0, 0]) + answers("rag", [0, 1], first=10)
    given += answers("tuned", [0, 0], first=20) + answers("hybrid", [0, 0], first=30)
    given += answers("rag", [1, 1], first=40, phase="oracle")
    given += answers("hybrid", [1, 0], first=50, phase="oracle")
    outcome = analyse(measured(questions(2), given, (BASE, RAG, TUNED, HYBRID)))
    oracles = [result.oracle.format_blind.value for result in outcome.results]
    assert oracles == [1.0, 1.0, 0.5, 0.5]


def test_wrong_answers_have_kinds_with_some_examples():
    given = answers("base", [0] * 7 + [1]) + answers("rag", [1] * 8, first=100, phase="oracle")
    given += answers("rag", [0] * 8, first=200, documents=("d1",))
    outcome = analyse(measured(questions(8), given, (BASE, RAG)))
    (gap,) = result(outcome, "base").failures
    assert (gap.kind, gap.answers, gap.examples) == ("knowledge_gap", 7, (1, 2, 3, 4, 5))
    kinds = {share.kind: share.answers for share in result(outcome, "rag").failures}
    assert kinds == {"retrieval_miss": 7, "reading_failure": 1}
    assert outcome.failure_of[1] == "knowledge_gap"
    assert outcome.failure_of[200] == "reading_failure"
    assert 8 not in outcome.failure_of


def test_overlap_is_counted_and_scores_are_shown_without_it():
    given = answers("tuned", [1, 1, 1, 0]) + answers("base", [1] * 4, first=10)
    overlaps = {"tone@1": {1: "exact", 2: "near", 3: "shared_document", 99: "exact"}}
    outcome = analyse(measured(questions(4), given, (BASE, TUNED), overlaps=overlaps))
    tuned = result(outcome, "tuned")
    assert tuned.overlap == Overlap(4, exact=1, near=1, shared_document=1, lines=(1, 2, 3))
    assert tuned.without_overlap.answers == 1
    assert tuned.without_overlap.format_blind.value == 0.0
    assert tuned.scores.format_blind.value == 0.75
    assert result(outcome, "base").overlap is None


def test_no_overlap_is_told_from_unknown_examples():
    plain = measured(questions(2), answers("tuned", [1, 0]), (TUNED,))
    unknown = result(analyse(plain), "tuned")
    assert (unknown.overlap, unknown.without_overlap) == (None, None)
    none = result(analyse(replace(plain, overlaps={"tone@1": {}})), "tuned")
    assert (none.overlap, none.without_overlap) == (Overlap(2, 0, 0, 0, ()), None)


def test_if_all_overlaps_nothing_is_left_to_score():
    plain = measured(questions(2), answers("tuned", [1, 0]), (TUNED,))
    tuned = result(analyse(replace(plain, overlaps={"tone@1": {1: "near", 2: "near"}})), "tuned")
    assert tuned.without_overlap.answers == 0
    assert tuned.without_overlap.strict is None


def test_answers_after_the_change_are_new_old_or_neither():
    asked = [replace(one, stale_answers=(f"old {one.line}",)) for one in questions(4)]
    asked += [Question(5, "What is 5?", ("right 5",))]
    given = answers("hybrid", [0] * 5)
    texts = ["It is right 1.", "It was old 2, it is right 2.", "old 3", "I do not know"]
    given += [
        answer(10 + number, "hybrid", number + 1, time=60.0 - number, phase="staleness", text=text)
        for number, text in enumerate(texts)
    ]
    given += [answer(20, "hybrid", 5, time=51.0, phase="staleness")]
    plain = measured(asked, given, (HYBRID,), changed_at=50.0, training_seconds={"tone@1": 30.0})
    stale = result(analyse(plain), "hybrid").staleness
    assert stale.questions == 4
    shares = stale.new_share.value, stale.old_share.value, stale.neither_share.value
    assert shares == (0.5, 0.25, 0.25)
    assert stale.new_share.low < 0.5 < stale.new_share.high
    assert stale.seconds_to_follow == pytest.approx(59.5 - 50.0)  # the second one came first
    assert (stale.retraining_seconds, stale.retraining_cost) == (30.0, pytest.approx(3.0))


def test_only_what_searches_follows_and_only_adapters_are_trained_again():
    asked = [replace(one, stale_answers=("old",)) for one in questions(2)]
    given = answers("base", [1, 1]) + answers("base", [1, 1], first=10, phase="staleness")
    stale = result(analyse(measured(asked, given, changed_at=5.0)), "base").staleness
    assert stale.new_share.value == 1.0
    assert stale.seconds_to_follow is None
    assert (stale.retraining_seconds, stale.retraining_cost) == (None, None)


@pytest.mark.parametrize(
    ("new", "old", "text", "shares"),
    [
        ("Berlin", "Berlin Mitte", "Berlin Mitte", (0.0, 1.0)),
        ("Berlin Mitte", "Berlin", "Berlin Mitte", (1.0, 0.0)),
        ("Berlin", "Potsdam", "Not Potsdam any more but Berlin", (1.0, 0.0)),
        ("Berlin", "Potsdam", "Paris", (0.0, 0.0)),
    ],
)
def test_an_answer_that_is_right_both_ways_counts_as_what_it_is_closer_to(new, old, text, shares):
    asked = [Question(1, "Where?", (new,), stale_answers=(old,))]
    given = answers("rag", [0]) + [answer(2, "rag", 1, phase="staleness", text=text)]
    stale = result(analyse(measured(asked, given, (RAG,), changed_at=1.0)), "rag").staleness
    assert (stale.new_share.value, stale.old_share.value) == shares


def test_without_answers_after_a_change_there_is_no_staleness():
    asked = [replace(one, stale_answers=("old",)) for one in questions(2)]
    given = answers("rag", [1, 1]) + [
        answer(9, "rag", 1, phase="staleness", error="QUEUE_FULL"),
    ]
    assert result(analyse(measured(asked, given, (RAG,))), "rag").staleness is None


def test_indexing_takes_time_only_where_there_is_a_search():
    given = answers("rag", [1]) + answers("base", [1], first=5)
    plain = measured(questions(1), given, (BASE, RAG), indexing_seconds={"papers": 7.0})
    outcome = analyse(plain)
    assert result(outcome, "rag").indexing_seconds == 7.0
    assert result(outcome, "base").indexing_seconds is None


def by_heart(size=100, known=60, overlaps=None):
    """Return what was measured of an adapter that has the answers to the first questions by heart,
    and no others, while RAG finds three of four."""
    given = answers("rag", [row % 4 for row in range(size)])
    given += answers("tuned", [row < known for row in range(size)], first=1000)
    if overlaps is None:
        overlaps = {line: "exact" if line % 2 else "near" for line in range(1, known + 1)}
    return measured(questions(size), given, (RAG, TUNED), overlaps={"tone@1": overlaps})


def test_questions_that_an_adapter_was_trained_on_do_not_decide():
    outcome = analyse(by_heart())
    assert result(outcome, "tuned").scores.format_blind.value == 0.6  # what is shown has them
    assert outcome.verdict.candidate == "rag"
    assert (
        "40 questions (60 more do not count, for adapters were trained" in outcome.verdict.summary
    )
    assert any("100 questions are also in the training" in one for one in outcome.verdict.unknown)


def test_a_shared_document_alone_does_not_leave_a_question_out():
    shared = dict.fromkeys(range(1, 61), "shared_document")
    verdict = analyse(by_heart(overlaps=shared)).verdict
    assert "100 questions." in verdict.summary or "more questions" in verdict.summary
    assert "do not count" not in verdict.summary


@pytest.mark.parametrize("known", [80, 100])
def test_with_too_few_questions_that_no_adapter_has_seen_nothing_is_decided(known):
    verdict = analyse(by_heart(known=known)).verdict
    assert (verdict.candidate, verdict.reasons[0].code) == ("", "not_enough_evidence")
    assert f"{100 - known} questions ({known} more do not count" in verdict.reasons[0].message
    assert verdict.questions_needed == 30 - (100 - known)


def test_what_failed_on_its_training_questions_alone_leaves_the_others_in():
    plain = by_heart()
    failed = [
        replace(one, error="QUEUE_FULL", strict=None, format_blind=None)
        if one.candidate == "tuned"
        else one
        for one in plain.answers
    ]
    verdict = analyse(replace(plain, answers=failed)).verdict
    assert "on 100 questions" in verdict.summary


def test_changed_documents_decide_by_the_answers_after_the_change():
    # Before, the adapter had all by heart; afterwards it still says what is wrong now.
    plain = by_heart(known=100)
    asked = [replace(one, stale_answers=("old",)) for one in plain.questions[:50]]
    after = answers("rag", [row % 4 for row in range(50)], first=3000, phase="staleness")
    after += answers("tuned", [0] * 50, first=4000, phase="staleness")
    outcome = analyse(
        replace(
            plain,
            questions=[*asked, *plain.questions[50:]],
            answers=[*plain.answers, *after],
            changed_at=2500.0,
        )
    )
    assert outcome.verdict.candidate == "rag"
    assert "50 questions (50 more do not count" in outcome.verdict.summary
    assert "50 count as answered after the change" in outcome.verdict.summary
    assert result(outcome, "tuned").scores.format_blind.value == 1.0


def mixed(embedded=True, size=140):
    """Return what was measured of two types of question: RAG alone knows the facts, the adapter
    alone has the tone, which is asked for more often. Embeddings tell them apart."""
    knowing = 50
    asked = [
        Question(line, f"{line}?", ("x",), type="facts" if line <= knowing else "tone")
        for line in range(1, size + 1)
    ]
    facts = [line < knowing for line in range(size)]
    given = answers("rag", facts, first=1) + answers("tuned", [not one for one in facts], 1000)
    random = np.random.default_rng(0)
    vectors = random.normal(size=(size, 8)) * 0.1
    vectors[:, 0] += np.where(facts, 1.0, -1.0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return measured(
        asked,
        given,
        (RAG, TUNED),
        embeddings=vectors.astype(np.float32) if embedded else None,
        embedder_hash="e" * 64,
    )


def test_each_type_has_scores_of_its_own():
    outcome = analyse(mixed(embedded=False))
    scores = {
        (result.candidate, of_type.type): of_type.scores.format_blind.value
        for result in outcome.results
        for of_type in result.types
    }
    assert scores == {
        ("rag", "facts"): 1.0,
        ("rag", "tone"): 0.0,
        ("tuned", "facts"): 0.0,
        ("tuned", "tone"): 1.0,
    }


def test_of_very_many_types_the_most_frequent_are_scored():
    types = [f"type {line}" for line in range(120)] + ["often", "often"]
    asked = [replace(one, type=type) for one, type in zip(questions(122), types, strict=True)]
    base = result(analyse(measured(asked, answers("base", [1] * 122))), "base")
    scored = [of_type.type for of_type in base.types]
    assert scored == [f"type {line}" for line in range(99)] + ["often"]


def test_types_that_want_different_candidates_get_a_router_that_beats_the_single_best():
    verdict = analyse(mixed()).verdict
    taken = {type.type: type.candidate for type in verdict.types}
    assert (verdict.candidate, taken) == ("tuned", {"facts": "rag"})
    assert verdict.router_regret.value == pytest.approx(-50 / 140)
    assert verdict.router_regret.high < 0
    assert verdict.router.embedder_hash == "e" * 64
    assert [entry.type for entry in verdict.router.classes] == ["facts", "tone"]


def test_where_no_road_is_best_for_all_each_type_has_its_own():
    verdict = analyse(mixed(size=100)).verdict
    taken = {type.type: type.candidate for type in verdict.types}
    assert taken == {"facts": "rag", "tone": "tuned"}
    assert verdict.candidate in ("rag", "tuned")
    assert {reason.code for reason in verdict.reasons} >= {"knowledge_gap", "behaviour_gap"}
    assert verdict.summary.startswith("No one road is best for all 100 questions.")
    assert verdict.router and verdict.router_regret.high < 0
    assert verdict.questions_needed == 0


def test_a_type_without_relevant_documents_has_no_quality_of_search():
    plain = mixed()
    asked = [
        replace(one, relevant=(f"d{one.line}",)) if one.type == "facts" else one
        for one in plain.questions
    ]
    found = {"papers": {one.line: one.relevant for one in asked if one.relevant}}
    outcome = analyse(replace(plain, questions=asked, found=found))
    assert result(outcome, "rag").retrieval.questions == 50


def test_types_that_nothing_tells_apart_leave_the_verdict_open():
    verdict = analyse(mixed(embedded=False, size=100)).verdict
    assert (verdict.candidate, verdict.reasons[0].code) == ("", "not_enough_evidence")
    assert len(verdict.types) == 2


def test_a_router_that_cannot_tell_types_apart_is_measured_and_not_used():
    plain = mixed()
    same = np.ones_like(plain.embeddings) / np.sqrt(plain.embeddings.shape[1])
    verdict = analyse(replace(plain, embeddings=same)).verdict
    assert verdict.types
    assert verdict.router is None
    assert verdict.router_regret.high >= 0


def test_without_embeddings_there_is_no_router():
    verdict = analyse(mixed(embedded=False)).verdict
    assert (verdict.router, verdict.router_regret) == (None, None)


def test_types_that_agree_need_no_router():
    plain = mixed()
    asked = [replace(one, type="") for one in plain.questions]
    verdict = analyse(replace(plain, questions=asked)).verdict
    assert (verdict.types, verdict.router, verdict.router_regret) == ((), None, None)


def test_a_candidate_that_failed_is_compared_on_no_type():
    # It failed on a third, all of one type; on the other type it failed on none.
    asked = [replace(one, type="a" if one.line <= 10 else "b") for one in questions(30)]
    given = errors("base", ["QUEUE_FULL"] * 10)
    given += [answer(line, "base", line) for line in range(11, 31)]
    given += answers("rag", [1, 0] * 15, first=100)
    outcome = analyse(measured(asked, given, (BASE, RAG)))
    assert result(outcome, "base").failed
    assert result(outcome, "base").types == ()
    assert all(type.candidate != "base" for type in outcome.verdict.types)


NOTHING = measured([], [], (BASE, RAG))


@pytest.mark.parametrize(
    "case",
    [
        NOTHING,
        replace(NOTHING, questions=questions(3)),
        replace(NOTHING, questions=questions(3), answers=errors("base", ["STOPPING"] * 3)),
        measured(questions(1), answers("base", [1])),
        measured(questions(3), answers("base", [0, 0, 0]), corpus=""),
        measured(questions(6), answers("base", [1] * 6) + answers("rag", [1], 9), (BASE, RAG)),
        measured(
            questions(4),
            answers("base", [1, 1]) + [answer(9, "rag", 3), answer(10, "rag", 4)],
            (BASE, RAG),
        ),
        measured(questions(2), answers("base", [1, 0]) + answers("gone", [1, 0], 9)),
        measured(questions(2), answers("base", [1, 0, 1, 1])),
        measured(questions(2, type="one"), answers("base", [1, 0])),
    ],
    ids=[
        "no questions",
        "no answers",
        "all failed",
        "one question",
        "no corpus and nothing right",
        "one candidate answered one question alone",
        "no question answered by both",
        "a candidate that is not in the plan",
        "lines that are not scored",
        "one type",
    ],
)
def test_whatever_there_is_has_an_outcome(case):
    outcome = analyse(case)
    ids = [candidate.id for candidate in case.plan.candidates]
    assert [result.candidate for result in outcome.results] == ids
    for one in outcome.results:
        assert one.failed == (one.scores.answers == 0)


def test_the_same_answers_give_the_same_outcome():
    assert analyse(mixed()) == analyse(mixed())
