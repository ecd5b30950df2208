"""Makes texts of strangers safe to show: shown as what they are, never as markup or as order."""

import re
from math import floor, log10

from services.evaluation.outcome import Estimate

LONGEST = 1200  # characters of one text in a report
# Control characters, and those that turn the direction of what follows them.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_MARKUP = re.compile(r"([\\`*_\[\]#|~!])")


def clean(text: str) -> str:
    """Return the text with a mark for each unsafe character, cut where it is too long."""
    text = _UNSAFE.sub("\ufffd", text.replace("\r\n", "\n"))
    return text if len(text) <= LONGEST else text[:LONGEST] + " [… cut]"


def markdown(text: str) -> str:
    """Return the text as one line of Markdown that shows it as it is."""
    text = " ".join(clean(text).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKUP.sub(r"\\\1", text).replace("://", ":\\/\\/")


def estimate(number: Estimate | None, digits: int = 2) -> str:
    """Return a number with its interval."""
    if number is None:
        return "–"
    low, high = f"{number.low:.{digits}f}", f"{number.high:.{digits}f}"
    return f"{number.value:.{digits}f} [{low},\N{NO-BREAK SPACE}{high}]"


def small(p: float) -> str:
    """Return a p-value."""
    return f"{p:.3f}" if p >= 0.001 else "<\N{NO-BREAK SPACE}0.001"


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with few digits."""
    if value is None:
        return "–"
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    if abs(value) >= 1e-4:
        return f"{value:.{digits}g}"
    return f"{value:.{digits - 1 - floor(log10(abs(value)))}f}"  # not 7.68e-05
