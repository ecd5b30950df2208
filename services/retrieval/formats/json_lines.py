"""JSON Lines: a section per object, `name: value` lines, nested names joined by dots."""

import json
from collections.abc import Iterator
from typing import Any

from services.retrieval.formats.decoding import decode
from services.retrieval.formats.writer import Writer
from services.runtime.errors import InvalidInput

# Numbers stay as they are written: no digit is lost, and none costs time to convert.
_DECODER = json.JSONDecoder(parse_float=str, parse_int=str, parse_constant=str)


def read(data: bytes, charset: str | None, writer: Writer) -> None:
    lines = decode(data, charset, writer.limits).split("\n")
    for number, line in enumerate(lines, start=1):
        line = line.strip(" \t\r\ufeff")
        if not line:
            continue
        try:
            value = _DECODER.decode(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise InvalidInput("MALFORMED", f"line {number} is not a JSON object")
        writer.section()
        writer.add("\n".join(_pairs("", value)))


def _pairs(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _pairs(f"{name}.{key}" if name else key, item)
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for index, item in enumerate(value):
            yield from _pairs(f"{name}.{index}", item)
    else:
        values = map(_scalar, value if isinstance(value, list) else [value])
        if text := ", ".join(text for text in values if text.strip()):
            yield f"{name}: {text}"


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)
