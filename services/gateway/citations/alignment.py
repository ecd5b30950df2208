"""Where a sentence stands in a source: its values by what surrounds them, and its negations."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from services.gateway.citations.lexicon import POLES
from services.gateway.citations.terms import Kind, Term, stem

# Values: they agree with the source or the sentence is not supported.
VALUES = frozenset(
    {Kind.NUMBER, Kind.ORDINAL, Kind.MONTH, Kind.NAME, Kind.CODE, Kind.POLE, Kind.OPENER}
)
_REACH = 8  # terms to each side that are a value's surroundings
_NEARNESS = [0.0] + [0.85**distance for distance in range(_REACH)]
_OTHER_SIDE = 0.35  # what a term counts that has moved to the other side of the value
_IN_PASSAGE = 0.5  # what a term counts that only other sentences of the passage have


@dataclass(frozen=True, slots=True)
class Mention:
    """A value in a sentence: the terms first..last, several for a name."""

    kind: Kind
    first: int
    last: int
    keys: frozenset[str]
    unit: str = ""

    def same(self, other: "Mention") -> bool:
        """Whether both may mean the same: equal values, or a name and its longer form."""
        if self.kind not in _COMPARABLE[other.kind]:
            return False
        if self.kind is Kind.POLE:
            return _pole(self) == _pole(other)
        if self.unit and other.unit and self.unit != other.unit:
            return False
        return self.keys <= other.keys or other.keys <= self.keys

    def rivals(self, other: "Mention") -> bool:
        """Whether the other is another value of this one's kind."""
        if other.kind not in _COMPARABLE[self.kind] or other.kind is Kind.OPENER:
            return False
        if self.kind is Kind.POLE and _pole(self)[0] != _pole(other)[0]:
            return False
        return not self.same(other)

    def elsewhere(self, line: "Line") -> list["Mention"]:
        """Where a line has the words of this name or code as ordinary words."""
        if self.kind is Kind.NUMBER or not self.keys <= line.positions.keys():
            return []
        return [Mention(self.kind, m, m, self.keys) for m in line.positions[min(self.keys)]]


_POLES = {stem(word): pole for word, pole in POLES.items()}
_COMPARABLE = {kind: frozenset({kind}) for kind in VALUES} | {
    kind: frozenset({Kind.NAME, Kind.OPENER}) for kind in (Kind.NAME, Kind.OPENER)
}


def _pole(mention: Mention) -> tuple[int, int]:
    return _POLES[next(iter(mention.keys))]


class Line:
    """A sentence by its terms."""

    def __init__(self, terms: list[Term]) -> None:
        self.terms = terms
        self.keys = [term.key for term in terms]
        self.positions: dict[str, list[int]] = {}
        for position, key in enumerate(self.keys):
            self.positions.setdefault(key, []).append(position)
        self.mentions = _mentions(terms)
        self.negations = [i for i, term in enumerate(terms) if term.kind is Kind.NOT]


def _mentions(terms: list[Term]) -> list[Mention]:
    found: list[Mention] = []
    for position, term in enumerate(terms):
        if term.kind is Kind.NAME and term.joins and found and found[-1].kind is Kind.NAME:
            last = found[-1]
            found[-1] = Mention(Kind.NAME, last.first, position, last.keys | {term.key})
        elif term.kind in VALUES:
            keys = frozenset({term.key})
            found.append(Mention(term.kind, position, position, keys, term.unit))
    return found


def resolve_openers(terms: list[Term], names: Collection[str], words: Collection[str]) -> None:
    """Decides for capitals at a beginning by how the sources write the word elsewhere."""
    for term in terms:
        if term.kind is Kind.OPENER:
            if term.key in words:
                term.kind = Kind.WORD
            elif term.key in names:
                term.kind = Kind.NAME


def fit(
    line: Line,
    mention: Mention,
    source: Line,
    place: Mention,
    weights: Mapping[str, float],
    passage: Collection[str] = (),
) -> float:
    """The share, 0..1, of the mention's surroundings that is found around a place in a source.

    Near terms count most, and those on the same side at the same distance. `passage` holds the
    keys of the source's whole passage: a name that the source sentence replaced by a pronoun.
    """
    total = found = 0.0
    low = max(0, mention.first - _REACH)
    high = min(len(line.keys), mention.last + _REACH + 1)
    positions = source.positions
    for k in range(low, high):
        if k < mention.first:
            distance = k - mention.first
        elif k > mention.last:
            distance = k - mention.last
        else:
            continue
        key = line.keys[k]
        weight = weights[key] * _NEARNESS[abs(distance)]
        total += weight
        best = 0.0
        for m in positions.get(key, ()):
            if m < place.first:
                there = m - place.first
            elif m > place.last:
                there = m - place.last
            else:
                continue
            if (there < 0) == (distance < 0):
                near = 1 / (1 + 0.25 * abs(there - distance))
            else:
                near = _OTHER_SIDE / (1 + 0.25 * abs(there + distance))
            if near > best:
                best = near
        if best < _IN_PASSAGE and key in passage and weights[key] > 1:
            best = _IN_PASSAGE
        found += weight * best
    return found / total if total else 0.0


_SCOPE = 6  # terms after a negation that it may negate


def negation_agrees(line: Line, sources: list[Line]) -> bool:
    """Whether what is negated here is negated there, and the other way round."""
    for cue in line.negations:
        scope = _scope(line, cue)
        head = next((k for k in scope if any(k in s.positions for s in sources)), None)
        if head is None or not any(_negated(s, head) for s in sources if head in s.positions):
            return False
    for source in sources:
        for cue in source.negations:
            scope = _scope(source, cue)
            shared = [key for key in scope if key in line.positions]
            if shared and len(shared) * 3 >= len(scope) * 2 and not _negated(line, shared[0]):
                return False
    return True


def _scope(line: Line, cue: int) -> list[str]:
    """The keys of up to three terms after a negation in its clause, or of two before it."""
    clause = line.terms[cue].clause
    after = [t for t in line.terms[cue + 1 : cue + 1 + _SCOPE] if t.clause == clause]
    before = line.terms[max(0, cue - _SCOPE) : cue]
    heads = [t.key for t in after if t.kind not in _EMPTY][:3]
    return heads or [t.key for t in before if t.kind not in _EMPTY][-2:]


def _negated(line: Line, key: str) -> bool:
    return any(
        key in _scope(line, cue)
        or (0 < m - cue <= _SCOPE and line.terms[m].clause == line.terms[cue].clause)
        for cue in line.negations
        for m in line.positions[key]
    )


_EMPTY = frozenset({Kind.STOP, Kind.NOT})
