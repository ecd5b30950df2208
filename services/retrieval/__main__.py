"""`python -m services.retrieval`"""

import ctypes
from contextlib import AbstractAsyncContextManager

from tworoads.v1.embedding_pb2 import DESCRIPTOR as EMBEDDING
from tworoads.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tworoads.v1.retrieval_pb2 import DESCRIPTOR
from tworoads.v1.retrieval_pb2_grpc import add_RetrievalServiceServicer_to_server

from services.retrieval.embedder import Embedder
from services.retrieval.parser import Parser
from services.retrieval.service import RetrievalService
from services.retrieval.settings import Settings
from services.retrieval.stores.store import Store
from services.runtime.channel import connect
from services.runtime.server import run, running


def open_store(settings: Settings) -> AbstractAsyncContextManager[Store]:
    """Return the store that the settings name. Only its own library is imported."""
    if settings.store == "weaviate":
        from services.retrieval.stores.weaviate import WeaviateStore

        key_file = settings.weaviate_key_file
        key = key_file.read_text().strip() if key_file else ""
        return WeaviateStore.open(settings.weaviate_http, settings.weaviate_grpc, key)
    from services.retrieval.stores.lancedb import LanceStore

    return LanceStore.open(settings.folder)


async def main(settings: Settings) -> None:
    name = DESCRIPTOR.services_by_name["RetrievalService"].full_name
    embedding = EMBEDDING.services_by_name["EmbeddingService"].full_name
    async with (
        running(settings, [name]) as server,
        connect(settings.embedding, embedding, tls=settings.tls) as channel,
        open_store(settings) as store,
        Parser(
            processes=settings.parser_processes,
            seconds=settings.parse_seconds,
            memory_mb=settings.parse_memory_mb,
        ) as parser,
    ):
        embedder = Embedder(EmbeddingServiceStub(channel))
        service = RetrievalService(
            store,
            embedder,
            parser,
            most_bytes=settings.document_mb * 1024 * 1024,
            most_corpora=settings.max_corpora,
        )
        await server.serve(lambda s: add_RetrievalServiceServicer_to_server(service, s))
        await server.until_stopped()


def keep_memory_flat() -> None:
    """Tell glibc, where it is, to give freed memory back: by default it keeps an arena per core and
    thread, and an ingest of many documents grew by half."""
    arenas, trim_threshold = -8, -1  # M_ARENA_MAX, M_TRIM_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(arenas, 2)
        mallopt(trim_threshold, 128 * 1024)


if __name__ == "__main__":
    keep_memory_flat()
    chosen = Settings(_cli_parse_args=True)  # type: ignore[call-arg]
    run(lambda: main(chosen), chosen)
