"""What every store does. A test module of a store imports these tests and has a fixture `store`."""

import asyncio
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from services.retrieval.stores.store import (
    MOST_COLUMNS,
    Condition,
    CorpusKey,
    Document,
    Filter,
    MetadataValue,
    Passage,
    Store,
)
from services.runtime.errors import InvalidInput, NotFound

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOSTILE = "x' OR 'a'='a\\\"; --\u202e\x00\n \U0001f600 Straße e\u0301 "


@pytest.fixture
def key() -> CorpusKey:
    return CorpusKey(f"tenant-{uuid.uuid4()}", "handbook")


def make_document(id: str, version: str = "v1", **fields: Any) -> Document:
    values = dict(title=f"title of {id}", uri="file:///a", media_type="text/plain", metadata={})
    values |= dict(content_hash=f"hash-{version}", length=3, passages=1, updated=NOON) | fields
    return Document(id=id, version=version, **values)


def make_passage(text: str, document_id: str = "d", version: str = "v1", **fields: Any) -> Passage:
    values = dict(id=str(uuid.uuid4()), title="", uri="", start=0, end=len(text)) | fields
    return Passage(document_id=document_id, document_version=version, text=text, **values)


def vectors(*rows: Sequence[float]) -> NDArray[np.float32]:
    return np.array(rows, np.float32)


def spread(count: int) -> NDArray[np.float32]:
    """Vectors on a quarter circle, from (1, 0, 0) to (0, 1, 0)."""
    angles = np.linspace(0, np.pi / 2, count)
    return np.stack([np.cos(angles), np.sin(angles), 0 * angles], 1).astype(np.float32)


async def put(store: Store, key: CorpusKey, *passages: Passage) -> None:
    await store.create_corpus(key, "e" * 64, 3)
    await store.put_passages(key, passages, spread(len(passages)))


async def texts(store: Store, key: CorpusKey, filter: Filter) -> list[str]:
    """What both searches find, in the order of the texts."""
    by_vector = await store.search_vector(key, spread(1)[0], 100, filter)
    by_words = await store.search_text(key, "apple", 100, filter)
    found = sorted(hit.passage.text for hit in by_vector)
    assert found == sorted(hit.passage.text for hit in by_words)
    return found


async def test_records_are_kept_per_kind_tenant_and_name(store: Store, key: CorpusKey) -> None:
    other = CorpusKey(key.tenant + "2", key.name)
    await store.put_record("corpus", key, '{"a": 1}')
    await store.put_record("corpus", key, '{"a": "é\\u0000"}')
    await store.put_record("policy", key, "policy")
    await store.put_record("corpus", other, "other")
    assert await store.get_record("corpus", key) == '{"a": "é\\u0000"}'
    assert await store.get_record("policy", key) == "policy"
    assert await store.get_record("version", key) is None
    await store.delete_record("corpus", key)
    await store.delete_record("corpus", key)
    assert await store.get_record("corpus", key) is None
    assert await store.get_record("corpus", other) == "other"


async def test_records_are_listed_by_name_behind_a_cursor(store: Store, key: CorpusKey) -> None:
    for name in ("b", "a", "a.b", "Z", "a-b", "c"):
        await store.put_record("corpus", CorpusKey(key.tenant, name), f"value of {name}")
    await store.put_record("corpus", CorpusKey(key.tenant + "2", "aa"), "another tenant's")
    await store.put_record("policy", CorpusKey(key.tenant, "aa"), "another kind")
    first = await store.list_records("corpus", key.tenant, "", 4)
    assert [name for name, _ in first] == ["Z", "a", "a-b", "a.b"]
    assert first[1] == ("a", "value of a")
    rest = await store.list_records("corpus", key.tenant, "a.b", 4)
    assert [name for name, _ in rest] == ["b", "c"]


