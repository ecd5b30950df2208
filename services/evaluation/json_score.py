"""How alike two JSON values are."""

import json
import re
from collections import Counter
from functools import lru_cache
from typing import Any

MOST_TRIES = 100  # places of one text where JSON may begin
FENCE = re.compile(r"```[a-zA-Z]*\n(.*?)```", re.DOTALL)


def parse(text: str) -> dict[str, Any] | list[Any] | None:
    """Return the object or the array that the text is; None if it is none."""
    try:
        value = DECODER.decode(text.strip())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def inside(text: str) -> str:
    """Return the longest object or array that stands in the text, in a code fence or between
    words; empty if there is none."""
    found = [body.strip() for body in FENCE.findall(text) if parse(body) is not None]
    place = 0
    for _ in range(MOST_TRIES):
        start = min(
            (i for i in (text.find("{", place), text.find("[", place)) if i >= 0), default=-1
        )
        if start < 0:
            break
        try:
            _, place = DECODER.raw_decode(text, start)
            found.append(text[start:place])
        except (ValueError, RecursionError):
            place = start + 1
    return max(found, key=len, default="")


def field_f1(said: Any, right: Any) -> float:
    """Return the F1 of the fields, each a path and a value. The order of keys does not matter, nor
    that of an array of single values."""
    said_fields, right_fields = Counter(_fields(said)), Counter(_fields(right))
    shared = (said_fields & right_fields).total()
    return 2 * shared / (said_fields.total() + right_fields.total())


@lru_cache(maxsize=8)  # one text is held against many answers
def said_values(text: str) -> str:
    """Return the values of the JSON inside a text, without its keys, a space between them; the text
    if there is none."""
    value = parse(inside(text))
    if value is None:
        return text
    scalars = [scalar for _, kind, scalar in _fields(value) if kind not in ("dict", "list")]
    return " ".join(said if isinstance(said, str) else json.dumps(said) for said in scalars)


def _fields(value: Any) -> list[tuple[tuple[str | int, ...], str, Any]]:
    """Return a path, a type and a value for each; an empty object or array is a value."""
    fields = []
    waiting: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while waiting:
        path, item = waiting.pop()
        if isinstance(item, dict) and item:
            waiting += [((*path, key), under) for key, under in item.items()]
        elif isinstance(item, list) and item:
            nested = any(isinstance(under, dict | list) for under in item)
            places = range(len(item)) if nested else [-1] * len(item)
            waiting += [((*path, at), under) for at, under in zip(places, item, strict=True)]
        else:
            fields.append((path, *_scalar(item)))
    return fields


def _scalar(value: Any) -> tuple[str, Any]:
    """Return a type and a value, so that true is not 1, but 1 is 1.0."""
    if isinstance(value, str):
        return "text", value.strip()
    if isinstance(value, dict | list):
        return type(value).__name__, None
    return ("truth" if isinstance(value, bool) else "number"), value


def _no_number(name: str) -> None:
    raise ValueError(name)


DECODER = json.JSONDecoder(parse_constant=_no_number)
