"""The words of a text, in any script, for scores that heed or do not heed how it is written."""

import re
import string
import unicodedata
from functools import lru_cache

from services.runtime.unicode import normalize

ARTICLES = frozenset(("a", "an", "the"))
# Written without spaces: each character is a word.
UNSPACED = (
    (0x0E00, 0x0F00),  # Thai, Lao
    (0x1000, 0x10A0),  # Burmese
    (0x1780, 0x1800),  # Khmer
    (0x3040, 0xA000),  # kana, CJK
    (0xF900, 0xFB00),
    (0x20000, 0x40000),
)
# Stand for signs that belong to a word, while the others are removed. Private use: no text has
# them, and one that does is compared with what has them too.
DOT, MINUS, PLUS, SHARP = "\ue000", "\ue001", "\ue002", "\ue003"
DOT_INSIDE = re.compile(r"(?<=\d)\.(?=\d)")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
NEGATIVE = re.compile(r"(?<![\w)\]])[-\u2212](?=\d)")
PLUSES = re.compile(r"(?<=[^\W\d_])\+\+")
SHARPS = re.compile(r"(?<=[^\W\d_])#(?!\w)")
VERSION = re.compile(r"\bv(?=\d)")
APOSTROPHE = re.compile(r"(?<=\w)['\u2019](?=\w)")


class _Table(dict[int, str]):
    """For str.translate: punctuation becomes `instead`. Made as characters occur."""

    def __init__(self, instead: str, symbols: bool) -> None:
        super().__init__()
        self._instead = instead
        self._symbols = symbols

    def __missing__(self, code: int) -> str:
        char = chr(code)
        kind = unicodedata.category(char)[0]
        self[code] = char
        if any(first <= code < last for first, last in UNSPACED):
            self[code] = f" {char} "
        elif char in string.punctuation or kind == "P" or (self._symbols and kind == "S"):
            self[code] = self._instead
        return self[code]


DELETING = _Table("", symbols=False)
SPACING = _Table(" ", symbols=True)


# One text is held against many answers: keep its words meanwhile.
@lru_cache(maxsize=8)
def answer_words(text: str) -> tuple[str, ...]:
    """Return the words as SQuAD compares them: in lower case, without articles and punctuation
    (https://rajpurkar.github.io/SQuAD-explorer, evaluate-v2.0.py).

    Other than there, punctuation is that of all scripts, each character of a script without spaces
    is a word, a dot between digits stays (1.2 is not 12), and a text of nothing else keeps its
    articles or its punctuation.
    """
    text = normalize("NFKC", text).casefold()
    words = DOT_INSIDE.sub(DOT, text).translate(DELETING).split()
    return tuple([word for word in words if word not in ARTICLES] or words or text.split())


@lru_cache(maxsize=8)
def spoken_words(text: str) -> tuple[str, ...]:
    """Return the words whatever stands between them: `card_arrival` is two words, `1,234` is
    `1234` and `v1.2` is `1.2`; but `-7`, `C++` and `C#` are not `7` and `C`."""
    text = normalize("NFKC", text).casefold()
    words = THOUSANDS.sub("", text)
    words = DOT_INSIDE.sub(DOT, words)
    words = NEGATIVE.sub(MINUS, words)
    words = PLUSES.sub(PLUS, words)
    words = SHARPS.sub(SHARP, words)
    words = APOSTROPHE.sub("", VERSION.sub("", words))
    said = words.translate(SPACING).split()
    return tuple([word for word in said if word not in ARTICLES] or said or text.split())