async def test_a_document_comes_back_exactly(store: Store, key: CorpusKey) -> None:
    metadata: dict[str, MetadataValue] = {"s": HOSTILE, "n": 0.1, "b": False, "t": NOON}
    document = make_document(HOSTILE, title=HOSTILE, uri=HOSTILE, metadata=metadata, length=7)
    await store.create_corpus(key, "e" * 64, 3)
    await store.put_documents(key, [(document, HOSTILE * 1000)])
    assert await store.get_document(key, HOSTILE) == (document, HOSTILE * 1000)
    assert await store.get_document(key, HOSTILE.strip()) is None
    assert await store.list_documents(key, "", 10) == [document]
    assert await store.get_versions(key, [HOSTILE, "none"]) == {HOSTILE: ("v1", "hash-v1")}


async def test_a_passage_comes_back_exactly(store: Store, key: CorpusKey) -> None:
    passage = make_passage(
        HOSTILE + "apple",
        document_id=HOSTILE,
        version=HOSTILE,
        title=HOSTILE,
        uri=HOSTILE,
        start=12,
        end=12 + len(HOSTILE) + 5,
        page=3,
        heading_path=("One", HOSTILE),
    )
    await put(store, key, passage)
    assert [hit.passage for hit in await store.search_text(key, "apple", 5)] == [passage]
    assert [hit.passage for hit in await store.search_vector(key, spread(1)[0], 5)] == [passage]


async def test_documents_are_listed_by_code_points_behind_a_cursor(
    store: Store, key: CorpusKey
) -> None:
    ids = ["b", "B", "ab", "a", "é", "\U0001f600", "\uffee", "a b", "10", "9", " a"]
    await store.create_corpus(key, "e" * 64, 3)
    await store.put_documents(key, [(make_document(id), "text") for id in ids])
    listed: list[str] = []
    while page := await store.list_documents(key, listed[-1] if listed else "", 4):
        listed += [document.id for document in page]
    assert listed == sorted(ids)
    assert await store.count_documents(key) == len(ids)


async def test_a_document_is_replaced_whole(store: Store, key: CorpusKey) -> None:
    await store.create_corpus(key, "e" * 64, 3)
    old, new = make_document("a", metadata={"k": 1.0}), make_document("a", "v2", title="new")
    await store.put_documents(key, [(old, "old text"), (make_document("b"), "b")])
    await store.put_documents(key, [(make_document("a", "v0"), "never seen"), (new, "new text")])
    assert await store.get_document(key, "a") == (new, "new text")
    assert await store.get_versions(key, ["a", "b"]) == {
        "a": ("v2", "hash-v2"),
        "b": ("v1", "hash-v1"),
    }
    assert await store.count_documents(key) == 2


async def test_deleting_counts_what_was_there(store: Store, key: CorpusKey) -> None:
    await store.create_corpus(key, "e" * 64, 3)
    await store.put_documents(key, [(make_document(id), id) for id in "abc"])
    assert await store.delete_documents(key, ["a", "c", "x"]) == 2
    assert await store.delete_documents(key, ["a"]) == 0
    assert await store.delete_documents(key, []) == 0
    assert [document.id for document in await store.list_documents(key, "", 9)] == ["b"]
    assert await store.get_document(key, "a") is None
    assert await store.get_versions(key, []) == {}


async def test_a_sweep_leaves_what_is_current_and_what_it_was_not_asked_about(
    store: Store, key: CorpusKey
) -> None:
    await put(
        store,
        key,
        *(
            make_passage(f"apple {document} {version}", document, version)
            for document in ("a", "b", "c", "d'")
            for version in ("v1", "v2")
        ),
    )
    await store.sweep(key, {"a": "v2", "b": "v1", "d'": "", "none": "v1"})
    expected = ["apple a v2", "apple b v1", "apple c v1", "apple c v2"]
    assert await texts(store, key, Filter()) == expected
    await store.sweep(key, {})
    assert await texts(store, key, Filter()) == expected


async def test_the_nearest_vectors_come_first_by_cosine(store: Store, key: CorpusKey) -> None:
    await store.create_corpus(key, "e" * 64, 3)
    passages = [make_passage(text) for text in ("far", "near", "same direction", "opposite")]
    await store.put_passages(key, passages, vectors([0, 1, 0], [1, 0.5, 0], [9, 0, 0], [-1, 0, 0]))
    hits = await store.search_vector(key, vectors([2, 0, 0])[0], 3)
    assert [hit.passage.text for hit in hits] == ["same direction", "near", "far"]
    assert [hit.score for hit in hits] == pytest.approx([1, 2 / 5**0.5, 0], abs=1e-3)


