"""Edits of a source sentence whose verdict is known: how the citation checker is measured.

The rules share no code and no word list with the checker. Each takes a `Case` and returns the new
sentence, or None where it does not apply. `KEEPING` edits leave the statement true of the source,
`CHANGING` edits do not.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    sentence: str  # white space made single
    passage: str  # the text that the sentence is from
    elsewhere: str  # text of other passages, a mine of foreign values
    rng: random.Random


Edit = Callable[[Case], str | None]

WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
).split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
SYNONYMS = {
    "large": "big", "big": "large", "many": "numerous", "numerous": "many", "began": "started",
    "started": "began", "begin": "start", "start": "begin", "used": "employed", "use": "employ",
    "usually": "typically", "often": "frequently", "frequently": "often", "also": "additionally",
    "important": "significant", "significant": "important", "major": "main", "main": "principal",
    "however": "nevertheless", "because": "since", "since": "because", "although": "though",
    "created": "made", "made": "created", "build": "construct", "built": "constructed",
    "helped": "assisted", "help": "assist", "show": "demonstrate", "shows": "demonstrates",
    "showed": "demonstrated", "found": "discovered", "discovered": "found", "said": "stated",
    "called": "named", "known": "recognised", "area": "region", "region": "area",
    "part": "portion", "parts": "portions", "get": "obtain", "need": "require",
    "needs": "requires", "several": "various", "various": "several", "near": "close to",
    "people": "persons", "city": "town", "country": "nation", "countries": "nations",
    "approximately": "about", "about": "roughly", "roughly": "about", "method": "technique",
    "methods": "techniques", "problem": "difficulty", "problems": "difficulties",
    "example": "instance", "quickly": "rapidly", "rapidly": "quickly", "common": "widespread",
    "allowed": "permitted", "allows": "permits", "allow": "permit", "whole": "entire",
    "entire": "whole", "became": "turned into", "received": "got", "wrote": "penned",
    "largest": "biggest", "purpose": "aim", "goal": "aim", "ended": "finished",
    "changes": "modifications", "change": "modify", "particularly": "especially",
    "especially": "particularly", "primarily": "mainly", "mainly": "primarily",
    "currently": "now", "different": "distinct", "kind": "type", "type": "kind",
    "types": "kinds", "within": "inside", "led": "headed", "located": "situated",
    "work": "labour", "house": "home", "while": "whereas", "whereas": "while",
    "return": "give back", "returns": "gives back", "function": "routine", "easy": "simple",
}  # fmt: skip
CONTRACTIONS = [
    (r"\b(is|are|was|were|does|did|do|has|have|had|would|could|should) not\b", r"\1n't"),
    (r"\bcan ?not\b", "can't"),
    (r"\bwill not\b", "won't"),
    (r"\b([Ii])t is\b", r"\1t's"),
    (r"\b([Tt])hey are\b", r"\1hey're"),
    (r"\b(is|are|was|were|does|did|has|have|had|would|could|should)n['’]t\b", r"\1 not"),
]
NUMBER = re.compile(
    r"(?<![\w.,$€£/:-])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\w/:-]|[.,]\d)"
    r"|(?<!-)\b(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)\b"
    r"(?! hundred| thousand| million)"
)
YEAR = re.compile(r"(?<![\w.,$€£/:-])1[0-9]{3}(?![\w/:-]|[.,]\d)|(?<![\w.,$€£-])20[0-2]\d(?![\w-])")
NAME = re.compile(r"\b[A-Z][a-zà-ž]+(?:[ -][A-Z][a-zà-ž]+)*\b")
NOT_NAMES = {*MONTHS, *"I The A An In On At By For From With As It He She They This That".split()}
CODE = re.compile(r"\b[a-z]{2,}(?:[._][a-z]+)+\b(?:\(\))?|\b[a-z]+\(\)")


def _value(number: str) -> float:
    return float(WORDS.index(number)) if number in WORDS else float(number.replace(",", ""))


def _replace(text: str, match: re.Match[str], new: str) -> str:
    return text[: match.start()] + new + text[match.end() :]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def copied(case: Case) -> str | None:
    return case.sentence


def without_parenthesis(case: Case) -> str | None:
    short = re.sub(r" \([^()]*\)", "", case.sentence, count=1)
    return short if short != case.sentence and len(short.split()) >= 5 else None


def without_last_clause(case: Case) -> str | None:
    """Cuts at the last ", which" and the like that leaves six words or more."""
    cut = re.search(
        r"^(.*), (?:which|who|where|although|while|and|but|so|as|because|including|with|such as)"
        r" .*$",
        case.sentence,
    )
    return cut[1] + "." if cut and len(cut[1].split()) >= 6 else None


def without_adverb(case: Case) -> str | None:
    """Only adverbs of manner and discourse: `nearly`, `rarely` or `only` would change the claim."""
    keep = (
        "early|only|family|monopoly|assembly|anomaly|supply|apply|reply|rarely|hardly|barely"
        "|scarcely|nearly|formerly"
    )
    opener = re.match(r"(?:However|Additionally|Furthermore|Also|Today|Indeed), ", case.sentence)
    if opener:
        return _capital(case.sentence[opener.end() :])
    adverb = re.search(rf" (?!(?:{keep})\b)[a-z]{{3,}}ly(?= [a-z])", case.sentence)
    return _replace(case.sentence, adverb, "") if adverb else None


def synonyms(case: Case) -> str | None:
    """Up to three words, each by a near synonym."""
    left = 3

    def swap(match: re.Match[str]) -> str:
        nonlocal left
        new = SYNONYMS.get(match[0].lower())
        if new is None or not left:
            return match[0]
        left -= 1
        return _capital(new) if match[0][0].isupper() else new

    # A capital inside a sentence is part of a name.
    new = re.sub(r"^[A-Z][a-z]*\b|(?<!['’-])\b[a-z]+\b", swap, case.sentence)
    return new if left < 3 else None


def reordered(case: Case) -> str | None:
    """In 1990, the board moved. -> The board moved in 1990."""
    match = re.match(
        r"((?:In|On|At|During|After|Before|By|From|For|Since|Under|Until) [^,;:()]{3,40}), "
        r"((?:the|a|an|it|he|she|they|[A-Z]\w+|this|these|some|many|most)\b.*?)([.!?])$",
        case.sentence,
    )
    if not match or ";" in match[2] or match[2].count(",") > 1:
        return None
    return f"{_capital(match[2])} {match[1][0].lower()}{match[1][1:]}{match[3]}"


def contracted(case: Case) -> str | None:
    for pattern, new in CONTRACTIONS:
        text = re.sub(pattern, new, case.sentence)
        if text != case.sentence:
            return text
    return None


def number_rewritten(case: Case) -> str | None:
    """4 <-> four, 1,000 <-> 1000."""
    for match in NUMBER.finditer(case.sentence):
        number = match[0]
        if number in WORDS:
            return _replace(case.sentence, match, str(WORDS.index(number)))
        if "," in number:
            return _replace(case.sentence, match, number.replace(",", ""))
        if number.isdigit() and 2 <= int(number) <= 20:
            return _replace(case.sentence, match, WORDS[int(number)])
        if number.isdigit() and len(number) >= 5:
            return _replace(case.sentence, match, f"{int(number):,}")
    return None


def synonyms_and_shorter(case: Case) -> str | None:
    short = without_last_clause(case) or without_parenthesis(case) or without_adverb(case)
    return synonyms(Case(short, case.passage, case.elsewhere, case.rng)) if short else None


def _numbers(text: str) -> list[re.Match[str]]:
    return [m for m in NUMBER.finditer(text) if not YEAR.fullmatch(m[0])]


def _change(case: Case, found: list[re.Match[str]], values: list[str]) -> str | None:
    """One of `found`, replaced by one of `values` that is another number."""
    if not found:
        return None
    match = case.rng.choice(found)
    values = sorted({v for v in values if _value(v) != _value(match[0])})
    return _replace(case.sentence, match, case.rng.choice(values)) if values else None


def number_random(case: Case) -> str | None:
    there = {_value(m[0]) for m in NUMBER.finditer(case.passage)}
    values = [str(n) for n in case.rng.sample(range(2, 1000), 40) if n not in there]
    return _change(case, _numbers(case.sentence), values)


def number_same_passage(case: Case) -> str | None:
    return _change(case, _numbers(case.sentence), [m[0] for m in _numbers(case.passage)])


def year_random(case: Case) -> str | None:
    values = [str(y) for y in case.rng.sample(range(1500, 2026), 40) if str(y) not in case.passage]
    return _change(case, list(YEAR.finditer(case.sentence)), values)


def year_same_passage(case: Case) -> str | None:
    return _change(case, list(YEAR.finditer(case.sentence)), YEAR.findall(case.passage))


def _change_month(case: Case, months: list[str]) -> str | None:
    month = "|".join(MONTHS)
    match = re.search(rf"(?:{month})(?= \d)|(?<=[Ii]n )(?:{month})", case.sentence)
    months = sorted(set(months) - {match[0]}) if match else []
    return _replace(case.sentence, match, case.rng.choice(months)) if match and months else None


def month_random(case: Case) -> str | None:
    return _change_month(case, [m for m in MONTHS if m not in case.passage])


def month_same_passage(case: Case) -> str | None:
    return _change_month(case, re.findall(rf"\b(?:{'|'.join(MONTHS)})\b", case.passage))


def _names(text: str) -> list[re.Match[str]]:
    """Names that no sentence begins with, so that the capital is not the sentence's."""
    return [
        m
        for m in NAME.finditer(text)
        if re.search(r"[a-z,;] $", text[: m.start()]) and not NOT_NAMES & set(m[0].split())
    ]


