"""The one form that the text of every document has."""

import re

from services.runtime.unicode import normalize

# Controls; soft hyphen; zero-width characters; bidi marks, overrides and isolates; surrogates;
# noncharacters; tags and supplementary variation selectors. None can be seen, all can hide words.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e0fff]"
)
_NEWLINE = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_NO_BREAK_SPACE = re.compile("[\xa0\u2007\u202f]")
# A single joiner inside a word is spelling in Persian, Malayalam and others, and makes emoji.
_JOINER = re.compile(
    "[\u200c\u200d]{2,}|(?<![^\x00-\x7f\\s])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f\\s])"
)
_BLANK_LINES = re.compile("\n{3,}")


def normalise(text: str) -> str:
    """`text` in Unicode form NFC, with `\\n` as newline, without what cannot be seen.

    Removed: control characters but tab, zero-width characters (a single joiner between two letters
    outside ASCII stays), bidi controls, lone surrogates, spaces before a newline, newlines after
    two. No-break spaces become spaces. Normalising twice changes nothing.
    """
    text = _INVISIBLE.sub("", _NEWLINE.sub("\n", text))
    if not text.isascii():
        text = normalize("NFC", _NO_BREAK_SPACE.sub(" ", text))
        text = normalize("NFC", _JOINER.sub("", text))
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return _BLANK_LINES.sub("\n\n", text)
