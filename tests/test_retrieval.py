"""RetrievalService over LanceDB, with a fake embedding service."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from datetime import UTC

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from tworoads.v1 import retrieval_pb2 as pb

from services.retrieval.stores.store import MOST_COLUMNS, CorpusKey
from services.runtime.call import TENANT
from services.runtime.errors import Overloaded, Stopping, error_info
from tests.small_stack import MOST_CORPORA, SmallStack, small_stack


@pytest.fixture
async def stack(tmp_path) -> AsyncIterator[SmallStack]:
    async with small_stack(tmp_path) as running:
        await running.retrieval.CreateCorpus(pb.CreateCorpusRequest(name="c"))
        yield running


def start(corpus: str = "c") -> pb.PutDocumentsRequest:
    return pb.PutDocumentsRequest(start=pb.PutDocumentsStart(corpus=corpus))


END = pb.PutDocumentsRequest(end=pb.PutDocumentsEnd())


def document(id: str, content: bytes | str, media_type: str = "text/plain", **fields):
    header = pb.PutDocumentsDocument(id=id, media_type=media_type, **fields)
    content = content.encode() if isinstance(content, str) else content
    yield pb.PutDocumentsRequest(document=header)
    for begin in range(0, len(content), 1000):
        yield pb.PutDocumentsRequest(chunk=content[begin : begin + 1000])


async def put(stack: SmallStack, *documents: Iterable, corpus: str = "c") -> dict:
    parts = [start(corpus), *(part for parts in documents for part in parts), END]
    results = {}
    async for response in stack.retrieval.PutDocuments(iter(parts)):
        if response.HasField("result"):
            results[response.result.id] = response.result
    return results


async def search(stack: SmallStack, query: str, **fields) -> list[str]:
    request = pb.SearchRequest(corpus="c", query=query, **fields)
    response = await stack.retrieval.Search(request)
    return [passage.document_id for passage in response.passages]


def reason_of(error: pytest.ExceptionInfo) -> tuple[grpc.StatusCode, str]:
    info = error_info(error.value)
    return error.value.code(), info.reason if info else ""


async def test_a_document_is_found_with_its_exact_offsets(stack):
    text = "Owls — 🦉 — hunt by night.\n\nLarks sing at dawn, in the café garden."
    results = await put(stack, document("birds", text, title="Birds", uri="file:///birds.txt"))
    assert results["birds"].outcome == pb.DOCUMENT_OUTCOME_INDEXED
    response = await stack.retrieval.Search(pb.SearchRequest(corpus="c", query="larks dawn"))
    passage = response.passages[0]
    read = await stack.retrieval.GetDocument(pb.GetDocumentRequest(corpus="c", id="birds"))
    assert read.text[passage.start : passage.end] == passage.text
    assert (passage.title, passage.uri) == ("Birds", "file:///birds.txt")
    assert read.document.length == len(read.text) == read.end
    part = await stack.retrieval.GetDocument(
        pb.GetDocumentRequest(corpus="c", id="birds", start=5, end=8)
    )
    assert part.text == read.text[5:8]


async def test_the_same_content_again_is_unchanged_and_embeds_nothing(stack):
    await put(stack, document("a", "owls hunt"), document("b", "larks sing"))
    embedded = len(stack.embedding.embedded)
    results = await put(stack, document("a", "owls hunt"), document("b", "larks sing"))
    assert {r.outcome for r in results.values()} == {pb.DOCUMENT_OUTCOME_UNCHANGED}
    assert len(stack.embedding.embedded) == embedded


async def test_changed_metadata_or_title_alone_is_indexed_again(stack):
    await put(stack, document("a", "owls hunt"))
    again = await put(stack, document("a", "owls hunt", title="Owls"))
    assert again["a"].outcome == pb.DOCUMENT_OUTCOME_INDEXED


async def test_a_time_in_place_of_a_text_of_the_same_letters_is_indexed_again(stack):
    time = Timestamp(seconds=0)
    text = time.ToDatetime(tzinfo=UTC).isoformat()
    for value in (pb.MetadataValue(string_value=text), pb.MetadataValue(time_value=time)):
        results = await put(stack, document("a", "owls", metadata={"k": value}))
        assert results["a"].outcome == pb.DOCUMENT_OUTCOME_INDEXED
    same = pb.Condition(key="k", value=value)
    assert await search(stack, "owls", filter=pb.Filter(conditions=[same])) == ["a"]


async def test_headers_are_small_whatever_is_sent(stack):
    long = "x" * 1_000_000
    results = await put(
        stack,
        document(long, "owls"),
        document("a", "owls", media_type=long),
        document("b", "owls", title=long),
    )
    assert results[long[:512]].reason == "DOCUMENT_ID_INVALID"
    assert results["a"].reason == "MEDIA_TYPE_UNKNOWN"
    kept = await stack.retrieval.GetDocument(pb.GetDocumentRequest(corpus="c", id="b"))
    assert len(kept.document.title) == 200


async def test_a_page_of_documents_fits_into_a_message(stack, monkeypatch):
    monkeypatch.setattr("services.retrieval.service.MOST_PAGE_BYTES", 5000)
    value = pb.MetadataValue(string_value="語" * 1000)
    await put(stack, *(document(f"d{n}", "owls", metadata={"k": value}) for n in range(5)))
    pages, token = [], ""
    while token or not pages:
        request = pb.ListDocumentsRequest(corpus="c", page_token=token)
        page = await stack.retrieval.ListDocuments(request)
        pages.append([one.id for one in page.documents])
        token = page.next_page_token
    assert pages == [["d0", "d1"], ["d2", "d3"], ["d4"]]


async def test_a_changed_document_shows_only_its_new_passages(stack):
    await put(stack, document("a", "owls hunt mice at night"))
    await put(stack, document("a", "owls sleep in barns"))
    response = await stack.retrieval.Search(pb.SearchRequest(corpus="c", query="owls hunt mice"))
    assert [passage.text for passage in response.passages] == ["owls sleep in barns"]


async def test_the_later_of_two_versions_in_one_stream_wins(stack):
    documents = [document("a", f"version {number} of the text") for number in range(20)]
    await put(stack, *documents)
    read = await stack.retrieval.GetDocument(pb.GetDocumentRequest(corpus="c", id="a"))
    assert read.text == "version 19 of the text"
    response = await stack.retrieval.Search(pb.SearchRequest(corpus="c", query="version text"))
    assert [passage.text for passage in response.passages] == ["version 19 of the text"]


async def test_an_earlier_version_sent_again_in_one_stream_replaces_the_later_one(stack):
    await put(stack, document("a", "old text"))
    others = [document(f"o{number}", f"other {number}") for number in range(100)]
    await put(stack, document("a", "new text"), *others, document("a", "old text"))
    read = await stack.retrieval.GetDocument(pb.GetDocumentRequest(corpus="c", id="a"))
    assert read.text == "old text"


async def test_two_streams_with_versions_of_one_document_leave_it_whole(stack):
    for number in range(10):
        old, new = f"text {number}", f"text {number + 1}"
        await asyncio.gather(
            put(stack, document("a", old)),
            put(stack, document("a", new)),
            put(stack, document("a", old)),
        )
        read = await stack.retrieval.GetDocument(pb.GetDocumentRequest(corpus="c", id="a"))
        response = await stack.retrieval.Search(pb.SearchRequest(corpus="c", query="text"))
        assert [passage.text for passage in response.passages] == [read.text]


async def test_long_headings_leave_room_for_the_passage(stack):
    await put(stack, document("a", "owls hunt", title="word " * 200))
    words = stack.embedding.embedded[-1].split()
    assert words[-2:] == ["owls", "hunt"] and len(words) <= 256


async def test_deleted_documents_are_gone_from_search_at_once(stack):
    await put(stack, document("a", "owls hunt"), document("b", "owls sleep"))
    request = pb.DeleteDocumentsRequest(corpus="c", ids=["a", "unknown"])
    response = await stack.retrieval.DeleteDocuments(request)
    assert response.deleted == 1
    assert await search(stack, "owls hunt") == ["b"]


async def test_a_corpus_version_changes_with_every_change_and_only_then(stack):
    async def version() -> str:
        response = await stack.retrieval.GetCorpus(pb.GetCorpusRequest(name="c"))
        return response.corpus.version

    seen = [await version()]
    await put(stack, document("a", "owls"))
    seen.append(await version())
    await put(stack, document("a", "owls"))
    assert await version() == seen[-1]
    await stack.retrieval.DeleteDocuments(pb.DeleteDocumentsRequest(corpus="c", ids=["a"]))
    seen.append(await version())
    assert len(set(seen)) == 3


async def test_a_new_corpus_of_an_old_name_is_empty(stack):
    await put(stack, document("a", "owls"))
    await stack.retrieval.DeleteCorpus(pb.DeleteCorpusRequest(name="c"))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await search(stack, "owls")
    assert reason_of(error) == (grpc.StatusCode.NOT_FOUND, "CORPUS_NOT_FOUND")
    await stack.retrieval.CreateCorpus(pb.CreateCorpusRequest(name="c"))
    assert await search(stack, "owls") == []


async def test_a_new_corpus_has_no_policy_of_an_old_one_that_was_deleted_half(stack):
    await stack.retrieval.SetPolicy(pb.SetPolicyRequest(corpus="c", path=pb.PATH_RAG))
    # A service that is killed while it deletes leaves the policy.
    await stack.store.delete_record("corpus", CorpusKey("default", "c"))
    await stack.retrieval.CreateCorpus(pb.CreateCorpusRequest(name="c"))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stack.retrieval.GetPolicy(pb.GetPolicyRequest(corpus="c"))
    assert reason_of(error) == (grpc.StatusCode.NOT_FOUND, "POLICY_NOT_FOUND")


async def test_lists_come_in_pages(stack):
    await put(stack, *(document(f"d{number}", f"text {number}") for number in range(5)))
    seen, token = [], ""
    while True:
        request = pb.ListDocumentsRequest(corpus="c", page_size=2, page_token=token)
        response = await stack.retrieval.ListDocuments(request)
        seen.append([document.id for document in response.documents])
        token = response.next_page_token
        if not token:
            break
    assert seen == [["d0", "d1"], ["d2", "d3"], ["d4"]]


async def test_filters_restrict_by_document_and_metadata(stack):
    await put(
        stack,
        document("old", "owls", metadata={"year": pb.MetadataValue(number_value=1999)}),
        document("new", "owls", metadata={"year": pb.MetadataValue(number_value=2020)}),
    )
    late = pb.Condition(
        key="year",
        comparator=pb.COMPARATOR_GREATER,
        value=pb.MetadataValue(number_value=2000),
    )
    assert await search(stack, "owls", filter=pb.Filter(conditions=[late])) == ["new"]
    assert await search(stack, "owls", filter=pb.Filter(document_ids=["old"])) == ["old"]


async def test_a_document_with_one_metadata_key_too_many_is_refused_alone(stack):
    def with_keys(id: str, names: Iterable[str]):
        value = pb.MetadataValue(bool_value=True)
        return document(id, "owls", metadata=dict.fromkeys(names, value))

    keys = [f"k{number}" for number in range(MOST_COLUMNS)]
    documents = [with_keys(f"d{at}", keys[at : at + 32]) for at in range(0, len(keys), 32)]
    await put(stack, *documents)
    results = await put(stack, with_keys("more", ["new", "k1"]), with_keys("same", ["k1", "k99"]))
    assert results["more"].reason == "METADATA_KEYS_FULL"
    assert results["same"].outcome == pb.DOCUMENT_OUTCOME_INDEXED
    assert len(await search(stack, "owls", limit=9)) == len(documents) + 1


async def test_many_documents_with_some_broken_lose_none_of_the_others(stack):
    broken = {
        "empty": (b"  \n ", "text/plain", "EMPTY_DOCUMENT"),
        "nuls": (b"a\0b\0c", "text/plain", "NOT_TEXT"),
        "unknown": (b"x", "application/x-unknown", "MEDIA_TYPE_UNKNOWN"),
        "not-pdf": (b"plain words", "application/pdf", "MEDIA_TYPE_MISMATCH"),
        "large": (b"x" * (4 * 1024 * 1024 + 1), "text/plain", "TOO_LARGE"),
    }
    good = [document(f"g{number}", f"note {number} about owls") for number in range(200)]
    bad = [document(id, content, kind) for id, (content, kind, _) in broken.items()]
    results = await put(stack, *good[:100], *bad, *good[100:], document("bad\x01id", "x"))
    failed = {id: r.reason for id, r in results.items() if r.outcome == pb.DOCUMENT_OUTCOME_FAILED}
    assert failed == {
        **{id: reason for id, (_, _, reason) in broken.items()},
        "bad\x01id": "DOCUMENT_ID_INVALID",
    }
    assert len(results) == 206
    response = await stack.retrieval.GetCorpus(pb.GetCorpusRequest(name="c"))
    assert response.corpus.documents == 200


async def test_progress_comes_first_and_counts_to_the_end(stack):
    parts = [start(), *document("a", "owls"), *document("b", "larks"), END]
    events = [event async for event in stack.retrieval.PutDocuments(iter(parts))]
    assert events[0].WhichOneof("event") == "progress"
    last = events[-1].progress
    assert (last.received, last.finished, last.passages) == (2, 2, 2)


async def test_a_stream_that_breaks_off_loses_only_what_had_no_result(stack):
    async def parts() -> AsyncIterator[pb.PutDocumentsRequest]:
        yield start()
        for part in document("a", "owls"):
            yield part
        yield pb.PutDocumentsRequest(document=pb.PutDocumentsDocument(id="b"))
        await asyncio.Event().wait()

    call = stack.retrieval.PutDocuments(parts())
    async for response in call:
        if response.HasField("result"):
            break
    call.cancel()
    assert await search(stack, "owls") == ["a"]
    results = await put(stack, document("a", "owls"), document("b", "larks"))
    assert results["a"].outcome == pb.DOCUMENT_OUTCOME_UNCHANGED
    assert results["b"].outcome == pb.DOCUMENT_OUTCOME_INDEXED


@pytest.mark.parametrize(
    ("parts", "code", "reason"),
    [
        ([], grpc.StatusCode.INVALID_ARGUMENT, "START_MISSING"),
        ([pb.PutDocumentsRequest(chunk=b"x")], grpc.StatusCode.INVALID_ARGUMENT, "START_MISSING"),
        (
            [start(), pb.PutDocumentsRequest(chunk=b"x")],
            grpc.StatusCode.INVALID_ARGUMENT,
            "PART_OUT_OF_ORDER",
        ),
        ([start(), start()], grpc.StatusCode.INVALID_ARGUMENT, "PART_OUT_OF_ORDER"),
        (
            [start(), END, *document("a", "x")],
            grpc.StatusCode.INVALID_ARGUMENT,
            "PART_OUT_OF_ORDER",
        ),
        ([start(), *document("a", "x")], grpc.StatusCode.INVALID_ARGUMENT, "END_MISSING"),
        (
            [
                start(),
                pb.PutDocumentsRequest(document=pb.PutDocumentsDocument(id="a")),
                pb.PutDocumentsRequest(chunk=b"x" * (1024 * 1024 + 1)),
            ],
            grpc.StatusCode.INVALID_ARGUMENT,
            "CHUNK_TOO_LARGE",
        ),
        ([start("none")], grpc.StatusCode.NOT_FOUND, "CORPUS_NOT_FOUND"),
    ],
)
async def test_an_ingest_stream_out_of_order_is_refused(stack, parts, code, reason):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in stack.retrieval.PutDocuments(iter(parts)):
            pass
    assert reason_of(error) == (code, reason)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"query": " \n"}, "QUERY_EMPTY"),
        ({"query": "x" * 8193}, "QUERY_TOO_LONG"),
        ({"query": "x", "limit": 101}, "LIMIT_OUT_OF_RANGE"),
        ({"query": "x", "mode": 99}, "SEARCH_MODE_UNKNOWN"),
        (
            {"query": "x", "filter": pb.Filter(conditions=[pb.Condition(key="a b")])},
            "FILTER_INVALID",
        ),
        (
            {"query": "x", "filter": pb.Filter(conditions=[pb.Condition(key="a")])},
            "FILTER_INVALID",
        ),
    ],
)
async def test_a_bad_search_is_refused(stack, fields, reason):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await search(stack, **fields)
    assert reason_of(error) == (grpc.StatusCode.INVALID_ARGUMENT, reason)


@pytest.mark.parametrize("name", ["", "A", "../x", "a/b", "x" * 65, "é", "a b"])
async def test_a_bad_corpus_name_is_refused(stack, name):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stack.retrieval.CreateCorpus(pb.CreateCorpusRequest(name=name))
    assert reason_of(error) == (grpc.StatusCode.INVALID_ARGUMENT, "CORPUS_NAME_INVALID")


async def test_creating_a_corpus_twice_fails_unless_that_is_allowed(stack):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stack.retrieval.CreateCorpus(pb.CreateCorpusRequest(name="c"))
    assert reason_of(error) == (grpc.StatusCode.ALREADY_EXISTS, "CORPUS_EXISTS")
    request = pb.CreateCorpusRequest(name="c", allow_existing=True)
    response = await stack.retrieval.CreateCorpus(request)
    assert response.corpus.name == "c"


async def test_a_tenant_has_so_many_corpora_and_another_as_many(stack):
    async def create(name: str, tenant: str = "default") -> None:
        request = pb.CreateCorpusRequest(name=name)
        await stack.retrieval.CreateCorpus(request, metadata=((TENANT, tenant),))

    for number in range(1, MOST_CORPORA):
        await create(f"c{number}")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await create("more")
    assert reason_of(error) == (grpc.StatusCode.FAILED_PRECONDITION, "TOO_MANY_CORPORA")
    await create("more", tenant="another")
    again = pb.CreateCorpusRequest(name="c", allow_existing=True)
    assert (await stack.retrieval.CreateCorpus(again)).corpus.name == "c"
    await stack.retrieval.DeleteCorpus(pb.DeleteCorpusRequest(name="c1"))
    await create("more")


async def test_another_embedder_is_refused_never_mixed(stack):
    await put(stack, document("a", "owls"))
    stack.embedding.hash = "fake-2"
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await search(stack, "owls")
    assert reason_of(error) == (grpc.StatusCode.FAILED_PRECONDITION, "EMBEDDER_MISMATCH")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await put(stack, document("b", "larks"))
    assert reason_of(error) == (grpc.StatusCode.FAILED_PRECONDITION, "EMBEDDER_MISMATCH")
    assert await search(stack, "owls", mode=pb.SEARCH_MODE_TEXT) == ["a"]


async def test_a_missing_embedder_is_an_error_unless_the_caller_allows_less(stack):
    await put(stack, document("a", "owls"))
    stack.embedding.error = Stopping("STOPPING", "gone")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await search(stack, "owls")
    assert reason_of(error) == (grpc.StatusCode.UNAVAILABLE, "EMBEDDING_UNAVAILABLE")
    response = await stack.retrieval.Search(
        pb.SearchRequest(corpus="c", query="owls", allow_degraded=True)
    )
    assert [passage.document_id for passage in response.passages] == ["a"]
    assert list(response.degraded) == ["VECTOR_SEARCH"]


async def test_an_ingest_waits_while_the_embedder_is_full(stack, monkeypatch):
    monkeypatch.setattr(Overloaded, "retry_after", 0.01)
    await put(stack, document("first", "larks"))
    stack.embedding.error = Overloaded("QUEUE_FULL", "full")
    ingest = asyncio.create_task(put(stack, document("a", "owls")))
    async with asyncio.timeout(10):
        while not stack.embedding.refused:
            await asyncio.sleep(0.01)
    stack.embedding.error = None
    assert (await ingest)["a"].outcome == pb.DOCUMENT_OUTCOME_INDEXED


async def test_policies_are_set_read_listed_and_guarded_by_their_etag(stack):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stack.retrieval.GetPolicy(pb.GetPolicyRequest(corpus="c"))
    assert reason_of(error) == (grpc.StatusCode.NOT_FOUND, "POLICY_NOT_FOUND")
    request = pb.SetPolicyRequest(corpus="c", path=pb.PATH_HYBRID, adapter="a@1", comparison="k1")
    first = (await stack.retrieval.SetPolicy(request)).policy
    assert (first.path, first.adapter, first.comparison) == (pb.PATH_HYBRID, "a@1", "k1")
    request = pb.SetPolicyRequest(corpus="c", path=pb.PATH_RAG, etag=first.etag)
    second = (await stack.retrieval.SetPolicy(request)).policy
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stack.retrieval.SetPolicy(request)
    assert reason_of(error) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    response = await stack.retrieval.ListPolicies(pb.ListPoliciesRequest())
    assert [policy.etag for policy in response.policies] == [second.etag]


@pytest.mark.parametrize(
    ("path", "adapter", "reason"),
    [
        (pb.PATH_AUTO, "", "PATH_INVALID"),
        (pb.PATH_UNSPECIFIED, "", "PATH_INVALID"),
        (pb.PATH_TUNED, "", "ADAPTER_INVALID"),
        (pb.PATH_RAG, "a@1", "ADAPTER_INVALID"),
    ],
)
async def test_a_bad_policy_is_refused(stack, path, adapter, reason):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        request = pb.SetPolicyRequest(corpus="c", path=path, adapter=adapter)
        await stack.retrieval.SetPolicy(request)
    assert reason_of(error) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
