"""RetrievalService: checks the request, asks, fills the response."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing
from weakref import WeakValueDictionary

import grpc
from tworoads.v1 import retrieval_pb2 as pb
from tworoads.v1 import retrieval_pb2_grpc as pb_grpc

from services.retrieval import checks, policies
from services.retrieval.corpora import Corpora, Corpus
from services.retrieval.embedder import Embedder
from services.retrieval.ingest import Incoming, Ingest
from services.retrieval.messages import (
    corpus_of,
    document_of,
    next_token,
    passage_of,
    progress_of,
    result_of,
)
from services.retrieval.parser import Parser
from services.retrieval.search import Searcher
from services.retrieval.sharing import Sharing
from services.retrieval.stores.store import CorpusKey, Store
from services.runtime import tracing
from services.runtime.call import author, tenant
from services.runtime.errors import InvalidInput, NotFound

MOST_CHUNK = 1024 * 1024
MOST_TEXT = 500_000
MOST_TITLE = 1024
MOST_PAGE_BYTES = 4 * 1024 * 1024  # of documents, which a page may exceed by one
MOST_IDS = 1000
PROGRESS_SECONDS = 1.0


class RetrievalService(pb_grpc.RetrievalServiceServicer):
    """Serves corpora of `store`, at most `most_corpora` of a tenant. `most_bytes` is the largest
    document that is taken."""

    def __init__(
        self,
        store: Store,
        embedder: Embedder,
        parser: Parser,
        most_bytes: int,
        most_corpora: int,
    ) -> None:
        self._store = store
        self._embedder = embedder
        self._parser = parser
        self._most_bytes = most_bytes
        self._corpora = Corpora(store, embedder, most_corpora)
        self._searcher = Searcher(store, self._corpora, embedder)
        self._sharing = Sharing(parser.processes)
        self._committing: WeakValueDictionary[CorpusKey, asyncio.Lock] = WeakValueDictionary()

    async def CreateCorpus(
        self, request: pb.CreateCorpusRequest, context: grpc.aio.ServicerContext
    ) -> pb.CreateCorpusResponse:
        key = CorpusKey(tenant(), request.name)
        tokens = request.chunk_tokens if request.HasField("chunk_tokens") else None
        await self._corpora.create(key, tokens, request.allow_existing)
        return pb.CreateCorpusResponse(corpus=await self._corpus(await self._corpora.get(key)))

    async def GetCorpus(
        self, request: pb.GetCorpusRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetCorpusResponse:
        corpus = await self._corpora.get(CorpusKey(tenant(), request.name))
        return pb.GetCorpusResponse(corpus=await self._corpus(corpus))

    async def ListCorpora(
        self, request: pb.ListCorporaRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListCorporaResponse:
        size = checks.page_size(request.page_size)
        after = checks.after(request.page_token)
        corpora = await self._corpora.list_all(tenant(), after, size + 1)
        return pb.ListCorporaResponse(
            corpora=[await self._corpus(corpus) for corpus in corpora[:size]],
            next_page_token=next_token([corpus.name for corpus in corpora], size),
        )

    async def DeleteCorpus(
        self, request: pb.DeleteCorpusRequest, context: grpc.aio.ServicerContext
    ) -> pb.DeleteCorpusResponse:
        key = CorpusKey(tenant(), request.name)
        async with self._lock(key):
            await self._corpora.delete(key)
        return pb.DeleteCorpusResponse()

    async def PutDocuments(
        self,
        request_iterator: AsyncIterator[pb.PutDocumentsRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[pb.PutDocumentsResponse]:
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("part") != "start":
            raise InvalidInput("START_MISSING", "the first message says where the documents go")
        key = CorpusKey(tenant(), first.start.corpus)
        corpus = await self._corpora.get(key)
        tokenizer = await self._embedder.tokenizer(corpus.embedder.hash)
        ingest = Ingest(
            key,
            corpus,
            tokenizer,
            self._store,
            self._corpora,
            self._embedder,
            self._parser,
            self._lock(key),
            self._sharing,
        )
        work = asyncio.create_task(_work(ingest, self._documents(request_iterator)))
        try:
            yield progress_of(ingest.progress)
            while True:
                try:
                    async with asyncio.timeout(PROGRESS_SECONDS):
                        result = await ingest.results.get()
                except TimeoutError:
                    yield progress_of(ingest.progress)
                    continue
                if result is None:
                    break
                yield result_of(result)
            await work
            yield progress_of(ingest.progress)
        finally:
            work.cancel()
            try:
                await asyncio.gather(work, return_exceptions=True)
            finally:
                ingest.close()

    async def GetDocument(
        self, request: pb.GetDocumentRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetDocumentResponse:
        key = CorpusKey(tenant(), request.corpus)
        await self._corpora.get(key)
        found = await self._store.get_document(key, request.id)
        if found is None:
            raise NotFound("DOCUMENT_NOT_FOUND", f"there is no document {request.id!r}")
        document, text = found
        end = request.end if request.HasField("end") else len(text)
        if not request.start <= end <= len(text):
            raise InvalidInput("RANGE_INVALID", f"the text has {len(text)} characters")
        end = min(end, request.start + MOST_TEXT)
        return pb.GetDocumentResponse(
            document=document_of(document), text=text[request.start : end], end=end
        )

    async def ListDocuments(
        self, request: pb.ListDocumentsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListDocumentsResponse:
        key = CorpusKey(tenant(), request.corpus)
        size = checks.page_size(request.page_size)
        after = checks.after(request.page_token)
        await self._corpora.get(key)
        documents = await self._store.list_documents(key, after, size + 1)
        page: list[pb.Document] = []
        room = MOST_PAGE_BYTES
        for document in documents[:size]:
            page.append(document_of(document))
            room -= page[-1].ByteSize()
            if room < 0:
                break
        return pb.ListDocumentsResponse(
            documents=page,
            next_page_token=next_token([document.id for document in documents], len(page)),
        )

    async def DeleteDocuments(
        self, request: pb.DeleteDocumentsRequest, context: grpc.aio.ServicerContext
    ) -> pb.DeleteDocumentsResponse:
        key = CorpusKey(tenant(), request.corpus)
        if not request.ids:
            raise InvalidInput("IDS_EMPTY", "ids must have at least one entry")
        if len(request.ids) > MOST_IDS:
            raise InvalidInput("TOO_MANY_IDS", f"ids may have at most {MOST_IDS} entries")
        await self._corpora.get(key)
        async with self._lock(key), self._corpora.changing(key):
            deleted = await self._store.delete_documents(key, request.ids)
            await self._store.sweep(key, dict.fromkeys(request.ids, ""))
        return pb.DeleteDocumentsResponse(deleted=deleted)

    async def Search(
        self, request: pb.SearchRequest, context: grpc.aio.ServicerContext
    ) -> pb.SearchResponse:
        limit = checks.limit(request.limit)
        with tracing.span("retrieval", "", {tracing.TOP_K: limit}) as span:
            found = await self._searcher.search(
                CorpusKey(tenant(), request.corpus),
                checks.query(request.query),
                checks.mode(request.mode),
                limit,
                checks.filter_of(request.filter),
                request.allow_degraded,
            )
            span.set({tracing.PASSAGES: len(found.hits)})
        return pb.SearchResponse(
            passages=[passage_of(hit) for hit in found.hits],
            corpus_version=found.corpus_version,
            embed_ms=found.embed_ms,
            search_ms=found.search_ms,
            degraded=found.degraded,
        )

    async def GetPolicy(
        self, request: pb.GetPolicyRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetPolicyResponse:
        policy = await self._corpora.get_policy(CorpusKey(tenant(), request.corpus))
        return pb.GetPolicyResponse(policy=policies.message_of(policy))

    async def SetPolicy(
        self, request: pb.SetPolicyRequest, context: grpc.aio.ServicerContext
    ) -> pb.SetPolicyResponse:
        policy = policies.checked(request, author())
        key = CorpusKey(tenant(), request.corpus)
        async with self._lock(key):
            policy = await self._corpora.set_policy(key, policy, request.etag)
        return pb.SetPolicyResponse(policy=policies.message_of(policy))

    async def ListPolicies(
        self, request: pb.ListPoliciesRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListPoliciesResponse:
        size = checks.page_size(request.page_size)
        after = checks.after(request.page_token)
        found = await self._corpora.list_policies(tenant(), after, size + 1)
        return pb.ListPoliciesResponse(
            policies=[policies.message_of(policy) for policy in found[:size]],
            next_page_token=next_token([policy.corpus for policy in found], size),
        )

    async def _documents(
        self, requests: AsyncIterator[pb.PutDocumentsRequest]
    ) -> AsyncGenerator[Incoming]:
        """Put documents together from their parts. Before it holds more than a chunk of one, it
        waits for its turn, until that document is taken."""
        header: pb.PutDocumentsDocument | None = None
        content = bytearray()
        size = 0
        ended = False
        async with AsyncExitStack() as turn:
            async for request in requests:
                part = request.WhichOneof("part")
                if part == "end" and not ended:
                    ended = True
                elif part == "chunk" and header is not None and not ended:
                    if len(request.chunk) > MOST_CHUNK:
                        raise InvalidInput("CHUNK_TOO_LARGE", "a chunk has at most 1 MiB")
                    if size <= MOST_CHUNK < size + len(request.chunk):
                        await turn.enter_async_context(self._sharing.receiving(tenant()))
                    size += len(request.chunk)
                    if size <= self._most_bytes:
                        content += request.chunk
                    else:
                        content.clear()
                elif part == "document" and not ended:
                    if header is not None:
                        yield self._incoming(header, bytes(content), size)
                        await turn.aclose()
                    header, size = request.document, 0
                    content = bytearray()
                else:
                    raise InvalidInput(
                        "PART_OUT_OF_ORDER",
                        "after `start` come documents, each with its chunks, then `end`",
                    )
            if not ended:
                raise InvalidInput("END_MISSING", "the stream broke off: it ends with `end`")
            if header is not None:
                yield self._incoming(header, bytes(content), size)

    def _incoming(self, header: pb.PutDocumentsDocument, content: bytes, size: int) -> Incoming:
        try:
            if size > self._most_bytes:
                most = self._most_bytes // MOST_CHUNK
                raise InvalidInput("TOO_LARGE", f"a document has at most {most} MiB")
            return Incoming(
                id=checks.document_id(header.id),
                title=" ".join(header.title[:MOST_TITLE].split()),
                uri=checks.uri(header.uri),
                media_type=checks.media_type(header.media_type),
                metadata=checks.metadata(header.metadata),
                content=content,
                size=len(content) + header.ByteSize(),
            )
        except InvalidInput as error:
            return Incoming(id=header.id[: checks.MOST_ID], error=error)

    async def _corpus(self, corpus: Corpus) -> pb.Corpus:
        key = CorpusKey(tenant(), corpus.name)
        version = await self._corpora.version(key)
        return corpus_of(corpus, version, await self._store.count_documents(key))

    def _lock(self, key: CorpusKey) -> asyncio.Lock:
        return self._committing.setdefault(key, asyncio.Lock())


async def _work(ingest: Ingest, documents: AsyncGenerator[Incoming]) -> None:
    async def feed() -> None:
        async with aclosing(documents):
            async for document in documents:
                await ingest.put(document)
        await ingest.finish()

    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(feed())
            tasks.create_task(ingest.run())
    except BaseExceptionGroup as group:
        ingest.results.put_nowait(None)
        raise _first(group) from group


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
