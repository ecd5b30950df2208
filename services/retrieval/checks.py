"""Checks what callers send to retrieval, and turns it into plain values."""

import base64
import binascii
import re
from collections.abc import Mapping
from datetime import UTC

from tworoads.v1 import retrieval_pb2 as pb

from services.retrieval.search import Mode
from services.retrieval.stores.store import Comparator, Condition, Filter, MetadataValue
from services.runtime.errors import InvalidInput

KEY = re.compile(r"[a-z][a-z0-9_]{0,62}")
MOST_METADATA = 32
MOST_VALUE = 1024
MOST_ID = 512
MOST_URI = 2048
MOST_MEDIA_TYPE = 256
MOST_QUERY = 8192
MOST_LIMIT = 100
DEFAULT_LIMIT = 5
MOST_FILTER_IDS = 1000
MOST_CONDITIONS = 16
MOST_PAGE = 1000
DEFAULT_PAGE = 100

MODES: dict[int, Mode] = {
    pb.SEARCH_MODE_UNSPECIFIED: "hybrid",
    pb.SEARCH_MODE_HYBRID: "hybrid",
    pb.SEARCH_MODE_VECTOR: "vector",
    pb.SEARCH_MODE_TEXT: "text",
}
COMPARATORS: dict[int, Comparator] = {
    pb.COMPARATOR_UNSPECIFIED: "eq",
    pb.COMPARATOR_EQUAL: "eq",
    pb.COMPARATOR_NOT_EQUAL: "ne",
    pb.COMPARATOR_LESS: "lt",
    pb.COMPARATOR_LESS_EQUAL: "le",
    pb.COMPARATOR_GREATER: "gt",
    pb.COMPARATOR_GREATER_EQUAL: "ge",
}


def document_id(id: str) -> str:
    """Return a document's id if it is one. Raises InvalidInput (DOCUMENT_ID_INVALID)."""
    if not 0 < len(id) <= MOST_ID or any(ord(char) < 32 or ord(char) == 127 for char in id):
        raise InvalidInput(
            "DOCUMENT_ID_INVALID",
            f"a document id is 1 to {MOST_ID} characters without control characters",
        )
    return id


def uri(text: str) -> str:
    """Return a uri if it is short enough. Raises InvalidInput (URI_INVALID)."""
    if len(text) > MOST_URI:
        raise InvalidInput("URI_INVALID", f"a uri has at most {MOST_URI} characters")
    return text


def media_type(text: str) -> str:
    """Return a media type if it is short enough. Raises InvalidInput (MEDIA_TYPE_UNKNOWN)."""
    if len(text) > MOST_MEDIA_TYPE:
        raise InvalidInput("MEDIA_TYPE_UNKNOWN", "there is no such media type")
    return text


def metadata(given: Mapping[str, pb.MetadataValue]) -> dict[str, MetadataValue]:
    """Return a document's metadata. Raises InvalidInput (METADATA_INVALID)."""
    if len(given) > MOST_METADATA:
        raise InvalidInput("METADATA_INVALID", f"metadata has at most {MOST_METADATA} keys")
    for key in given:
        if not KEY.fullmatch(key):
            raise InvalidInput(
                "METADATA_INVALID",
                "a metadata key is 1 to 63 of a-z, 0-9 and '_', and begins with a letter",
            )
    return {key: _value(value, "METADATA_INVALID") for key, value in given.items()}


def query(text: str) -> str:
    """Return a query without its outer white space. Raises InvalidInput (QUERY_EMPTY,
    QUERY_TOO_LONG)."""
    if len(text) > MOST_QUERY:
        raise InvalidInput("QUERY_TOO_LONG", f"a query has at most {MOST_QUERY} characters")
    if not text.strip():
        raise InvalidInput("QUERY_EMPTY", "the query is empty")
    return text.strip()


def mode(given: int) -> Mode:
    """Return how to search. Raises InvalidInput (SEARCH_MODE_UNKNOWN)."""
    if given not in MODES:
        raise InvalidInput("SEARCH_MODE_UNKNOWN", "there is no such search mode")
    return MODES[given]


def limit(given: int) -> int:
    """Return how many passages to find. Raises InvalidInput (LIMIT_OUT_OF_RANGE)."""
    if given > MOST_LIMIT:
        raise InvalidInput("LIMIT_OUT_OF_RANGE", f"limit is from 1 to {MOST_LIMIT}")
    return given or DEFAULT_LIMIT


def filter_of(given: pb.Filter) -> Filter:
    """Return a filter. Raises InvalidInput (FILTER_INVALID)."""
    if len(given.document_ids) > MOST_FILTER_IDS or len(given.conditions) > MOST_CONDITIONS:
        raise InvalidInput(
            "FILTER_INVALID",
            f"a filter has at most {MOST_FILTER_IDS} documents and {MOST_CONDITIONS} conditions",
        )
    conditions = tuple(_condition(condition) for condition in given.conditions)
    return Filter(tuple(given.document_ids), conditions)


def page_size(given: int) -> int:
    """Return how many entries a page has."""
    return min(given, MOST_PAGE) or DEFAULT_PAGE


def page_token(last: str) -> str:
    """Return the token of the page behind the entry named `last`."""
    return base64.urlsafe_b64encode(last.encode()).decode()


def after(token: str) -> str:
    """Return the name that a page token stands for. Raises InvalidInput (PAGE_TOKEN_INVALID)."""
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise InvalidInput("PAGE_TOKEN_INVALID", "there is no page of this token") from None


def _condition(given: pb.Condition) -> Condition:
    if not KEY.fullmatch(given.key) or given.comparator not in COMPARATORS:
        raise InvalidInput("FILTER_INVALID", "a condition has no valid key or comparator")
    value = _value(given.value, "FILTER_INVALID")
    comparator = COMPARATORS[given.comparator]
    if comparator not in ("eq", "ne") and isinstance(value, str | bool):
        raise InvalidInput("FILTER_INVALID", "only numbers and times compare by less and greater")
    return Condition(given.key, comparator, value)


def _value(given: pb.MetadataValue, reason: str) -> MetadataValue:
    kind = given.WhichOneof("kind")
    if kind == "string_value":
        if len(given.string_value) > MOST_VALUE:
            raise InvalidInput(reason, f"a text value has at most {MOST_VALUE} characters")
        return given.string_value
    if kind == "number_value":
        if given.number_value != given.number_value or abs(given.number_value) == float("inf"):
            raise InvalidInput(reason, "a number value is finite")
        return given.number_value
    if kind == "bool_value":
        return given.bool_value
    if kind == "time_value":
        try:
            return given.time_value.ToDatetime(tzinfo=UTC)
        except (ValueError, OverflowError):
            raise InvalidInput(reason, "a time value is out of range") from None
    raise InvalidInput(reason, "a value has no type")
