import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from services.evaluation.comparison import Question
from services.evaluation.statistics import clusters_of, differences, estimate


def question(line: int, *relevant: str) -> Question:
    return Question(line, f"question {line}", ("answer",), relevant)


def pair(first, second, clusters=None, margin=0.05, seed=0):
    scores = np.array([first, second], np.float64)
    rows = np.arange(scores.shape[1]) if clusters is None else clusters
    (found,) = differences(["a", "b"], scores, scores, scores, rows, margin, seed)
    return found


def mixed(questions: int, first: float, second: float, seed: int = 0):
    rng = np.random.default_rng(seed)
    return (rng.random((2, questions)) < np.array([[first], [second]])).astype(np.float64)


def test_questions_that_share_a_document_also_by_way_of_others_are_one_cluster() -> None:
    questions = [
        question(1, "a"),
        question(2, "b", "a"),
        question(3, "b"),
        question(4, "c"),
        question(5),
        question(6),
    ]
    first, second, third, *alone = clusters_of(questions).tolist()
    assert first == second == third
    assert len({first, *alone}) == 4


def test_no_questions_have_no_clusters() -> None:
    assert clusters_of([]).shape == (0,)


def test_the_mean_leaves_out_questions_without_a_score() -> None:
    found = estimate(np.array([1.0, 0.0, np.nan, 1.0, 0.0]), np.arange(5))
    assert found is not None
    assert found.value == 0.5
    assert 0 <= found.low < 0.5 < found.high <= 1


def test_without_scores_there_is_no_mean() -> None:
    assert estimate(np.array([np.nan]), np.arange(1)) is None
    assert estimate(np.array([]), np.array([], np.intp)) is None


def test_all_right_on_few_questions_still_leaves_doubt() -> None:
    found = estimate(np.ones(20), np.arange(20))
    assert found is not None
    assert found.value == found.high == 1
    assert 0.7 < found.low < 0.95


def test_one_cluster_says_nothing_about_others() -> None:
    found = estimate(np.array([1.0, 0.0, 1.0]), np.zeros(3, np.intp))
    assert found is not None
    assert (found.low, found.high) == (0, 1)


def test_differences_may_be_below_zero() -> None:
    found = estimate(np.array([-0.5, -0.4, -0.6] * 20), np.arange(60))
    assert found is not None
    assert found.high < 0


def test_clusters_make_the_interval_wider() -> None:
    scores = np.repeat(mixed(60, 0.5, 0.5)[0], 5)
    alone = estimate(scores, np.arange(300))
    together = estimate(scores, np.repeat(np.arange(60), 5))
    assert alone and together
    assert together.high - together.low > 1.8 * (alone.high - alone.low)


def test_the_interval_is_that_of_students_t_where_both_apply() -> None:
    scores = mixed(400, 0.5, 0.5)[0]
    found = estimate(scores, np.arange(400))
    assert found is not None
    assert found.high - found.low == pytest.approx(2 * 1.966 * scores.std(ddof=1) / 20, rel=0.05)


def test_the_same_seed_gives_the_same_interval() -> None:
    first, second = mixed(100, 0.6, 0.4)
    assert pair(first, second, seed=7) == pair(first, second, seed=7)
    assert pair(first, second, seed=-7).strict.value == pair(first, second).strict.value


def test_answers_that_only_one_got_right_are_counted_and_tested() -> None:
    found = pair([1] * 12 + [0] * 2 + [1] * 46, [0] * 12 + [1] * 2 + [1] * 46)
    assert (found.only_first, found.only_second) == (12, 2)
    assert found.p_value == pytest.approx(0.0129395, abs=1e-6)  # 2 (1 + 14 + 91) / 2 ** 14
    assert found.strict.value == pytest.approx(10 / 60)


