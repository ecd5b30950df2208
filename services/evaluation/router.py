"""Tells types of question apart by their embeddings, and says whether that is worth it."""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from services.evaluation.measures import Bools, Floats
from services.evaluation.outcome import Estimate, Router, RouterClass
from services.evaluation.statistics import estimate

FOLDS = 5
MOST_TYPES = 100  # of a policy's router
# Embeddings have length 1, so weights must be large to tell types apart; 1 shrinks them too much.
INVERSE_PENALTY = 10.0
TOLERANCE = 1e-3
MOST_STEPS = 100


def train(
    types: Sequence[str],
    embeddings: NDArray[np.float32],
    embedder_hash: str,
    wanted: Mapping[str, str],
    single: str,
    scores: Mapping[str, Floats],
    clusters: NDArray[np.intp],
    seed: int = 0,
) -> tuple[Router, Estimate] | None:
    """Return a router of the types, and its regret less that of the candidate `single`.

    `wanted` has the candidate of each type that does not take `single`. `scores` has the deciding
    scores by candidate, NaN where one failed. `types`, `clusters` and the rows of `embeddings`, of
    shape (questions, dimensions), belong to the same questions; those without a type are left out.

    The regret of an answer is what the best candidate scores on its question less what it scores
    itself, so that the best one cancels out of the difference. It is cross-validated: the candidate
    of each question is that of the type which a router that has seen neither the question nor
    others about its documents takes it for. Classes are not weighted: a question counts as one.

    None if there are not from 2 to 100 types, or if all questions of each type are about one
    document, so that nothing can be held out.
    """
    typed = np.flatnonzero([bool(type) for type in types])
    names, classes = np.unique(np.array(types, np.str_)[typed], return_inverse=True)
    groups = clusters[typed]
    if not 2 <= len(names) <= MOST_TYPES:
        return None
    folds = _folds(classes, groups, seed)
    if not folds:
        return None
    vectors = embeddings[typed]
    predicted = np.empty(len(typed), np.intp)
    for seen, held_out in folds:
        predicted[held_out] = _predicted(vectors[seen], classes[seen], vectors[held_out])
    single_scores = scores[single][typed]
    taken = single_scores.copy()
    for number, name in enumerate(names.tolist()):
        routed = predicted == number
        taken[routed] = scores[wanted.get(name, single)][typed][routed]
    regret = estimate(single_scores - taken, groups, seed)
    if regret is None:
        return None
    return _router(vectors, classes, names.tolist(), embedder_hash), regret


def _folds(
    classes: NDArray[np.intp], groups: NDArray[np.intp], seed: int
) -> list[tuple[Bools, Bools]]:
    """Return what each router sees and what it is held against: no group in both, and in all folds
    the types alike as far as that goes; a group counts as the type of its first question. Empty if
    each type has one group alone."""
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    of_groups = classes[first]
    folds = min(FOLDS, int(np.bincount(of_groups).max()))
    if folds < 2:
        return []
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A type of fewer groups than folds is missing in some of them, and that is all right.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        held_out = [np.isin(group, rows) for _, rows in splitter.split(of_groups, of_groups)]
    return [(~rows, rows) for rows in held_out]


def _predicted(
    seen: NDArray[np.float32], classes: NDArray[np.intp], vectors: NDArray[np.float32]
) -> NDArray[np.intp]:
    if len(np.unique(classes)) == 1:
        return np.full(len(vectors), classes[0], np.intp)
    return np.asarray(_fitted(seen, classes).predict(vectors), np.intp)


def _router(
    vectors: NDArray[np.float32],
    classes: NDArray[np.intp],
    names: Sequence[str],
    embedder_hash: str,
) -> Router:
    model = _fitted(vectors, classes)
    weights, biases = model.coef_, model.intercept_
    if len(names) == 2:  # one row for both: above 0 is the second
        weights = np.concatenate((-weights, weights)) / 2
        biases = np.concatenate((-biases, biases)) / 2
    return Router(
        embedder_hash=embedder_hash,
        classes=tuple(
            RouterClass(name, tuple(map(float, row)), float(bias))
            for name, row, bias in zip(names, weights, biases, strict=True)
        ),
    )


def _fitted(vectors: NDArray[np.float32], classes: NDArray[np.intp]) -> LogisticRegression:
    with warnings.catch_warnings():
        # Weights that still move a little tell types apart as well.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=INVERSE_PENALTY, tol=TOLERANCE, max_iter=MOST_STEPS)
        return model.fit(vectors, classes)
