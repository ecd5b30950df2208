from dataclasses import dataclass, replace

import pytest

from services.evaluation.comparison import Candidate, Constraints, Plan, Scoring
from services.evaluation.outcome import (
    CandidateResult,
    Estimate,
    FailureShare,
    Latency,
    PairDifference,
    Scores,
    Staleness,
)
from services.evaluation.verdict import Part, decide
from services.questions.overlap import Overlap

BASE = Candidate("base", "base")
FEW_SHOT = Candidate("few-shot", "base", options='{"examples": [{"role": "x"}]}')
RAG = Candidate("rag", "rag", corpus="docs")
TUNED = Candidate("tuned", "tuned", "style@1")
HYBRID = Candidate("hybrid", "hybrid", "style@1", "docs")
COSTS = {"base": 1.0, "few-shot": 1.2, "rag": 2.0, "tuned": 1.5, "hybrid": 5.0, "copy": 2.0}
FOUR = (BASE, RAG, TUNED, HYBRID)


def near(value: float, half: float = 0.02) -> Estimate:
    return Estimate(value, value - half, value + half)


def pair(first: str, second: str, value: float, half: float, needed: int = 80) -> PairDifference:
    gap = near(value, half)
    apart = gap.low > 0 or gap.high < 0
    settled = apart or half < 0.05 - abs(value)
    p = 0.001 if apart else 0.5
    return PairDifference(
        first, second, 100, gap, gap, 10, 10, p, p, gap.low > -0.05, gap.high < 0.05, 0.1,
        0 if settled else needed, True,
    )  # fmt: skip


def part(scores: dict[str, float], half: float = 0.03, questions: int = 100) -> Part:
    """Candidates with these scores; all intervals of differences have this half width."""
    results = tuple(
        CandidateResult(
            name,
            Scores(questions, near(score), near(score)),
            cost_per_thousand=COSTS[name],
            cost_per_correct=COSTS[name] / 1000 / score if score else None,
            warm=Latency(questions, 4, 10, 20, 100, COSTS[name] * 100),
        )
        for name, score in scores.items()
    )
    names = list(scores)
    pairs = tuple(
        pair(one, other, scores[one] - scores[other], half)
        for number, one in enumerate(names)
        for other in names[number + 1 :]
    )
    return Part(results, pairs, questions, questions)


def plan(*candidates: Candidate, **changes) -> Plan:
    return Plan(candidates or FOUR, **changes)


def codes(verdict) -> list[str]:
    return [reason.code for reason in verdict.reasons]


def changed(whole: Part, name: str, **changes) -> Part:
    return replace(
        whole,
        results=tuple(
            replace(result, **changes) if result.candidate == name else result
            for result in whole.results
        ),
    )


@dataclass(frozen=True)
class Case:
    name: str
    scores: dict[str, float]
    candidate: str
    codes: tuple[str, ...]
    half: float = 0.03
    questions: int = 100
    constraints: Constraints = Constraints()
    copy: bool = False


