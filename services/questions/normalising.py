"""When two texts say the same: case, white space and punctuation aside."""

import hashlib
import unicodedata
from collections.abc import Callable

from services.runtime.unicode import normalize

KEPT = frozenset("#%&*+-/@\\_")  # parts of names and of code: C#, a-b, x_y
MANY = 0x3000  # from here on code points are not kept: all of them would take 80 MB
CJK = range(0x3040, 0xA000)  # written without spaces: each character is a word


class _Table(dict[int, str | int]):
    """For str.translate: made as characters occur."""

    def __missing__(self, code: int) -> str | int:
        char = chr(code)
        if code in CJK:
            self[code] = f" {char} "
        elif unicodedata.category(char).startswith("P") and char not in KEPT:
            self[code] = " "
        elif code < MANY:
            self[code] = code
        else:
            return code
        return self[code]


TABLE = _Table()


def normalised(text: str) -> str:
    """Return the words of a text in one case, a space between them."""
    text = normalize("NFKC", text).casefold()
    return " ".join(text.translate(TABLE).split()) or text


def spaced(text: str) -> str:
    """Return a text without surrounding and repeated white space."""
    return " ".join(text.split())


def digest(*texts: str, form: Callable[[str], str] = normalised) -> bytes:
    """Return 16 bytes that are equal for texts of the same forms, in the same order."""
    hasher = hashlib.blake2b(digest_size=16)
    for text in texts:
        said = form(text).encode()
        hasher.update(len(said).to_bytes(8, "big") + said)
    return hasher.digest()
