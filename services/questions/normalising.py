"""When two texts say the same: case, white space and punctuation aside."""

import hashlib
import unicodedata
from collections.abc import Callable

KEPT = frozenset("#%&*+-/@\\_")  # parts of names and of code: C#, a-b, x_y
CJK = range(0x3040, 0xA000)  # written without spaces: each character is a word


class _Table(dict[int, str | int]):
    """For str.translate: made as characters occur."""

    def __missing__(self, code: int) -> str | int:
        char = chr(code)
        if code in CJK:
            self[code] = f" {char} "
        elif unicodedata.category(char).startswith("P") and char not in KEPT:
            self[code] = " "
        else:
            self[code] = code
        return self[code]


TABLE = _Table()


def normalised(text: str) -> str:
    """Return the words of a text in one case, a space between them."""
    text = unicodedata.normalize("NFKC", text).casefold()
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