CASES = (
    Case("facts", {"base": 0.0, "rag": 0.82, "tuned": 0.01, "hybrid": 0.38}, "rag",
         ("knowledge_gap",)),
    Case("form", {"base": 0.3, "rag": 0.3, "tuned": 0.9, "hybrid": 0.8}, "tuned",
         ("behaviour_gap",)),
    Case("both", {"base": 0.05, "rag": 0.16, "tuned": 0.14, "hybrid": 0.66}, "hybrid",
         ("knowledge_gap", "behaviour_gap")),
    Case("15 questions", {"base": 0.0, "rag": 0.82}, "", ("not_enough_evidence",),
         questions=15),
    Case("a cap on cost", {"base": 0.2, "rag": 0.6, "hybrid": 0.9}, "rag",
         ("cost_cap", "knowledge_gap"), constraints=Constraints(max_cost_per_correct=0.004)),
    Case("a cap on latency", {"base": 0.2, "rag": 0.6, "hybrid": 0.9}, "rag",
         ("latency_cap", "knowledge_gap"), constraints=Constraints(max_p95_ms=250)),
    Case("a least quality", {"base": 0.2, "rag": 0.6, "hybrid": 0.62}, "hybrid",
         ("knowledge_gap",), constraints=Constraints(min_quality=0.61)),
    Case("impossible", {"base": 0.2, "rag": 0.6}, "", ("constraints_impossible",),
         constraints=Constraints(min_quality=0.9)),
    Case("two copies", {"rag": 0.6, "copy": 0.6}, "rag", ("tie_cheaper",), copy=True),
    Case("a tie", {"base": 0.2, "rag": 0.80, "hybrid": 0.81}, "rag",
         ("knowledge_gap", "tie_cheaper")),
    Case("examples for nothing", {"base": 0.2, "few-shot": 0.8, "tuned": 0.81}, "few-shot",
         ("tie_cheaper",)),
    Case("nothing helps", {"base": 0.9, "rag": 0.7, "tuned": 0.6}, "base", ("tie_cheaper",)),
    Case("a cheaper one is unclear", {"base": 0.70, "rag": 0.76}, "",
         ("not_enough_evidence",), half=0.1),
    Case("a dearer one is unclear", {"base": 0.70, "rag": 0.68}, "",
         ("not_enough_evidence",), half=0.1),
    Case("unclear ones that cannot win", {"base": 0.1, "tuned": 0.12, "rag": 0.8}, "rag",
         ("knowledge_gap",), half=0.1),
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_rule(case: Case) -> None:
    known = {one.id: one for one in (*FOUR, FEW_SHOT, Candidate("copy", "rag", corpus="docs"))}
    asked = plan(*(known[name] for name in case.scores), constraints=case.constraints)
    verdict = decide(asked, part(case.scores, case.half, case.questions), {})
    assert (verdict.candidate, tuple(codes(verdict))) == (case.candidate, case.codes)
    undecided = case.codes == ("not_enough_evidence",)
    assert (verdict.questions_needed > 0) is undecided
    if case.candidate:
        chosen = known[case.candidate]
        assert (verdict.path, verdict.adapter) == (chosen.path, chosen.adapter)
        assert case.candidate in verdict.summary
    else:
        assert (verdict.path, verdict.adapter) == ("", "")
    if case.copy:
        assert "no difference" in verdict.summary
    assert verdict.would_change


def test_too_few_questions_say_how_many_are_missing() -> None:
    verdict = decide(plan(BASE, RAG), part({"base": 0.0, "rag": 0.8}, questions=12), {})
    assert verdict.questions_needed == 18
    assert "18 more questions" in verdict.summary


def test_too_few_clusters_do_not_decide() -> None:
    whole = replace(part({"base": 0.0, "rag": 0.8}), clusters=4)
    assert codes(decide(plan(BASE, RAG), whole, {})) == ["not_enough_evidence"]


def test_an_unclear_pair_says_how_many_questions_it_needs() -> None:
    verdict = decide(plan(BASE, RAG), part({"base": 0.7, "rag": 0.76}, half=0.1), {})
    assert verdict.questions_needed == 80
    assert "base and rag" in verdict.reasons[0].message


def test_what_the_contenders_have_in_common_is_known_though_none_is_chosen() -> None:
    whole = part({"base": 0.0, "rag": 0.05, "tuned": 0.92, "hybrid": 0.91}, half=0.08)
    verdict = decide(plan(), whole, {})
    assert codes(verdict) == ["not_enough_evidence", "behaviour_gap"]
    assert "between tuned and hybrid. The others are clearly worse; tuned is" in verdict.summary


def test_types_are_corrected_for_how_many_they_are() -> None:
    whole = part({"base": 0.5, "tuned": 0.7}, half=0.3)
    better = part({"base": 0.3, "tuned": 0.9})
    barely = replace(
        better, differences=tuple(replace(one, adjusted_p_value=0.03) for one in better.differences)
    )
    assert decide(plan(BASE, TUNED), barely, {}).candidate == "tuned"
    for types, found in (({"a": barely}, ["a"]), ({"a": barely, "b": whole}, [])):
        verdict = decide(plan(BASE, TUNED), whole, types)
        assert [one.type for one in verdict.types] == found


def test_impossible_limits_are_named_for_each_candidate() -> None:
    limits = Constraints(max_p95_ms=150, min_quality=0.5)
    verdict = decide(plan(BASE, RAG, constraints=limits), part({"base": 0.2, "rag": 0.8}), {})
    (reason,) = verdict.reasons
    assert "base scores 20 %" in reason.message
    assert "rag takes 200 ms" in reason.message


def test_a_cost_of_correct_answers_needs_correct_answers() -> None:
    limits = Constraints(max_cost_per_correct=1)
    verdict = decide(plan(BASE, constraints=limits), part({"base": 0.0}), {})
    assert codes(verdict) == ["constraints_impossible"]


def test_what_failed_is_named_and_not_taken() -> None:
    whole = changed(
        part({"base": 0.2, "rag": 0.9}), "rag", failed=True, errors={"GENERATION_UNAVAILABLE": 90}
    )
    verdict = decide(plan(BASE, RAG), whole, {})
    assert verdict.candidate == "base"
    assert any("rag failed" in text and "90 times" in text for text in verdict.unknown)


def test_the_share_of_knowledge_gaps_is_in_the_reason() -> None:
    shares = (FailureShare("knowledge_gap", 75, ()), FailureShare("behaviour_gap", 25, ()))
    whole = changed(part({"base": 0.0, "rag": 0.8}), "base", failures=shares)
    reason = decide(plan(BASE, RAG), whole, {}).reasons[0]
    assert "75 % lack knowledge" in reason.message
    assert "80 points" in reason.message


def test_facts_that_change_are_a_reason_for_what_follows_them() -> None:
    whole = part({"base": 0.0, "rag": 0.8, "tuned": 0.1})
    whole = changed(whole, "rag", staleness=Staleness(40, near(0.8), near(0.1), near(0.1), 2.0))
    whole = changed(whole, "tuned", staleness=Staleness(40, near(0.0), near(0.5), near(0.5)))
    verdict = decide(plan(BASE, RAG, TUNED), whole, {})
    assert codes(verdict) == ["knowledge_gap", "facts_change"]
    assert "old answer to 50 %" in verdict.reasons[1].message


def test_overlap_with_training_data_is_counted_with_both_scores() -> None:
    whole = changed(
        part({"base": 0.3, "tuned": 0.9}),
        "tuned",
        overlap=Overlap(100, 7, 3, 2, (1, 2)),
        without_overlap=Scores(88, near(0.85), near(0.85)),
    )
    verdict = decide(plan(BASE, TUNED), whole, {})
    (text,) = [text for text in verdict.unknown if "training data of tuned:" in text]
    assert "12 of 100 questions" in text
    assert "7 exactly, 3 nearly, 2 by document" in text
    assert "90 % with them and 85 % without" in text


def test_an_adapter_that_reads_badly_is_warned_of() -> None:
    verdict = decide(plan(), part({"base": 0.3, "rag": 0.3, "tuned": 0.9, "hybrid": 0.6}), {})
    assert any("never have been trained with passages" in text for text in verdict.unknown)


def test_types_are_named_where_another_candidate_is_decided() -> None:
    asked = plan(BASE, RAG, TUNED)
    whole = part({"base": 0.2, "rag": 0.7, "tuned": 0.5})
    types = {
        "facts": part({"base": 0.1, "rag": 0.9, "tuned": 0.1}),
        "form": part({"base": 0.3, "rag": 0.4, "tuned": 0.9}),
        "few": part({"base": 0.3, "rag": 0.4, "tuned": 0.9}, questions=29),
        "unclear": part({"base": 0.3, "rag": 0.4, "tuned": 0.45}, half=0.2),
    }
    verdict = decide(asked, whole, types)
    assert [(one.type, one.candidate, one.adapter) for one in verdict.types] == [
        ("form", "tuned", "style@1")
    ]
    assert verdict.types[0].reasons[0].code == "behaviour_gap"


def test_the_score_that_decides_is_the_strict_one_if_asked() -> None:
    whole = part({"base": 0.9, "tuned": 0.2})
    results = tuple(
        replace(result, scores=replace(result.scores, strict=near(score)))
        for result, score in zip(whole.results, (0.1, 0.8), strict=True)
    )
    pairs = (replace(whole.differences[0], strict=near(-0.7), first_not_inferior=False,
                     second_not_inferior=True),)  # fmt: skip
    asked = plan(BASE, TUNED, scoring=Scoring(strict_decides=True))
    assert decide(asked, replace(whole, results=results, differences=pairs), {}).candidate == (
        "tuned"
    )


@pytest.mark.parametrize("costs", [(0.0, 0.0), (0.0121, 0.0124)])
def test_of_costs_equal_in_two_digits_the_one_without_training_is_taken(
    costs: tuple[float, float],
) -> None:
    whole = part({"tuned": 0.6, "rag": 0.6})
    for name, cost in zip(("tuned", "rag"), costs, strict=True):
        whole = changed(whole, name, cost_per_thousand=cost)
    verdict = decide(plan(TUNED, RAG), whole, {})
    assert (verdict.candidate, codes(verdict)) == ("rag", ["tie_cheaper"])
    assert (
        f"costs the same as tuned, {costs[1]:.2g} for 1,000 answers" in verdict.reasons[0].message
    )


def test_a_reason_names_the_costs_that_were_compared() -> None:
    verdict = decide(plan(RAG, HYBRID), part({"rag": 0.8, "hybrid": 0.81}), {})
    assert "the cheaper: 1,000 answers cost 2, those of hybrid 5." in verdict.reasons[0].message


def test_without_candidates_that_answered_nothing_is_taken() -> None:
    verdict = decide(plan(BASE), changed(part({"base": 0.2}), "base", failed=True), {})
    assert codes(verdict) == ["constraints_impossible"]
