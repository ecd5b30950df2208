"""CSV (RFC 4180; also with semicolon, tab or bar): a section per row, `column: value` lines."""

import csv
import io

from services.retrieval.formats.decoding import decode
from services.retrieval.formats.writer import Writer


def read(data: bytes, charset: str | None, writer: Writer) -> None:
    text = decode(data, charset, writer.limits)
    csv.field_size_limit(writer.limits.characters)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text))
    header = next((row for row in rows if any(row)), [])
    names = [" ".join(name.split()) for name in header]
    alone = True
    for row in rows:
        pairs = (
            f"{_name(names, i)}: {value.strip()}"
            for i, value in enumerate(row)
            if value and not value.isspace()
        )
        writer.section()
        writer.add("\n".join(pairs))
        alone = False
    if alone:
        writer.add(" | ".join(name for name in names if name))


def _name(names: list[str], index: int) -> str:
    return names[index] if index < len(names) and names[index] else f"column {index + 1}"


def _delimiter(text: str) -> str:
    """The one that the first line has most of; a comma where it has none."""
    line = text.lstrip("\ufeff\r\n").partition("\n")[0]
    return max(",;\t|", key=line.count)