def _change_name(case: Case, mine: str) -> str | None:
    found = _names(case.sentence)
    known = {m[0] for m in _names(case.passage)}
    start = NAME.match(case.sentence)
    if start and start[0] in known:
        found.append(start)
    if not found:
        return None
    match = case.rng.choice(found)
    own = {word[:4] for word in re.split("[ -]", match[0])}
    names = {m[0] for m in _names(mine)}
    if mine != case.passage:
        names = {n for n in names if not any(w in case.passage for w in n.split())}
    names = {n for n in names if not own & {w[:4] for w in re.split("[ -]", n)}}
    return _replace(case.sentence, match, case.rng.choice(sorted(names))) if names else None


def name_same_passage(case: Case) -> str | None:
    return _change_name(case, case.passage)


def name_elsewhere(case: Case) -> str | None:
    return _change_name(case, case.elsewhere)


def code_same_passage(case: Case) -> str | None:
    found = list(CODE.finditer(case.sentence))
    if not found:
        return None
    match = case.rng.choice(found)
    codes = sorted({c for c in CODE.findall(case.passage)} - {match[0]})
    codes = [c for c in codes if c not in match[0] and match[0] not in c]
    return _replace(case.sentence, match, case.rng.choice(codes)) if codes else None


def negation_inserted(case: Case) -> str | None:
    match = re.search(
        r"\b(is|are|was|were|can|could|will|would|should|must|does|did"
        r"|(?:has|have|had)(?= been\b| \w+ed\b))\b(?! not|n't|n’t| never| no\b|not)",
        case.sentence,
    )
    word = case.rng.choice(["not", "not", "never"])
    return _replace(case.sentence, match, f"{match[0]} {word}") if match else None


