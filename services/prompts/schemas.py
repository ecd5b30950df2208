"""Which JSON schemas a caller may send.

A grammar is compiled from the schema, so its cost is bounded before the engine sees it: only
keywords that are known to compile well, and no large repetitions.
"""

import json
from collections.abc import Iterator
from typing import Any

from services.runtime.errors import InvalidInput

MAX_BYTES = 16 * 1024
MAX_DEPTH = 10
MAX_ENUM = 100
MAX_REPEAT = 1000  # the sum over the schema of items and code points that are counted

ANNOTATIONS = {"$schema", "title", "description", "default", "examples"}
COUNTS = {"minItems", "maxItems", "minLength", "maxLength"}
KEYWORDS = ANNOTATIONS | COUNTS | {
    "type", "enum", "const", "properties", "required", "additionalProperties", "items",
    "prefixItems", "anyOf", "oneOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
}  # fmt: skip


def check_schema(text: str) -> None:
    """Raise InvalidInput (JSON_SCHEMA_INVALID) unless `text` is a schema within the limits."""
    if len(text.encode()) > MAX_BYTES:
        raise _invalid(f"has more than {MAX_BYTES} bytes")
    try:
        schema = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _invalid("is not JSON") from error
    if not isinstance(schema, dict):
        raise _invalid("is not an object")
    repeats = 0
    level = [schema]
    for depth in range(1, MAX_DEPTH + 2):
        if depth > MAX_DEPTH and level:
            raise _invalid(f"is more than {MAX_DEPTH} levels deep")
        repeats += sum(map(_check_level, level))
        level = [inner for outer in level for inner in _inside(outer)]
    if repeats > MAX_REPEAT:
        raise _invalid(f"counts more than {MAX_REPEAT} items and code points")


def _check_level(schema: Any) -> int:
    """Check one schema without those inside it; return how much it counts."""
    if isinstance(schema, bool):
        return 0
    if not isinstance(schema, dict):
        raise _invalid("has something else where a schema belongs")
    if unknown := schema.keys() - KEYWORDS:
        raise _invalid(f"has the keyword {min(unknown)[:40]!r}, which is not supported")
    values = schema.get("enum", [])
    if not isinstance(values, list) or len(values) > MAX_ENUM:
        raise _invalid(f"has an enum that is no list of at most {MAX_ENUM} values")
    if not isinstance(schema.get("properties", {}), dict):
        raise _invalid("has properties that are no object")
    counted = [schema[key] for key in COUNTS & schema.keys()]
    if not all(isinstance(count, int) and 0 <= count <= MAX_REPEAT for count in counted):
        raise _invalid(f"has a length or number of items that is not from 0 to {MAX_REPEAT}")
    return max(counted, default=0)


def _inside(schema: Any) -> Iterator[Any]:
    if isinstance(schema, bool):
        return
    yield from schema.get("properties", {}).values()
    for key in ("items", "additionalProperties"):
        if key in schema:
            yield schema[key]
    for key in ("prefixItems", "anyOf", "oneOf"):
        if key in schema:
            if not isinstance(schema[key], list):
                raise _invalid(f"has a {key} that is no list")
            yield from schema[key]


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _invalid(what: str) -> InvalidInput:
    return InvalidInput("JSON_SCHEMA_INVALID", f"the JSON schema {what}")