def test_holm_corrects_over_all_pairs() -> None:
    rng = np.random.default_rng(0)
    truth = np.array([[0.8], [0.6], [0.5], [0.5]])
    scores = (rng.random((4, 200)) < truth).astype(np.float64)
    found = differences(list("abcd"), scores, scores, scores, np.arange(200), 0.05)
    expected = multipletests([one.p_value for one in found], method="holm")[1]
    assert [one.adjusted_p_value for one in found] == pytest.approx(expected)


def test_a_pair_uses_the_questions_that_both_answered() -> None:
    scores = np.ones((3, 50))
    scores[0, :10] = np.nan
    scores[1, 5:20] = np.nan
    scores[2] = np.nan
    (found,) = differences(["a", "b", "c"], scores, scores, scores, np.arange(50), 0.05)
    assert (found.first, found.second, found.questions) == ("a", "b", 30)


def test_each_score_has_its_own_difference_and_one_decides() -> None:
    strict, blind = np.zeros((2, 100)), np.zeros((2, 100))
    strict[0], blind[1] = 1, 1
    (found,) = differences(["a", "b"], strict, blind, blind, np.arange(100), 0.05)
    assert (found.strict.value, found.format_blind.value) == (1, -1)
    assert (found.only_first, found.only_second) == (0, 100)
    assert (found.first_not_inferior, found.second_not_inferior) == (False, True)


@pytest.mark.parametrize(
    ("questions", "decided"), [(1, False), (15, False), (40, False), (60, True), (400, True)]
)
def test_copies_are_the_same_only_on_enough_questions(questions: int, decided: bool) -> None:
    found = pair(np.ones(questions), np.ones(questions))
    assert found.strict.value == 0
    assert (found.first_not_inferior, found.second_not_inferior) == (decided, decided)
    assert (found.questions_needed == 0) is decided


def test_the_questions_that_copies_need_are_enough() -> None:
    needed = pair(np.ones(15), np.ones(15)).questions_needed
    enough = np.ones(15 + needed)
    assert 20 < needed < 100
    assert pair(enough, enough).questions_needed == 0


def test_the_questions_needed_are_about_as_many_as_decide() -> None:
    needed = pair(*mixed(60, 0.6, 0.5, seed=4)).questions_needed
    assert needed > 0
    decided = [
        pair(*mixed(60 + 2 * needed, 0.6, 0.5, seed=seed)).questions_needed == 0
        for seed in range(10)
    ]
    assert sum(decided) >= 7


def test_a_margin_of_zero_needs_a_difference() -> None:
    found = pair(np.ones(100), np.ones(100), margin=0.0)
    assert not found.first_not_inferior
    assert found.questions_needed == 100_000


def test_more_questions_show_smaller_differences() -> None:
    few, many = pair(*mixed(50, 0.6, 0.5)), pair(*mixed(800, 0.6, 0.5))
    assert 0 < many.detectable < few.detectable / 3


@pytest.mark.parametrize(("clusters", "reliable"), [(39, False), (40, True)])
def test_intervals_are_reliable_from_40_clusters_on(clusters: int, reliable: bool) -> None:
    first, second = mixed(200, 0.6, 0.5)
    assert pair(first, second, np.arange(200) % clusters).intervals_reliable is reliable


def test_intervals_of_differences_cover_the_truth() -> None:
    covered = 0
    for seed in range(300):
        found = pair(*mixed(40, 0.7, 0.4, seed))
        covered += found.strict.low <= 0.3 <= found.strict.high
    assert 0.92 <= covered / 300 <= 0.98


def test_ten_thousand_questions_have_the_interval_of_all_of_them() -> None:
    first, second = mixed(10_000, 0.6, 0.5)
    found = pair(first, second)
    half = 1.96 * (first - second).std() / 100
    assert found.strict.high - found.strict.low == pytest.approx(2 * half, rel=0.1)


def test_no_questions_have_no_differences() -> None:
    nothing = np.full((2, 5), np.nan)
    assert differences(["a", "b"], nothing, nothing, nothing, np.arange(5), 0.05) == ()
