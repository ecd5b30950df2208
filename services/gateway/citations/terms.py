"""The terms of a sentence: words by stem, numbers by value, names, months, codes, negations."""

import re
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from services.gateway.citations.lexicon import (
    MONTHS,
    NEGATIONS,
    ONES,
    ORDINALS,
    PARTICLES,
    POLES,
    SCALES,
    SIGNS,
    STOP_WORDS,
    TENS,
    UNITS,
)


class Kind(Enum):
    STOP = "stop"
    WORD = "word"
    NUMBER = "number"
    ORDINAL = "ordinal"
    MONTH = "month"
    NAME = "name"
    CODE = "code"
    NOT = "not"
    POLE = "pole"  # one of two opposites
    OPENER = "opener"  # a capital that the sentence's beginning may explain


@dataclass(slots=True)
class Term:
    start: int  # code points of the sentence
    end: int
    key: str  # equal keys mean the same
    kind: Kind
    clause: int = 0  # commas, colons and brackets before it in the sentence
    unit: str = ""  # of a number: what is counted, if it is a unit of measure or a currency
    joins: bool = False  # goes on with the name before it
    round: bool = False  # a number in words that more words may go on
    ends: bool = False  # nothing joins it ("Newton's")


_TOKEN = re.compile(
    r"""
    (?P<code>
        https?://[^\s<>"')\]]*[\w/]
      | [\w.+-]+@[\w-]+(?:\.\w+)+
      | \w*[^\W_]_+\w+ | __?\w+ | 0x[0-9a-fA-F]+
      | [A-Z]{1,6}-\d+\w*(?:-\w+)*
      | [a-z]\w*(?:\.[a-z]\w+)+ | \w+(?=\(\))
      | \d{1,2}:\d\d(?::\d\d)? | v?\d+(?:\.\d+){2,}
    )
  | (?P<iso>\d{4}-\d\d-\d\d)
  | (?P<number>
        (?:(?<![\w)])[-−])?
        (?:\d{1,3}(?:[,\u00a0\u202f]\d{3})+(?!\d)|\d+)(?:\.\d+)?
    )(?P<suffix>st\b|nd\b|rd\b|th\b|['’]?s\b|[^\W\d_]\w*)?
  | (?P<word>(?:[^\W\d_]\.){2,}|[^\W\d_]+(?:['’][^\W\d_]+)*)
  | (?P<sign>[$€£¥%])
    """,
    re.VERBOSE,
)
_PAUSES = frozenset(",;:()—–，；：（）、")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


@lru_cache(maxsize=1 << 16)
def stem(word: str) -> str:
    """A light stem of a lower-case word: plural, -ed, -ing and -ly go."""
    for suffix, new, shortest in (
        ("'s", "", 1), ("’s", "", 1), ("s'", "s", 2), ("sses", "ss", 2), ("ies", "y", 2),
    ):  # fmt: skip
        if word.endswith(suffix) and len(word) - len(suffix) >= shortest:
            word = word[: -len(suffix)] + new
            break
    else:
        if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3:
            word = word[:-1]
    for suffix in ("ing", "ed", "ly"):
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            word = word[: -len(suffix)]
            if word[-1] == word[-2] and word[-1] not in "lsz":
                word = word[:-1]
            break
    return word[:-1] if word.endswith("e") and len(word) > 3 else word


_UNIT_OF = {stem(word): unit for word, unit in UNITS.items()}


def _number_key(value: float) -> str:
    return f"#{int(value)}" if value == int(value) else f"#{value:.9g}"


def parse(text: str) -> list[Term]:
    """The terms of a sentence, in order; where they are is in code points of it."""
    terms: list[Term] = []
    end = clause = 0
    for match in _TOKEN.finditer(text):
        gap, start, end = text[end : match.start()], match.start(), match.end()
        token, known = match[0], len(terms)
        if match["word"]:
            _add_word(terms, token, start, gap)
        elif match["number"]:
            _add_number(terms, match)
        elif match["sign"]:
            terms.append(Term(start, end, SIGNS[token], Kind.WORD))
        elif match["iso"]:
            year, month, day = token.split("-")
            terms.append(Term(start, start + 4, _number_key(int(year)), Kind.NUMBER))
            terms.append(Term(start + 5, start + 7, f"month {int(month)}", Kind.MONTH))
            terms.append(Term(start + 8, end, _number_key(int(day)), Kind.NUMBER))
        else:
            terms.append(Term(start, end, token.casefold(), Kind.CODE))
        clause += any(mark in _PAUSES for mark in gap)
        for term in terms[known:]:
            term.clause = clause
    _add_units(terms)
    return terms