async def test_text_search_knows_stems_stop_words_case_titles_and_headings(
    store: Store, key: CorpusKey
) -> None:
    await put(
        store,
        key,
        make_passage("The company reimburses travelling by train.", title="Handbook"),
        make_passage("Travel insurance is paid by the company.", heading_path=("Insurances",)),
        make_passage("Dogs are welcome in the office.", title="Super_Bowl_50"),
        make_passage("Café hours are the same on every day."),
    )

    async def best(query: str) -> str:
        hits = await store.search_text(key, query, 10)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        return hits[0].passage.text[:4] if hits else ""

    assert await best("Is a TRAIN reimbursed?") == "The "
    assert await best("insured travels") == "Trav"
    assert await best("dog") == "Dogs"
    assert await best("the super bowl") == "Dogs"
    assert await best("cafe") == "Café"
    assert await best("the of is and") == ""
    assert await best("?!") == ""
    assert await best("zebra") == ""


@pytest.mark.parametrize("query", ['"', "text:apple^2 AND (", "-apple", "apple*", HOSTILE, "+"])
async def test_a_question_is_words_and_no_query_language(
    store: Store, key: CorpusKey, query: str
) -> None:
    await put(store, key, make_passage("one apple"), make_passage("two pears"))
    found = [hit.passage.text for hit in await store.search_text(key, query, 5)]
    assert found == (["one apple"] if "apple" in query else [])


ORDER = ("lt", "le", "eq", "ne", "gt", "ge")
LOW: tuple[MetadataValue, ...] = (1.5, NOON - timedelta(microseconds=1), "a'pple")
MIDDLE: tuple[MetadataValue, ...] = (2.0, NOON.astimezone(timezone(timedelta(hours=5))), "b ")
HIGH: tuple[MetadataValue, ...] = (1e12, datetime(9999, 1, 1, tzinfo=UTC), "b \x00")


@pytest.mark.parametrize("which", [0, 1, 2], ids=["number", "time", "text"])
async def test_conditions_compare_values_of_their_type(
    store: Store, key: CorpusKey, which: int
) -> None:
    values = {"low": LOW[which], "middle": MIDDLE[which], "high": HIGH[which]}
    await put(
        store,
        key,
        *(make_passage(f"apple {name}", metadata={"k": v}) for name, v in values.items()),
        make_passage("apple without", metadata={"other": values["middle"]}),
        make_passage("apple of another type", metadata={"k": True}),
    )
    found = {
        comparator: await texts(
            store, key, Filter(conditions=(Condition("k", comparator, values["middle"]),))
        )
        for comparator in ORDER
    }
    low, middle, high = "apple low", "apple middle", "apple high"
    assert found == {
        "lt": [low],
        "le": [low, middle],
        "eq": [middle],
        "ne": [high, low],
        "gt": [high],
        "ge": [high, middle],
    }


async def test_conditions_compare_truth_values(store: Store, key: CorpusKey) -> None:
    metadatas: list[dict[str, MetadataValue]] = [{"k": True}, {"k": False}, {"k": "true"}, {}]
    await put(store, key, *(make_passage(f"apple {m}", metadata=m) for m in metadatas))
    for comparator, value, expected in (
        ("eq", True, True),
        ("eq", False, False),
        ("ne", True, False),
        ("ne", False, True),
    ):
        found = await texts(store, key, Filter(conditions=(Condition("k", comparator, value),)))
        assert found == [f"apple {{'k': {expected}}}"]


