"""How an answer is scored: one score that heeds its form and one that does not."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence

from services.evaluation import json_score
from services.evaluation.comparison import Question, ScorerName, Scoring
from services.evaluation.numbers import bare, numbers, within
from services.evaluation.patterns import check_patterns, matches
from services.evaluation.words import answer_words, spoken_words
from services.runtime.errors import InvalidInput
from services.runtime.unicode import normalize

__all__ = ["check_patterns", "chosen", "label_of", "score"]

STRICT: frozenset[ScorerName] = frozenset(("exact_match", "token_f1", "label", "json", "regex"))
FORMAT_BLIND: frozenset[ScorerName] = frozenset(("contains", "numeric", "token_f1"))
FORM_IS_TASK: frozenset[ScorerName] = frozenset(("label", "json", "regex"))
LONG = 20  # words: nobody writes a right answer of more word by word
MOST_LABEL_WORDS = 3
FEWEST_USES = 2  # of each label, on average
QUOTES = "\"'`\u00b4\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb*"
ENDS = ".,;:!?\u3002\uff0e\u0964"
JOINTS = re.compile(r"(?<=[^\W_])[\s_-]+(?=[^\W_])")
SPACE = re.compile(r"\s+")


def chosen(
    questions: Sequence[Question],
    strict: ScorerName | None,
    format_blind: ScorerName | None,
    numeric_tolerance: float,
    judge: bool,
    strict_decides: bool | None,
) -> Scoring:
    """Return how to score; what is None is chosen from the answers. Raises InvalidInput
    (SCORER_INVALID) for a scorer that does not fit its place or the answers. Blocks."""
    if not (math.isfinite(numeric_tolerance) and 0 <= numeric_tolerance <= 1):
        raise InvalidInput("SCORER_INVALID", "the numeric tolerance is from 0 to 1")
    if strict is not None and strict not in STRICT:
        raise InvalidInput("SCORER_INVALID", f"{strict} does not heed the form")
    if format_blind is not None and format_blind not in FORMAT_BLIND:
        raise InvalidInput("SCORER_INVALID", f"{format_blind} heeds the form")
    strict = strict or _strict(questions)
    format_blind = format_blind or _format_blind(questions, strict, numeric_tolerance)
    _fit(questions, strict, format_blind)
    decides = strict in FORM_IS_TASK if strict_decides is None else strict_decides
    return Scoring(strict, format_blind, numeric_tolerance, judge, decides)


def score(scoring: Scoring, text: str, answers: Sequence[str]) -> tuple[float, float]:
    """Return the strict and the format-blind score of a text, each from 0 to 1 and against the best
    of `answers`. Takes 0.4 s at most with regular expressions, and milliseconds without."""
    if scoring.strict == "regex":
        strict = float(matches(text, answers, whole=True))
        # An answer is a pattern: a right one occurs in the text if the pattern does.
        blind = strict or float(matches(text, answers, whole=False))
        return strict, blind
    strict = _best(SCORERS[scoring.strict], text, answers)
    if scoring.format_blind == "numeric":
        return strict, _numeric(text, answers, scoring.numeric_tolerance)
    if scoring.strict == "json" and scoring.format_blind == "token_f1":
        return strict, _best(_value_f1, text, answers)
    return strict, _best(SCORERS[scoring.format_blind], text, answers)


def label_of(text: str) -> str:
    """Return a label without what may differ: case, quotes, a full stop at the end, and whether its
    words are joined by spaces, hyphens or underscores."""
    label = normalize("NFKC", text).casefold().strip()
    bare_label = ""
    while label != bare_label:
        bare_label, label = label, label.strip(QUOTES).rstrip(ENDS).strip()
    return JOINTS.sub(" ", SPACE.sub(" ", label)) or text.strip()


def _strict(questions: Sequence[Question]) -> ScorerName:
    answers = [answer for question in questions for answer in question.answers]
    if answers and all(json_score.parse(answer) is not None for answer in answers):
        return "json"
    labels = {label_of(answer) for answer in answers}
    few = 2 <= len(labels) and len(labels) * FEWEST_USES <= len(questions)
    short = all(len(answer.split()) <= MOST_LABEL_WORDS for answer in answers)
    single = all(len(question.answers) == 1 for question in questions)
    # Answers that are to change are facts, not labels.
    changing = any(question.stale_answers for question in questions)
    return "label" if few and short and single and not changing else "exact_match"


def _format_blind(
    questions: Sequence[Question], strict: ScorerName, tolerance: float
) -> ScorerName:
    answers = [answer for question in questions for answer in question.answers]
    if strict == "regex" or not answers:
        return "contains"
    if strict == "json":
        return "token_f1"  # the order of keys must not matter
    if tolerance > 0 and all(map(bare, answers)):
        return "numeric"
    long = statistics.median(len(spoken_words(answer)) for answer in answers) > LONG
    return "token_f1" if long else "contains"


def _fit(questions: Sequence[Question], strict: ScorerName, format_blind: ScorerName) -> None:
    """Raise InvalidInput (SCORER_INVALID) if no answer to some question could ever be right."""
    if strict == "regex" and format_blind != "contains":
        raise InvalidInput("SCORER_INVALID", "regex goes with contains: its answers are no words")
    for question in questions:
        if strict == "json" and all(json_score.parse(said) is None for said in question.answers):
            message = f"json: no answer of line {question.line} is a JSON object or array"
            raise InvalidInput("SCORER_INVALID", message)
        if format_blind == "numeric" and not any(
            next(numbers(said), None) for said in question.answers
        ):
            message = f"numeric: no answer of line {question.line} has a number"
            raise InvalidInput("SCORER_INVALID", message)


def _best(scorer: Callable[[str, str], float], text: str, answers: Sequence[str]) -> float:
    return max((scorer(text, answer) for answer in answers), default=0.0)


def _exact_match(text: str, answer: str) -> float:
    return float(answer_words(text) == answer_words(answer))


def _token_f1(text: str, answer: str) -> float:
    return _f1(answer_words(text), answer_words(answer))


def _value_f1(text: str, answer: str) -> float:
    """Return the F1 of the words of the values: keys are form, and what is said around the JSON
    does not count."""
    said, right = json_score.said_values(text), json_score.said_values(answer)
    return _f1(spoken_words(said), spoken_words(right))


def _f1(said: Sequence[str], right: Sequence[str]) -> float:
    if not (said or right):
        return 1.0
    shared = (Counter(said) & Counter(right)).total()
    return 2 * shared / (len(said) + len(right))


def _contains(text: str, answer: str) -> float:
    if not any(map(str.isalnum, answer)):
        return float(answer in text)  # signs alone, such as an emoji
    said, right = (f" {' '.join(spoken_words(part))} " for part in (text, answer))
    return float(right in said)


def _label(text: str, answer: str) -> float:
    return float(label_of(text) == label_of(answer))


def _json(text: str, answer: str) -> float:
    said, right = json_score.parse(text), json_score.parse(answer)
    return 0.0 if said is None or right is None else json_score.field_f1(said, right)


def _numeric(text: str, answers: Sequence[str], tolerance: float) -> float:
    said = list(numbers(text))
    # The first number of an answer is what it says; what follows may be a unit or a remark.
    right = [number for answer in answers if (number := next(numbers(answer), None))]
    return float(any(within(number, one, tolerance) for one in right for number in said))


SCORERS: dict[ScorerName, Callable[[str, str], float]] = {
    "exact_match": _exact_match,
    "token_f1": _token_f1,
    "contains": _contains,
    "label": _label,
    "json": _json,
}
