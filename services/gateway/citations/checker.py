"""Citations: for each sentence of an answer, the span of the sources that supports it.

No model is asked. Source sentences are chosen by the weight of the answer's words that they hold
(inverse sentence frequency), then what a wrong answer gets wrong must agree: numbers, months,
names, codes, opposites and negation must be there, and in the same place. A value is in the wrong
place if the words around it surround another value of its kind in the sources.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from services.gateway.citations.alignment import Line, Mention, negation_agrees
from services.gateway.citations.sentences import SentenceSplitter, Span
from services.gateway.citations.source_table import Claim, Evidence, SourceLine, SourceTable
from services.gateway.citations.terms import Kind


@dataclass(frozen=True)
class Source:
    """A passage that was shown to the model. `start` is where it begins in its document.

    `text == document.text[start : start + len(text)]`; code points, here and below.
    """

    passage_id: str
    document_id: str
    start: int
    text: str


@dataclass(frozen=True)
class Citation:
    """A span of the answer and what supports it: `quote == document.text[source_start:source_end]`.

    `support` is the share, 0..1, of the sentence's weight that the sources hold.
    """

    answer_start: int
    answer_end: int
    passage_id: str
    document_id: str
    source_start: int
    source_end: int
    quote: str
    support: float


@dataclass(frozen=True)
class Unsupported:
    """A span of the answer that no source supports."""

    answer_start: int
    answer_end: int


Verdict = Citation | Unsupported

_ENOUGH = 0.55  # of a sentence's weight must be in its sources
_BETTER = 0.13  # by this much another value fits, and the sentence's own is wrong,
_FLOOR = 0.4  # if the other fits more than this;
_NAME_FLOOR = 0.6  # names are of many kinds, so they need to fit better to be rivals
_LOOSE = 0.1  # a value that fits less stands in no relation to the sentence
# Missing from the source these are no error: an opposite may be said in other words, a capital may
# be the sentence's own, and "one" is an article too, "first" an adverb.
_LENIENT = frozenset({Kind.POLE, Kind.OPENER})
_LENIENT_KEYS = frozenset({"#1", "1th", "2th", "last"})


class CitationChecker:
    """Gives the verdicts on an answer while it is written.

    Every sentence gets one verdict (several citations if several spans support it together), in
    order; one without content ("Sure!") gets none. The verdicts do not depend on how the text is
    cut into deltas.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._table = SourceTable([source.text for source in sources])
        self._splitter = SentenceSplitter()

    def feed(self, delta: str) -> list[Verdict]:
        """Verdicts on the sentences that are complete with this delta."""
        return [verdict for span in self._splitter.feed(delta) for verdict in self._check(span)]

    def finish(self) -> list[Verdict]:
        """Verdicts on what is left when the answer has ended."""
        return [verdict for span in self._splitter.finish() for verdict in self._check(span)]

    def _check(self, span: Span) -> list[Verdict]:
        start, end, text = span
        claim = self._table.claim(text)
        if not claim.content:
            return []
        evidence = self._table.find(claim)
        if evidence.support < _ENOUGH or not self._agrees(claim, evidence):
            return [Unsupported(start, end)]
        return [
            Citation(
                answer_start=start,
                answer_end=end,
                passage_id=source.passage_id,
                document_id=source.document_id,
                source_start=source.start + low,
                source_end=source.start + high,
                quote=source.text[low:high],
                support=round(evidence.support, 3),
            )
            for source, low, high in self._spans(evidence.chosen)
        ]

    def _agrees(self, claim: Claim, evidence: Evidence) -> bool:
        lines = [source.line for source in evidence.chosen]
        return negation_agrees(claim.line, lines) and all(
            self._value_agrees(claim, mention, evidence) for mention in claim.line.mentions
        )

    def _value_agrees(self, claim: Claim, mention: Mention, evidence: Evidence) -> bool:
        table = self._table
        sources = list(dict.fromkeys([*evidence.chosen, *evidence.like_it]))
        places = [(source, place) for source in sources for place in table.places(mention, source)]
        if not any(source in evidence.chosen for source, _ in places):
            if mention.kind not in _LENIENT and not mention.keys <= _LENIENT_KEYS:
                return False
        own = max((table.fit(claim, mention, *found) for found in places), default=0.0)
        if mention.kind in (Kind.NUMBER, Kind.CODE) and len(claim.content) > 3 and own < _LOOSE:
            return False
        floor = _NAME_FLOOR if mention.kind in (Kind.NAME, Kind.OPENER) else _FLOOR
        floor = max(floor, own + _BETTER)
        if floor >= 1:
            return True
        return not any(
            (better := table.fit(claim, mention, source, place)) > floor
            and not self._taken(claim, mention, better, source, place)
            for source in sources
            for place in source.line.mentions
            if mention.rivals(place) and _may_stand(claim.line, mention, source.line, place)
        )

    def _taken(
        self, claim: Claim, mention: Mention, better: float, source: SourceLine, place: Mention
    ) -> bool:
        """Whether the answer itself names the rival, where it fits better than this mention."""
        return any(
            other is not mention
            and other.same(place)
            and self._table.fit(claim, other, source, place) >= better
            for other in claim.line.mentions
        )

    def _spans(self, chosen: list[SourceLine]) -> list[tuple[Source, int, int]]:
        """The spans of the sources, neighbours joined."""
        spans: list[tuple[int, int, int, int]] = []
        for line in sorted(chosen, key=lambda line: (line.passage, line.number)):
            if spans and spans[-1][:2] == (line.passage, line.number - 1):
                spans[-1] = (line.passage, line.number, spans[-1][2], line.end)
            else:
                spans.append((line.passage, line.number, line.start, line.end))
        return [(self._sources[passage], low, high) for passage, _, low, high in spans]


def _may_stand(line: Line, mention: Mention, source: Line, place: Mention) -> bool:
    """An unknown word with a sentence's capital is a wrong name only where the next word agrees."""
    after, there = line.keys[mention.last + 1 :][:1], source.keys[place.last + 1 :][:1]
    return mention.kind is not Kind.OPENER or after == there