async def test_a_filter_holds_where_all_of_it_holds(store: Store, key: CorpusKey) -> None:
    await put(
        store,
        key,
        make_passage("apple 1", "a", metadata={"n": 1, "s": HOSTILE}),
        make_passage("apple 2", "a", metadata={"n": 2, "s": HOSTILE}),
        make_passage("apple 3", "b'", metadata={"n": 2, "s": HOSTILE}),
        make_passage("apple 4", "c", metadata={"n": 2, "s": "x"}),
    )
    hostile, two = Condition("s", "eq", HOSTILE), Condition("n", "eq", 2)
    for filter, expected in (
        (Filter(("a",)), ["apple 1", "apple 2"]),
        (Filter(("b'", "c", "none")), ["apple 3", "apple 4"]),
        (Filter(("none",)), []),
        (Filter((), (hostile, two)), ["apple 2", "apple 3"]),
        (Filter(("a", "c"), (hostile, two)), ["apple 2"]),
        (Filter((), (Condition("nowhere", "ne", "x"),)), []),
        (Filter((), (Condition("n", "eq", "2"),)), []),
    ):
        assert await texts(store, key, filter) == expected


async def test_a_corpus_has_so_many_columns_of_metadata_and_another_as_many(
    store: Store, key: CorpusKey
) -> None:
    other = CorpusKey(key.tenant, "other")
    for one in (key, other):
        await store.create_corpus(one, "e" * 64, 3)
    most = {f"{'snbt'[number % 4]}_key{number}" for number in range(MOST_COLUMNS)}
    await store.add_columns(key, set(list(most)[:100]))
    with pytest.raises(InvalidInput, match="'the_last'") as caught:
        await store.add_columns(key, most | {"t_the_last"})
    assert caught.value.reason == "METADATA_KEYS_FULL"
    await store.add_columns(key, most)
    full = make_passage("apple", metadata={"key5": 5.0, "key6": True})
    await store.put_passages(key, [full], spread(1))
    with pytest.raises(InvalidInput):
        await store.put_passages(key, [make_passage("pear", metadata={"key5": "5"})], spread(1))
    await store.put_passages(other, [make_passage("apple", metadata={"key5": "5"})], spread(1))
    five = Filter(conditions=(Condition("key5", "eq", 5.0),))
    assert (await texts(store, key, five), await texts(store, other, five)) == (["apple"], [])
    assert await texts(store, key, Filter()) == ["apple"]


async def test_each_corpus_has_keys_of_its_own(store: Store, key: CorpusKey) -> None:
    other = CorpusKey(key.tenant, "other")
    await put(store, key, make_passage("apple", metadata={"author": "x", "year": 1}))
    await put(store, other, make_passage("apple", metadata={"status": "x", "author": "y"}))
    for name, value, own, others in (
        ("author", "x", ["apple"], []),
        ("author", "y", [], ["apple"]),
        ("status", "x", [], ["apple"]),
        ("year", 1, ["apple"], []),
    ):
        condition = Filter(conditions=(Condition(name, "eq", value),))
        assert await texts(store, key, condition) == own
        assert await texts(store, other, condition) == others


async def test_tenants_and_corpora_never_see_each_other(store: Store, key: CorpusKey) -> None:
    keys = [
        key,
        CorpusKey(key.tenant + "/x", key.name),
        CorpusKey(key.tenant, key.name + "2"),
        CorpusKey(key.tenant + key.name, ""),
        CorpusKey(key.tenant + HOSTILE, key.name),
        CorpusKey(key.tenant.upper(), key.name),
    ]
    for number, one in enumerate(keys):
        await put(store, one, make_passage(f"apple of {number}"))
        await store.put_documents(one, [(make_document("same id"), f"text of {number}")])
    await store.sweep(keys[0], {"d": ""})
    await store.delete_documents(keys[0], ["same id"])
    await store.drop_corpus(keys[1])
    for number, one in enumerate(keys[2:], 2):
        assert await texts(store, one, Filter()) == [f"apple of {number}"]
        found = await store.get_document(one, "same id")
        assert found is not None and found[1] == f"text of {number}"
        assert await store.count_documents(one) == 1
    for gone in keys[:2]:
        assert await texts(store, gone, Filter()) == []
        assert await store.count_documents(gone) == 0


async def test_an_empty_and_an_unknown_corpus_have_nothing(store: Store, key: CorpusKey) -> None:
    empty = CorpusKey(key.tenant, "empty")
    await store.create_corpus(empty, "e" * 64, 3)
    for one in (empty, key):
        assert await texts(store, one, Filter()) == []
        assert await texts(store, one, Filter(("a",), (Condition("k", "eq", "x"),))) == []
        assert await store.get_document(one, "a") is None
        assert await store.get_versions(one, ["a"]) == {}
        assert await store.list_documents(one, "", 5) == []
        assert await store.count_documents(one) == 0
        assert await store.delete_documents(one, ["a"]) == 0
        await store.sweep(one, {"a": "v1"})
    await store.drop_corpus(key)


