"""The sentences of the passages, ready to be searched for what an answer's sentence says."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from services.gateway.citations.alignment import VALUES, Line, Mention, fit, resolve_openers
from services.gateway.citations.lexicon import META_WORDS, STOP_WORDS
from services.gateway.citations.sentences import split
from services.gateway.citations.terms import Kind, parse, stem

_STOP_WEIGHT = 0.3
_PASSAGE = 0.3  # what a word counts for a sentence if another sentence of its passage has it
_NEIGHBOUR = 1.1  # how a sentence beside the first one is preferred,
_STRANGER = 0.7  # and one of another passage is not
_GAIN = 0.12  # the share that a further sentence must add, if it adds a value,
_GAIN_OF_WORDS = 0.25  # and if it adds words only
_MOST_LINES = 3
_LIKE_IT = 4  # sentences, best first, in which another value may contradict
_SHARE = 0.5  # how much a sentence's other words count beside a value's surroundings
_META = frozenset(stem(word) for word in META_WORDS)


@dataclass(frozen=True, eq=False)
class SourceLine:
    """A sentence of a passage."""

    line: Line
    passage: int  # index of the passage
    number: int  # of the sentence in it
    start: int  # code points of the passage
    end: int


@dataclass(frozen=True)
class Claim:
    """A sentence of an answer, with the weights of the keys that claim something."""

    line: Line
    content: dict[str, float]


@dataclass(frozen=True)
class Evidence:
    """The sentences that hold a claim together, others like it, and the share 0..1 they hold."""

    chosen: list[SourceLine]
    like_it: list[SourceLine]
    support: float


class SourceTable:
    """Built once for an answer; a claim then costs what its own words occur."""

    def __init__(self, passages: Sequence[str]) -> None:
        parsed = [
            (passage, number, start, end, parse(sentence))
            for passage, text in enumerate(passages)
            for number, (start, end, sentence) in enumerate(split(text))
        ]
        terms = [term for *_, sentence in parsed for term in sentence]
        self._names = {term.key for term in terms if term.kind is Kind.NAME}
        self._words = {term.key for term in terms if term.kind is Kind.WORD}
        self._lines: list[SourceLine] = []
        self._passage_keys: list[set[str]] = [set() for _ in passages]
        self._postings: dict[str, list[int]] = {}
        for passage, number, start, end, sentence in parsed:
            resolve_openers(sentence, self._names, self._words)
            line = Line(sentence)
            for key in line.positions:
                self._postings.setdefault(key, []).append(len(self._lines))
            self._passage_keys[passage].update(line.positions)
            self._lines.append(SourceLine(line, passage, number, start, end))
        self._weights = _Weights(self._postings, len(self._lines))

    def claim(self, sentence: str) -> Claim:
        terms = parse(sentence)
        resolve_openers(terms, self._names, self._words)
        content = {
            term.key: self._weights[term.key]
            for term in terms
            if term.kind not in (Kind.STOP, Kind.NOT)
            and (term.key not in _META or term.key in self._postings)
        }
        return Claim(Line(terms), content)

    def find(self, claim: Claim) -> Evidence:
        """The sentence that holds most of a claim, then what adds most to it."""
        total = sum(claim.content.values())
        values = {term.key for term in claim.line.terms if term.kind in VALUES}
        score: dict[int, float] = {}
        for key, weight in claim.content.items():
            for index in self._postings.get(key, ()):
                score[index] = score.get(index, 0.0) + weight
        # Small words and negations decide between sentences that hold the same content.
        for key in claim.line.positions.keys() - claim.content.keys():
            for index in self._postings.get(key, ()):
                if index in score:
                    score[index] += self._weights[key]
        in_passage = [
            sum(weight for key, weight in claim.content.items() if key in keys)
            for keys in self._passage_keys
        ]
        for index in score:
            score[index] += _PASSAGE * in_passage[self._lines[index].passage]
        ranked = [self._lines[i] for i in sorted(score, key=lambda i: (-score[i], i))]
        missing = dict(claim.content)
        chosen: list[SourceLine] = []
        while ranked and len(chosen) < _MOST_LINES:
            gains = [_gain(source, missing, chosen) for source in ranked[: None if chosen else 1]]
            gain = max(gains)
            best = ranked[gains.index(gain)]
            found = missing.keys() & best.line.positions.keys()
            if chosen and gain < total * (_GAIN if found & values else _GAIN_OF_WORDS):
                break
            chosen.append(best)
            for key in found:
                del missing[key]
        return Evidence(chosen, ranked[:_LIKE_IT], 1 - sum(missing.values()) / total)

    def places(self, mention: Mention, source: SourceLine) -> list[Mention]:
        """Where a sentence has a value; the rest of a longer name may be in its passage."""
        known = self._passage_keys[source.passage]
        return [
            place
            for place in source.line.mentions
            if mention.same(place) and mention.keys <= place.keys | known
        ] or mention.elsewhere(source.line)

    def fit(self, claim: Claim, mention: Mention, source: SourceLine, place: Mention) -> float:
        """How well, 0..1, a value of the claim suits a place: the words around it, and the rest."""
        known = self._passage_keys[source.passage]
        near = fit(claim.line, mention, source.line, place, self._weights, known)
        total = held = 0.0
        for key, weight in claim.content.items():
            if key not in mention.keys:
                total += weight
                held += weight if key in source.line.positions else 0.0
        return (near + _SHARE * (held / total if total else 0.0)) / (1 + _SHARE)


def _gain(source: SourceLine, missing: dict[str, float], chosen: list[SourceLine]) -> float:
    gain = sum(weight for key, weight in missing.items() if key in source.line.positions)
    if chosen and source.passage != chosen[0].passage:
        return gain * _STRANGER
    if chosen and abs(source.number - chosen[0].number) == 1:
        return gain * _NEIGHBOUR
    return gain


class _Weights(dict[str, float]):
    """Inverse sentence frequency of a key; words that no source has weigh like a middling one."""

    def __init__(self, postings: dict[str, list[int]], lines: int) -> None:
        super().__init__((k, math.log(1 + lines / len(p))) for k, p in postings.items())
        self.update(dict.fromkeys([*STOP_WORDS, "not"], _STOP_WEIGHT))
        self._unknown = 0.7 * math.log(2 + lines)

    def __missing__(self, key: str) -> float:
        return self._unknown
