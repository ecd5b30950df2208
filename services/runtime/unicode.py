"""Unicode's normal forms, in time that grows with the length of a text."""

import functools
import re
import sys
import unicodedata
from typing import Literal

MOST_MARKS = 30  # on one character: the Stream-Safe Text Format of Unicode's annex 15


def normalize(form: Literal["NFC", "NFD", "NFKC", "NFKD"], text: str) -> str:
    """Return the normal form of a text, of which each character keeps its first 30 marks.

    As unicodedata.normalize, which takes a time that grows with the square of the marks on one
    character: 12 s for 80,000, while no other thread runs.
    """
    if not text.isascii():
        text = _too_many_marks().sub(r"\1", text)
    return unicodedata.normalize(form, text)


@functools.cache
def _too_many_marks() -> "re.Pattern[str]":
    marks = "".join(char for char in map(chr, range(sys.maxunicode + 1)) if _begins_with_mark(char))
    return re.compile(f"([{marks}]{{{MOST_MARKS}}})[{marks}]+")


def _begins_with_mark(char: str) -> bool:
    if unicodedata.combining(char):
        return True
    parts = unicodedata.decomposition(char)
    return bool(parts) and unicodedata.combining(unicodedata.normalize("NFKD", char)[0]) > 0
