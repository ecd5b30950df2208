import numpy as np
import pytest

from services.evaluation.router import MOST_TYPES, train

HASH = "a" * 64


def questions(types, per_type, noise=0.02, dimensions=16, seed=0):
    """Return types and embeddings, those of a type close to each other."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(len(types), dimensions))
    which = np.repeat(np.arange(len(types)), per_type)
    vectors = centres[which] + noise * random.normal(size=(len(which), dimensions))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [types[number] for number in which], vectors.astype(np.float32)


def class_of(router, vector):
    """Return the type as the gateway finds it: from 32 bit numbers, one class at a time."""
    products = [
        np.dot(np.float32(entry.weights), vector) + np.float32(entry.bias)
        for entry in router.classes
    ]
    return router.classes[int(np.argmax(products))].type


def trained(types, vectors, wanted, scores, clusters=None, single="rag"):
    clusters = np.arange(len(types)) if clusters is None else clusters
    return train(types, vectors, HASH, wanted, single, scores, clusters)


def best_by_type(types, wanted):
    """Return scores of two candidates: each is right on its own types, "tuned" on those wanted."""
    own = np.array([type in wanted for type in types], float)
    return {"rag": 1 - own, "tuned": own}


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d", "e"]])
def test_the_greatest_weights_times_embedding_plus_bias_is_the_type(names):
    types, vectors = questions(names, 30)
    router, _ = trained(types, vectors, {"b": "tuned"}, best_by_type(types, {"b"}))
    assert [entry.type for entry in router.classes] == names
    assert router.embedder_hash == HASH
    assert [class_of(router, vector) for vector in vectors] == types


def test_types_that_can_be_told_apart_have_a_regret_below_zero():
    types, vectors = questions(["a", "b"], 60)
    _, regret = trained(types, vectors, {"b": "tuned"}, best_by_type(types, {"b"}))
    # The single best is wrong on every second question, the router on none.
    assert regret.value == -0.5
    assert -0.7 < regret.low < regret.value < regret.high < -0.3


def test_types_that_cannot_be_told_apart_have_no_regret_below_zero():
    types, vectors = questions(["a", "b"], 100)
    shuffled = list(np.random.default_rng(1).permutation(types))
    _, regret = trained(shuffled, vectors, {"b": "tuned"}, best_by_type(shuffled, {"b"}))
    assert regret.low < 0 < regret.high


def test_a_router_is_judged_on_documents_that_it_has_not_seen():
    # Each document has an embedding of its own and a type that says nothing about others: whoever
    # has seen the document knows the type, and nobody else.
    random = np.random.default_rng(2)
    documents = np.repeat(np.arange(40), 10)
    vectors = random.normal(size=(40, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    types = [("a", "b")[number] for number in random.permutation(np.arange(40) % 2)[documents]]
    scores = best_by_type(types, {"b"})
    _, seen = trained(types, vectors[documents], {"b": "tuned"}, scores)
    _, unseen = trained(types, vectors[documents], {"b": "tuned"}, scores, documents)
    assert seen.high < -0.3
    assert unseen.high > -0.1


def test_a_type_without_a_candidate_of_its_own_takes_the_single_one():
    types, vectors = questions(["a", "b", "c"], 30)
    scores = best_by_type(types, {"b"})
    scores["other"] = np.zeros(len(types))
    _, regret = trained(types, vectors, {"b": "tuned"}, scores)
    assert regret.value == pytest.approx(-1 / 3)


def test_questions_that_a_candidate_failed_on_do_not_count():
    types, vectors = questions(["a", "b"], 40)
    scores = best_by_type(types, {"b"})
    scores["tuned"][40:60] = np.nan
    _, regret = trained(types, vectors, {"b": "tuned"}, scores)
    assert regret.value == pytest.approx(-20 / 60)


def test_questions_without_a_type_are_left_out():
    types, vectors = questions(["a", "b"], 40)
    more = np.concatenate((vectors, -vectors[:20]))
    scores = best_by_type(types + [""] * 20, {"b"})
    router, regret = trained(types + [""] * 20, more, {"b": "tuned"}, scores)
    assert [entry.type for entry in router.classes] == ["a", "b"]
    assert regret.value == -0.5


def test_the_same_seed_gives_the_same_router_and_regret():
    types, vectors = questions(["a", "b", "c"], 30, noise=1.0)
    scores = best_by_type(types, {"b"})
    assert trained(types, vectors, {"b": "tuned"}, scores) == trained(
        types, vectors, {"b": "tuned"}, scores
    )


@pytest.mark.parametrize(
    ("types", "clusters"),
    [
        ([], []),
        ([""] * 6, [0, 1, 2, 3, 4, 5]),
        (["a"] * 6, [0, 1, 2, 3, 4, 5]),
        (["a", "b"] * 3, [0] * 6),
        (["a", "b"] * 3, [0, 1] * 3),
        (["a", "b", "c"], [0, 1, 2]),
        ([f"type {number}" for number in range(MOST_TYPES + 1)] * 2, range(2 * MOST_TYPES + 2)),
    ],
    ids=[
        "no questions",
        "no types",
        "one type",
        "one document",
        "one each",
        "one of each",
        "too many types",
    ],
)
def test_there_is_no_router_where_nothing_can_be_told(types, clusters):
    vectors = np.ones((len(types), 4), np.float32)
    scores = {"rag": np.zeros(len(types)), "tuned": np.ones(len(types))}
    assert trained(types, vectors, {"a": "tuned"}, scores, np.array(clusters, int)) is None


@pytest.mark.parametrize("clusters", [range(22), [0] * 10 + [1] * 12, [0, 1] * 11])
@pytest.mark.filterwarnings("error")
def test_a_type_of_few_questions_or_documents_does_no_harm(clusters):
    types, vectors = questions(["a", "b"], 20)
    scores = best_by_type(types[:22], {"b"})
    router, regret = trained(
        types[:22], vectors[:22], {"b": "tuned"}, scores, np.array(clusters, int)
    )
    assert len(router.classes) == 2
    assert -1 <= regret.value <= 1
