"""Bytes of the text formats as a string."""

import codecs
import re

from services.retrieval.parsing import Limits
from services.runtime.errors import InvalidInput

# What other formats begin with. Each is either no valid text or says plainly what the file is.
_SIGNATURES = (
    b"%PDF-",
    b"PK\x03\x04",  # zip: DOCX, XLSX, EPUB
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",  # OLE2: DOC, XLS
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",  # JPEG
    b"GIF87a",
    b"GIF89a",
    b"\x1f\x8b",  # gzip
    b"{\\rtf",
    b"\x7fELF",
)
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Charsets that carry text; Python has others (utf-7, idna, rot13, zlib) that no document is in.
_CHARSET = re.compile(
    r"ascii|utf-(8|16|32)(-[lb]e)?|iso8859-\d+|cp\d+|mac-\w+|koi8-\w|shift_jis\w*|euc_\w+"
    r"|iso2022_\w+|gb2312|gbk|gb18030|big5\w*|johab|tis-620|hz"
)


def decode(data: bytes, charset: str | None, limits: Limits) -> str:
    """A byte order mark wins, then `charset`, then UTF-8.

    Raises InvalidInput: MEDIA_TYPE_MISMATCH if the bytes are of another format, NOT_TEXT if they
    are not in the charset or have NULs, TOO_LARGE.
    """
    if data.startswith(_SIGNATURES):
        raise InvalidInput("MEDIA_TYPE_MISMATCH", "the document is a binary file, not text")
    if len(data) > 4 * limits.characters:  # no charset needs more bytes for one character
        raise InvalidInput("TOO_LARGE", f"the text has over {limits.characters} characters")
    by_mark = [codec for mark, codec in _BOMS if data.startswith(mark)]
    codec = by_mark[0] if by_mark else _codec(charset or "utf-8")
    try:
        text = data.decode(codec)
    except UnicodeError:
        raise InvalidInput("NOT_TEXT", f"the document is not text in {codec}") from None
    if "\0" in text:
        raise InvalidInput("NOT_TEXT", "the document has NUL characters")
    return text


def _codec(charset: str) -> str:
    try:
        name = codecs.lookup(charset).name
    except (LookupError, ValueError):
        name = ""
    if not _CHARSET.fullmatch(name):
        raise InvalidInput("NOT_TEXT", "the charset is unknown")
    return "cp1252" if name == "iso8859-1" else name  # as the web reads it: "smart quotes" and all
