"""What retrieval needs of a store. `lancedb.py` and `weaviate.py` are the two that there are.

A store keeps small records (corpora, policies), documents with their text, and passages with their
vectors. It ranks passages by vector and by words; fusing, versions and ids are retrieval's
business.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

MetadataValue = str | float | bool | datetime
Comparator = Literal["eq", "ne", "lt", "le", "gt", "ge"]
Kind = Literal["corpus", "policy", "version"]

# Of a corpus. In Weaviate every corpus bears the properties that any has.
MOST_COLUMNS = 128


@dataclass(frozen=True)
class CorpusKey:
    """Names a corpus: whose it is, and its name."""

    tenant: str
    name: str

    @property
    def digest(self) -> str:
        """40 hexadecimal digits that stand for both, whatever characters they are made of."""
        return hashlib.sha256(json.dumps([self.tenant, self.name]).encode()).hexdigest()[:40]


@dataclass(frozen=True)
class Document:
    """A document without its text. `version` names the passages that are current."""

    id: str
    title: str
    uri: str
    media_type: str
    metadata: Mapping[str, MetadataValue]
    content_hash: str
    version: str
    length: int
    passages: int
    updated: datetime


@dataclass(frozen=True)
class Passage:
    """A chunk of one version of a document; `text` is document.text[start:end]."""

    id: str
    document_id: str
    document_version: str
    title: str
    uri: str
    start: int
    end: int
    text: str
    page: int = 0
    heading_path: tuple[str, ...] = ()
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)


@dataclass(frozen=True)
class Hit:
    """A passage that a search found. Greater scores are better, within one search.

    The passage comes back without its metadata.
    """

    passage: Passage
    score: float


@dataclass(frozen=True)
class Condition:
    """Holds for passages whose metadata has `key` with a value of this type that compares so."""

    key: str
    comparator: Comparator
    value: MetadataValue


@dataclass(frozen=True)
class Filter:
    """Restricts a search: one of these documents (none given: all), and every condition."""

    document_ids: tuple[str, ...] = ()
    conditions: tuple[Condition, ...] = ()


NO_FILTER = Filter()


class Store(Protocol):
    """The seam between retrieval and a database. Every method may raise Unavailable
    (STORE_UNAVAILABLE), and those that write Overloaded (STORE_FULL). A name or key that does not
    exist gives None, nothing or zero; only `add_columns`, `put_passages` and `put_documents`, which
    would lose what they were given, raise NotFound (CORPUS_NOT_FOUND)."""

    async def put_record(self, kind: Kind, key: CorpusKey, value: str) -> None:
        """Create or replace a small record, as JSON text."""

    async def get_record(self, kind: Kind, key: CorpusKey) -> str | None:
        """Return a record."""

    async def list_records(
        self, kind: Kind, tenant: str, after: str, limit: int
    ) -> list[tuple[str, str]]:
        """Return (name, value) of the tenant's records, by name in code point order, from behind
        `after`."""

    async def delete_record(self, kind: Kind, key: CorpusKey) -> None:
        """Delete a record."""

    async def create_corpus(self, key: CorpusKey, embedder: str, dimension: int) -> None:
        """Make room for documents whose vectors have `dimension` components and come from the
        embedder of this hash. Does nothing if there is room already."""

    async def drop_corpus(self, key: CorpusKey) -> None:
        """Delete all documents and passages of a corpus."""

    async def add_columns(self, key: CorpusKey, columns: Set[str]) -> None:
        """Make room for metadata (`rows.columns`), which stays when documents go. Raises
        InvalidInput (METADATA_KEYS_FULL), and then adds nothing."""

    async def put_passages(
        self, key: CorpusKey, passages: Sequence[Passage], vectors: NDArray[np.float32]
    ) -> None:
        """Add passages with their vectors, shape (passages, dimension), and the columns that they
        need. Ids are new."""

    async def put_documents(
        self, key: CorpusKey, documents: Sequence[tuple[Document, str]]
    ) -> None:
        """Create or replace documents with their texts, all at once as far as the store can: this
        commits their passages."""

    async def get_versions(self, key: CorpusKey, ids: Sequence[str]) -> dict[str, tuple[str, str]]:
        """Return (version, content hash) of each of these documents that exists."""

    async def get_document(self, key: CorpusKey, id: str) -> tuple[Document, str] | None:
        """Return a document and its text."""

    async def list_documents(self, key: CorpusKey, after: str, limit: int) -> list[Document]:
        """Return documents by id in code point order, from behind `after`."""

    async def count_documents(self, key: CorpusKey) -> int:
        """Return how many documents there are."""

    async def delete_documents(self, key: CorpusKey, ids: Sequence[str]) -> int:
        """Delete documents; return how many of them existed. Their passages stay until a sweep."""

    async def sweep(self, key: CorpusKey, current: Mapping[str, str]) -> None:
        """Delete the passages of these documents (the keys) whose version is not the current one
        (the value; empty means that none is current)."""

    async def search_vector(
        self, key: CorpusKey, vector: NDArray[np.float32], limit: int, filter: Filter = NO_FILTER
    ) -> list[Hit]:
        """Return the passages with the nearest vectors by cosine similarity, best first."""

    async def search_text(
        self, key: CorpusKey, text: str, limit: int, filter: Filter = NO_FILTER
    ) -> list[Hit]:
        """Return the passages that fit the words best (BM25, English stemming), best first."""