async def test_nothing_can_be_put_into_an_unknown_corpus(store: Store, key: CorpusKey) -> None:
    with pytest.raises(NotFound, match="corpus") as caught:
        await store.put_passages(key, [make_passage("apple")], spread(1))
    assert caught.value.reason == "CORPUS_NOT_FOUND"
    with pytest.raises(NotFound):
        await store.put_documents(key, [(make_document("a"), "a")])


async def test_a_dropped_corpus_comes_back_empty_with_another_dimension(
    store: Store, key: CorpusKey
) -> None:
    await put(store, key, make_passage("apple"))
    await store.put_documents(key, [(make_document("a"), "a")])
    await store.drop_corpus(key)
    await store.drop_corpus(key)
    assert await texts(store, key, Filter()) == []
    await store.create_corpus(key, "f" * 64, 2)
    assert await store.count_documents(key) == 0
    await store.put_passages(key, [make_passage("apple pie")], vectors([0, 1]))
    hits = await store.search_vector(key, vectors([0, 2])[0], 5)
    assert [hit.passage.text for hit in hits] == ["apple pie"]


async def test_creating_a_corpus_again_changes_nothing(store: Store, key: CorpusKey) -> None:
    await put(store, key, make_passage("apple"))
    await store.put_documents(key, [(make_document("a"), "a")])
    await store.create_corpus(key, "f" * 64, 2)
    assert await texts(store, key, Filter()) == ["apple"]
    assert await store.count_documents(key) == 1
    await store.put_passages(key, [make_passage("second apple")], spread(1))
    assert await texts(store, key, Filter()) == ["apple", "second apple"]


async def test_a_thousand_passages_are_put_at_once_and_found_at_once(
    store: Store, key: CorpusKey
) -> None:
    passages = [make_passage(f"apple number{i} " + "filler " * 50) for i in range(1000)]
    await put(store, key, *passages)
    assert len(await store.search_vector(key, spread(1)[0], 1000)) == 1000
    assert len(await store.search_text(key, "apple", 1000)) == 1000
    for number in (0, 500, 999):
        by_words = await store.search_text(key, f"number{number}", 10)
        assert [hit.passage for hit in by_words] == [passages[number]]
        nearest = await store.search_vector(key, spread(1000)[number], 1)
        assert nearest[0].passage == passages[number]


async def test_writers_and_readers_of_one_corpus_do_not_disturb_each_other(
    store: Store, key: CorpusKey
) -> None:
    await store.create_corpus(key, "e" * 64, 3)

    async def write(name: str) -> None:
        for round in range(8):
            id = f"{name}{round}"
            metadata: dict[str, MetadataValue] = {f"key_{id}": round, "writer": name}
            passages = [make_passage(f"apple {id}", id, metadata=metadata) for _ in range(5)]
            await store.put_passages(key, passages, spread(5))
            await store.put_documents(key, [(make_document(id), id), (make_document("both"), id)])
            await store.sweep(key, {id: "v1", "both": ""})
            await store.put_record("version", key, id)

    async def read() -> None:
        for _ in range(20):
            await texts_of_any(store, key)

    await asyncio.gather(write("a"), write("b"), read())
    everything = [f"apple {name}{round}" for name in "ab" for round in range(8)]
    assert await texts(store, key, Filter()) == sorted(everything * 5)
    mine = Filter(conditions=(Condition("writer", "eq", "a"),))
    assert len(await texts(store, key, mine)) == 40
    assert await store.count_documents(key) == 17
    assert await store.get_record("version", key) in ("a7", "b7")


async def texts_of_any(store: Store, key: CorpusKey) -> None:
    """Search while others write: whatever is there is found without an error."""
    await store.search_vector(key, spread(1)[0], 20)
    await store.search_text(key, "apple", 20)
    await store.list_documents(key, "", 20)
