"""Which examples are held out: a share of them that has no document and no question in common with
the others, so that the loss on it says something."""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain

from services.questions.fields import Example
from services.questions.normalising import digest

TRIES = 16


def held_out(examples: Sequence[Example], share: float | None, seed: int) -> frozenset[int]:
    """Return the indices of the examples to hold out.

    `share` None holds out a tenth, but at least 16 where that is at most a fifth. Examples that
    name the same document or ask the same go to one side together, directly or through others; if
    such groups are too large for the share, the nearest number that they allow is held out, which
    may be none.
    """
    wanted = _wanted(len(examples), share)
    groups = _groups(examples)
    shuffled = random.Random(seed)
    best: list[int] = []
    for _ in range(TRIES):
        shuffled.shuffle(groups)
        found = _fill(groups, wanted)
        if abs(wanted - len(found)) < abs(wanted - len(best)):
            best = found
        if len(best) == wanted:
            break
    return frozenset(best)


def _wanted(count: int, share: float | None) -> int:
    if share is None:
        tenth = max(1, round(count / 10))
        wanted = max(16, tenth) if 16 * 5 <= count else tenth
    else:
        wanted = max(1, round(count * share)) if share else 0
    return min(wanted, count // 2)


def _fill(groups: list[list[int]], wanted: int) -> list[int]:
    """Return the members of groups, taken in order as long as they fit; of one more, the smallest,
    if that comes nearer."""
    taken: list[int] = []
    smallest: list[int] | None = None
    for group in groups:
        if len(taken) + len(group) <= wanted:
            taken += group
        elif smallest is None or len(group) < len(smallest):
            smallest = group
    if smallest is not None and len(taken) + len(smallest) - wanted < wanted - len(taken):
        taken += smallest
    return taken


def _groups(examples: Sequence[Example]) -> list[list[int]]:
    """Return the indices of the examples, joined where they share a document or a question."""
    parents = list(range(len(examples)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    first: dict[bytes, int] = {}
    for index, example in enumerate(examples):
        for key in _keys(example):
            parents[root(index)] = root(first.setdefault(key, index))
    groups = defaultdict(list)
    for index in range(len(examples)):
        groups[root(index)].append(index)
    return list(groups.values())


def _keys(example: Example) -> Iterator[bytes]:
    # Ids alone: an example that names no corpus may share its documents with one that does.
    yield from (id.encode() for id in example.relevant)
    yield digest(example.question, *chain.from_iterable(example.history))
