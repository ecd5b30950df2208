"""The form in which the stores keep documents, passages and metadata.

A document or a passage is one JSON text, so that it comes back exactly as it was. Metadata stands
beside it in columns to filter by, one for each key and type of value.
"""

import json
from collections.abc import Iterable, Mapping, Set
from datetime import UTC, datetime
from typing import Any

from services.retrieval.stores.store import (
    MOST_COLUMNS,
    Condition,
    Document,
    MetadataValue,
    Passage,
)
from services.runtime.errors import InvalidInput


def column(key: str, value: MetadataValue) -> str:
    """Return the column of this key for values of this type; its first letter names the type:
    s for text, n for numbers, b for truth values, t for times."""
    if isinstance(value, str):
        return f"s_{key}"
    if isinstance(value, bool):
        return f"b_{key}"
    return f"t_{key}" if isinstance(value, datetime) else f"n_{key}"


def columns(metadata: Iterable[Mapping[str, MetadataValue]]) -> set[str]:
    """Return the columns that documents with this metadata need."""
    return {column(key, value) for one in metadata for key, value in one.items()}


def missing(known: Set[str], needed: Set[str]) -> list[str]:
    """Return the columns to add to the known ones of a corpus, in order. Raises InvalidInput
    (METADATA_KEYS_FULL) if there would be too many."""
    added = sorted(needed - known)
    room = MOST_COLUMNS - len(known)
    if len(added) > room:
        raise InvalidInput(
            "METADATA_KEYS_FULL",
            f"a corpus has at most {MOST_COLUMNS} metadata keys, one with values of two types "
            f"counting twice; {added[room][2:]!r} would be one more",
        )
    return added


def condition_column(condition: Condition) -> str:
    """Return the column that a condition is about."""
    return column(condition.key, condition.value)


def words(passage: Passage) -> str:
    """Return what text search looks at: the title and the headings say what the text is about."""
    return "\n".join((passage.title, *passage.heading_path, passage.text))


def document_to_json(document: Document) -> str:
    """Return a document, without its text, as JSON."""
    metadata = {key: _plain(value) for key, value in document.metadata.items()}
    return _dumped(vars(document) | {"metadata": metadata, "updated": document.updated.isoformat()})


def document_from_json(text: str) -> Document:
    """Return what `document_to_json` was given."""
    fields = json.loads(text)
    fields["metadata"] = {key: _typed(*value) for key, value in fields["metadata"].items()}
    fields["updated"] = datetime.fromisoformat(fields["updated"])
    return Document(**fields)


def passage_to_json(passage: Passage) -> str:
    """Return a passage, without its metadata, as JSON."""
    return _dumped({name: value for name, value in vars(passage).items() if name != "metadata"})


def passage_from_json(text: str) -> Passage:
    """Return what `passage_to_json` was given, without metadata."""
    fields = json.loads(text)
    fields["heading_path"] = tuple(fields["heading_path"])
    return Passage(**fields)


def _plain(value: MetadataValue) -> list[Any]:
    if isinstance(value, datetime):
        return ["time", value.astimezone(UTC).isoformat()]
    return ["plain", value]


def _typed(kind: str, value: Any) -> MetadataValue:
    return datetime.fromisoformat(value) if kind == "time" else value


def _dumped(fields: dict[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
