"""Documents of seven formats as normalised text with sections.

The bytes come from anybody and the libraries that read them have bugs: `parse` is for the child
process of `parser.py`, which bounds its time and memory. Libraries are imported per format.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from services.retrieval import media_types
from services.runtime.errors import InvalidInput

_READERS = {
    media_types.TEXT: "plain",
    media_types.MARKDOWN: "markdown",
    media_types.HTML: "html",
    media_types.PDF: "pdf",
    media_types.DOCX: "docx",
    media_types.CSV: "csv_rows",
    media_types.JSON_LINES: "json_lines",
    media_types.JSON_LINES_ALIAS: "json_lines",
}


@dataclass(frozen=True)
class Limits:
    """What one document may have. What is above is refused with TOO_LARGE or TOO_MANY_PAGES.

    input_bytes: bytes of the document. characters: code points of its normalised text (some 10,000
    printed pages). pages: pages of a PDF. unpacked_bytes: sum of the members of a zip file (DOCX).
    """

    input_bytes: int = 100_000_000
    characters: int = 20_000_000
    pages: int = 2_000
    unpacked_bytes: int = 200_000_000


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Section:
    """Part of a text below one heading (which it includes), or one page, row or object of it.

    start, end: code points of the text. heading_path: headings from the outermost to the own one.
    page: from 1, 0 where the format has none.
    """

    start: int
    end: int
    heading_path: tuple[str, ...]
    page: int


@dataclass(frozen=True)
class Parsed:
    """A document's normalised text. The sections tile it: in order, without gap or overlap."""

    text: str
    title: str
    sections: tuple[Section, ...]


def parse(data: bytes, media_type: str, limits: Limits = DEFAULT_LIMITS) -> Parsed:
    """Reads a document. `media_type` may have parameters, of which `charset` is honoured.

    Raises InvalidInput: EMPTY_DOCUMENT, NOT_TEXT, MEDIA_TYPE_UNKNOWN, MEDIA_TYPE_MISMATCH,
    ENCRYPTED, MALFORMED, TOO_LARGE, TOO_MANY_PAGES. MemoryError is left to the caller.
    """
    from services.retrieval.formats.writer import Writer

    kind, charset = _split(media_type)
    if kind not in _READERS:
        raise InvalidInput("MEDIA_TYPE_UNKNOWN", f"known types are {', '.join(_READERS)}")
    if not data or data.isspace():
        raise InvalidInput("EMPTY_DOCUMENT", "the document has no text")
    if len(data) > limits.input_bytes:
        raise InvalidInput("TOO_LARGE", f"the document has over {limits.input_bytes} bytes")
    read: Callable[[bytes, str | None, Writer], None]
    read = import_module(f"services.retrieval.formats.{_READERS[kind]}").read
    writer = Writer(limits)
    try:
        read(data, charset, writer)
    except (InvalidInput, MemoryError):
        raise
    except Exception as error:  # libraries raise nearly anything for broken input
        raise InvalidInput("MALFORMED", f"the document is not valid {kind}") from error
    return writer.finish()


def _split(media_type: str) -> tuple[str, str | None]:
    kind, *parameters = (part.strip().lower() for part in media_type.split(";"))
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "charset":
            return kind, value.strip(" \"'")
    return kind, None
