"""The form of the collections in Weaviate, and what it takes to compare and to find texts in them.

Texts that Weaviate compares are written as hexadecimal UTF-8, because it trims and folds what it
compares; texts to search are written as stems, because it has no stemming.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import Stemmer
from weaviate import WeaviateAsyncClient
from weaviate.classes.config import (
    Configure,
    DataType,
    Property,
    StopwordsPreset,
    Tokenization,
    VectorDistances,
)
from weaviate.classes.query import Filter as Where
from weaviate.collections import CollectionAsync
from weaviate.collections.classes.filters import _Filters
from weaviate.exceptions import UnexpectedStatusCodeError

from services.retrieval.stores import rows
from services.retrieval.stores.store import Condition, Filter, MetadataValue
from services.runtime.unicode import normalize

RECORDS = "TworoadsRecords"
DOCUMENTS = "TworoadsDocuments"
WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Placement:
    """Where the passages of a corpus are: in the collection of an embedder, each column of their
    metadata in a property, the first texts of all corpora in "s0", the next in "s1", and so on."""

    embedder: str
    properties: Mapping[str, str] = field(default_factory=dict)

    def with_columns(self, columns: Iterable[str]) -> "Placement":
        """Return the placement with a property for each of these columns, which are new."""
        properties = dict(self.properties)
        for column in columns:
            of_type = sum(known[0] == column[0] for known in properties)
            properties[column] = f"{column[0]}{of_type}"
        return Placement(self.embedder, properties)


def passages_collection(embedder: str) -> str:
    """Return the name of the collection of all passages whose vectors an embedder made."""
    return "TworoadsPassages" + hashlib.sha256(embedder.encode()).hexdigest()[:16]


async def ensure_collections(client: WeaviateAsyncClient) -> None:
    """Create the collections that do not depend on an embedder."""
    own = [_text("kind"), _text("tenant"), _text("name"), _text("record", indexed=False)]
    await _ensure(client, RECORDS, own, multi_tenant=False)
    own = [_text("key"), _text("document", indexed=False), _text("text", indexed=False)]
    await _ensure(client, DOCUMENTS, own)


async def ensure_passages(client: WeaviateAsyncClient, embedder: str) -> None:
    """Create the collection of the passages of an embedder."""
    searched = Property(
        name="stems",
        data_type=DataType.TEXT,
        tokenization=Tokenization.WORD,
        index_searchable=True,
        index_filterable=False,
    )
    index = Configure.VectorIndex.hnsw(distance_metric=VectorDistances.COSINE)
    await _ensure(
        client,
        passages_collection(embedder),
        [_text("document"), _text("version"), searched, _text("passage", indexed=False)],
        vector_config=Configure.Vectors.self_provided(vector_index_config=index),
    )


async def ensure_metadata(collection: CollectionAsync[Any, Any], names: Iterable[str]) -> None:
    """Add the properties for metadata that are missing."""
    config = await collection.config.get(simple=True)
    for name in set(names).difference(property.name for property in config.properties):
        await collection.config.add_property(_metadata(name))


def stems(texts: Sequence[str]) -> list[str]:
    """Return the stems of the words of each text, without accents."""
    stemmer = Stemmer.Stemmer("english")  # not safe to share between threads
    plain = [normalize("NFKD", text).lower() for text in texts]
    words = [WORD.findall("".join(c for c in t if not unicodedata.combining(c))) for t in plain]
    return [" ".join(stemmer.stemWords(one)) for one in words]


def comparable(value: str | datetime) -> str:
    """Return a text whose identity and order are the value's."""
    if isinstance(value, datetime):
        value = value.astimezone(UTC).isoformat(timespec="microseconds")
    return "x" + value.encode().hex()  # an empty text would not be indexed


def stored(value: MetadataValue) -> str | float | bool:
    """Return a value of metadata as its property holds it."""
    if isinstance(value, (str, datetime)):
        return comparable(value)
    return value if isinstance(value, bool) else float(value)


def where(filter: Filter, properties: Mapping[str, str]) -> _Filters | None:
    """Return the condition on the properties of passages that a filter stands for, None for all."""
    parts = [
        _where(condition, properties[rows.condition_column(condition)])
        for condition in filter.conditions
    ]
    if filter.document_ids:
        ids = [comparable(id) for id in filter.document_ids]
        parts.append(Where.by_property("document").contains_any(ids))
    return Where.all_of(parts) if parts else None


def other_than(property: str, value: Any) -> _Filters:
    """Return the condition that a property has another value. Weaviate's own "not equal" holds for
    objects without the property, too."""
    own = Where.by_property(property)
    if isinstance(value, bool):
        return own.equal(not value)
    return own.less_than(value) | own.greater_than(value)


def _where(condition: Condition, name: str) -> _Filters:
    value = stored(condition.value)
    own = Where.by_property(name)
    match condition.comparator:
        case "eq":
            return own.equal(value)
        case "ne":
            return other_than(name, value)
        case "lt":
            return own.less_than(value)
        case "le":
            return own.less_or_equal(value)
        case "gt":
            return own.greater_than(value)
        case "ge":
            return own.greater_or_equal(value)


def _text(name: str, indexed: bool = True) -> Property:
    return Property(
        name=name,
        data_type=DataType.TEXT,
        tokenization=Tokenization.FIELD,
        index_filterable=indexed,
        index_searchable=False,
    )


def _metadata(name: str) -> Property:
    if name[0] == "n":
        return Property(name=name, data_type=DataType.NUMBER, index_range_filters=True)
    return Property(name=name, data_type=DataType.BOOL) if name[0] == "b" else _text(name)


async def _ensure(
    client: WeaviateAsyncClient,
    name: str,
    properties: list[Property],
    multi_tenant: bool = True,
    **config: Any,
) -> None:
    if await client.collections.exists(name):
        return
    tenancy = Configure.multi_tenancy(enabled=multi_tenant, auto_tenant_creation=False)
    stop_words = Configure.inverted_index(stopwords_preset=StopwordsPreset.EN)
    try:
        await client.collections.create(
            name,
            properties=properties,
            multi_tenancy_config=tenancy,
            inverted_index_config=stop_words,
            **config,
        )
    except UnexpectedStatusCodeError:  # another process may have created it just now
        if not await client.collections.exists(name):
            raise