def negation_removed(case: Case) -> str | None:
    for pattern, new in [
        (r"\b(can)not\b(?! only)", r"\1"),
        (r"\b(is|are|was|were|does|did|do|has|have|had|would|could|should)n['’]t\b", r"\1"),
        (r"\bcan['’]t\b", "can"),
        (r"\bwon['’]t\b|\bwill not\b", "will"),
        (r"\b(is|are|was|were|can|could|would|should|must|do|does|did|has|have|had|may|might) not "
         r"(?!only|just|necessarily|merely|all\b)", r"\1 "),
        (r"\bnever ", ""),
        (r"\bwithout\b", "with"),
        (r"\b(is|are|was|were|has|have|had) no (?!longer|more|less|later|doubt)", r"\1 "),
    ]:  # fmt: skip
        text = re.sub(pattern, new, case.sentence, count=1)
        if text != case.sentence:
            return text
    return None


def opposite(case: Case) -> str | None:
    """One comparative or direction by its opposite; reported, not part of the bar."""
    pairs = {"more": "less", "increase": "decrease", "increased": "decreased", "before": "after",
             "after": "before", "larger": "smaller", "higher": "lower", "lower": "higher",
             "most": "least", "north": "south", "south": "north", "east": "west", "west": "east",
             "first": "last", "above": "below", "maximum": "minimum"}  # fmt: skip
    found = [m for m in re.finditer(r"\b[a-z]+\b", case.sentence) if m[0] in pairs]
    match = case.rng.choice(found) if found else None
    return _replace(case.sentence, match, pairs[match[0]]) if match else None


def unrelated(case: Case) -> str | None:
    """A whole sentence of a text that is not among the sources."""
    found = re.findall(r"(?<=[a-z]\. )[A-Z][^.!?]{40,200}[a-z]\.(?= [A-Z])", case.elsewhere)
    return case.rng.choice(found) if found else None


KEEPING: dict[str, Edit] = {
    "copied": copied,
    "shortened: parenthesis": without_parenthesis,
    "shortened: last clause": without_last_clause,
    "shortened: adverb": without_adverb,
    "reworded: synonyms": synonyms,
    "reworded: reordered": reordered,
    "reworded: contraction": contracted,
    "reworded: 4 <-> four": number_rewritten,
    "reworded and shortened": synonyms_and_shorter,
}
CHANGING: dict[str, Edit] = {
    "number: random": number_random,
    "number: same passage": number_same_passage,
    "year: random": year_random,
    "year: same passage": year_same_passage,
    "month: random": month_random,
    "month: same passage": month_same_passage,
    "name: elsewhere": name_elsewhere,
    "name: same passage": name_same_passage,
    "code: same passage": code_same_passage,
    "negation inserted": negation_inserted,
    "negation removed": negation_removed,
    "opposite word": opposite,
    "unrelated sentence": unrelated,
}