def _add_word(terms: list[Term], token: str, start: int, gap: str) -> None:
    end = start + len(token)
    word = token.lower().replace("’", "'")
    capital = token[0].isupper()
    # A line or a quotation begins like a sentence.
    first = not terms or any(mark in gap for mark in '\n"“‘:(|*')
    if _CJK.match(token):
        terms += [Term(start + i, start + i + 1, c, Kind.WORD) for i, c in enumerate(token)]
    elif word.endswith("n't") or word in NEGATIONS and (first or not token.istitle()):
        terms.append(Term(start, end, "not", Kind.NOT))
    elif word in MONTHS and capital and not (first and word in ("may", "march")):
        terms.append(Term(start, end, MONTHS[word], Kind.MONTH))
    elif word in ORDINALS:
        terms.append(Term(start, end, ORDINALS[word], Kind.ORDINAL))
    elif word in ONES or word in TENS or word in SCALES:
        _add_number_word(terms, word, start, end, gap)
    elif _is_name(token, word):
        joins = _joins(terms, gap)
        key = word.replace(".", "").upper() if token.isupper() else stem(word)
        kind = Kind.OPENER if first else Kind.NAME
        terms.append(Term(start, end, key, kind, joins=joins, ends=word.endswith(("'s", "s'"))))
    elif word in PARTICLES and _joins(terms, gap):
        terms.append(Term(start, end, word, Kind.NAME, joins=True))
    elif word in STOP_WORDS and word not in POLES:
        terms.append(Term(start, end, word, Kind.STOP))
    else:
        terms.append(Term(start, end, stem(word), Kind.POLE if word in POLES else Kind.WORD))


def _is_name(token: str, word: str) -> bool:
    if token.isupper():  # "IT" is a name, "A" and "I" are not
        return len(token) > 1 or word not in STOP_WORDS
    return token[0].isupper() and word not in STOP_WORDS


def _joins(terms: list[Term], gap: str) -> bool:
    return bool(
        terms
        and terms[-1].kind in (Kind.NAME, Kind.OPENER)
        and not terms[-1].ends
        and gap in (" ", "-", "\n", ". ")
    )


def _add_number_word(terms: list[Term], word: str, start: int, end: int, gap: str) -> None:
    """Joins "twenty-four", "two hundred (and) five" and "1.2 million" to one number."""
    value = ONES.get(word) or TENS.get(word) or 0
    before = terms[-1] if terms and gap in (" ", "-", "\n", "\u00a0") else None
    if before and before.key == "and" and len(terms) > 1:
        before = terms[-2]
        if word in SCALES or before.kind is not Kind.NUMBER or not before.round:
            before = None
    if before and before.kind is Kind.NUMBER:
        number = float(before.key[1:])
        if word in SCALES:
            joined = number * SCALES[word]
        elif before.round and (number % 100 == 0 or (value < 10 and number % 10 == 0)):
            joined = number + value
        else:
            joined = None
        if joined is not None:
            before.key, before.end, before.round = _number_key(joined), end, True
            del terms[terms.index(before) + 1 :]
            return
    if word in SCALES and word != "hundred":
        terms.append(Term(start, end, word, Kind.WORD))
        return
    value = SCALES.get(word, value)
    terms.append(Term(start, end, _number_key(value), Kind.NUMBER, round=value >= 20))


def _add_number(terms: list[Term], match: re.Match[str]) -> None:
    start, end = match.span("number")
    suffix = (match["suffix"] or "").replace("’", "'").lower()
    digits = re.sub("[,\u00a0\u202f]", "", match["number"]).replace("−", "-")
    if suffix in ("st", "nd", "rd", "th"):
        terms.append(Term(start, match.end(), f"{digits}th", Kind.ORDINAL))
    elif suffix in ("s", "'s"):  # the 1980s are a number that 1980 is not
        terms.append(Term(start, match.end(), f"#{digits}s", Kind.NUMBER))
    elif suffix and stem(suffix) not in _UNIT_OF:
        terms.append(Term(start, match.end(), match[0].casefold(), Kind.CODE))
    else:
        terms.append(Term(start, end, _number_key(float(digits)), Kind.NUMBER))
        if suffix:
            terms.append(Term(end, match.end(), stem(suffix), Kind.WORD))


def _add_units(terms: list[Term]) -> None:
    for before, term, after in zip([None, *terms], terms, [*terms[1:], None], strict=False):
        if term.kind is Kind.NUMBER:
            if before and before.key in SIGNS.values() and before.end - before.start == 1:
                term.unit = before.key
            elif after:
                term.unit = _UNIT_OF.get(after.key, "")
