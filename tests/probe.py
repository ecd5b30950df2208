"""A server whose methods a test writes itself, behind the same `running()` as every service's.

As a program it serves one stream that says something once and then nothing more.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from grpc_status import rpc_status
from tworoads.v1 import generation_pb2, retrieval_pb2
from tworoads.v1.embedding_pb2 import EmbedRequest, EmbedResponse
from tworoads.v1.generation_pb2 import GenerateRequest, GenerateResponse
from tworoads.v1.retrieval_pb2 import (
    CreateCorpusRequest,
    CreateCorpusResponse,
    PutDocumentsRequest,
    PutDocumentsResponse,
)

from services.runtime.channel import connect
from services.runtime.gate import Gate
from services.runtime.server import OPTIONS, Server, run, running
from services.runtime.settings import ServerSettings

EMBEDDING = "tworoads.v1.EmbeddingService"
GENERATION = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
RETRIEVAL = retrieval_pb2.DESCRIPTOR.services_by_name["RetrievalService"].full_name
TUNING = "tworoads.v1.TuningService"
NAMES = (EMBEDDING, GENERATION, RETRIEVAL)

Unary = Callable[[Any, Any], Awaitable[Any]]
Stream = Callable[[Any, Any], AsyncIterator[Any]]


async def _embed(request: EmbedRequest, context: Any) -> EmbedResponse:
    return EmbedResponse(model_hash=f"{len(request.texts)} texts")


async def _create(request: CreateCorpusRequest, context: Any) -> CreateCorpusResponse:
    return CreateCorpusResponse()


async def _generate(request: GenerateRequest, context: Any) -> AsyncIterator[GenerateResponse]:
    yield GenerateResponse(text="a")


async def _put(requests: Any, context: Any) -> AsyncIterator[PutDocumentsResponse]:
    async for _ in requests:
        yield PutDocumentsResponse()


async def _upload(requests: Any, context: Any) -> bytes:
    return b"".join([request async for request in requests])


async def _watch(request: bytes, context: Any) -> AsyncIterator[bytes]:
    yield request


class Probe:
    """A running server and one channel to it."""

    def __init__(self, server: Server, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.channel = channel
        self.address = f"127.0.0.1:{server.port}"
        self.embed_request = channel.unary_unary(
            f"/{EMBEDDING}/Embed", EmbedRequest.SerializeToString, EmbedResponse.FromString
        )
        self.create_request = channel.unary_unary(
            f"/{RETRIEVAL}/CreateCorpus",
            CreateCorpusRequest.SerializeToString,
            CreateCorpusResponse.FromString,
        )
        self.generate_request = channel.unary_stream(
            f"/{GENERATION}/Generate",
            GenerateRequest.SerializeToString,
            GenerateResponse.FromString,
        )
        self.put = channel.stream_stream(
            f"/{RETRIEVAL}/PutDocuments",
            PutDocumentsRequest.SerializeToString,
            PutDocumentsResponse.FromString,
        )
        self.upload = channel.stream_unary(f"/{TUNING}/ImportAdapter")
        self.watch = channel.unary_stream(f"/{TUNING}/WatchJob")

    def embed(self, *texts: str, **kwargs: Any) -> Any:
        return self.embed_request(EmbedRequest(texts=texts), **kwargs)

    def create(self, **kwargs: Any) -> Any:
        return self.create_request(CreateCorpusRequest(), **kwargs)

    def generate(self, **kwargs: Any) -> Any:
        return self.generate_request(GenerateRequest(), **kwargs)


def handlers(
    embed: Unary = _embed,
    create: Unary = _create,
    generate: Stream = _generate,
    put: Stream = _put,
    upload: Unary = _upload,
    watch: Stream = _watch,
) -> Callable[[grpc.aio.Server], None]:
    """Return what registers these functions, each called with the request and the context."""
    methods = {
        EMBEDDING: {
            "Embed": grpc.unary_unary_rpc_method_handler(
                embed, EmbedRequest.FromString, EmbedResponse.SerializeToString
            )
        },
        RETRIEVAL: {
            "CreateCorpus": grpc.unary_unary_rpc_method_handler(
                create, CreateCorpusRequest.FromString, CreateCorpusResponse.SerializeToString
            ),
            "PutDocuments": grpc.stream_stream_rpc_method_handler(
                put, PutDocumentsRequest.FromString, PutDocumentsResponse.SerializeToString
            ),
        },
        GENERATION: {
            "Generate": grpc.unary_stream_rpc_method_handler(
                generate, GenerateRequest.FromString, GenerateResponse.SerializeToString
            )
        },
        TUNING: {
            "ImportAdapter": grpc.stream_unary_rpc_method_handler(upload),
            "WatchJob": grpc.unary_stream_rpc_method_handler(watch),
        },
    }

    def add(server: grpc.aio.Server) -> None:
        server.add_generic_rpc_handlers(
            tuple(
                grpc.method_handlers_generic_handler(name, table) for name, table in methods.items()
            )
        )

    return add


@asynccontextmanager
async def probe(
    add: Callable[[grpc.aio.Server], None] | None = None,
    *,
    gate: Gate | None = None,
    max_running: int = 256,
    max_waiting: int = 256,
    **methods: Any,
) -> AsyncIterator[Probe]:
    """Serve `methods` (see `handlers`) on a free port of the loopback interface."""
    settings = ServerSettings(max_running=max_running, max_waiting=max_waiting, grace_seconds=0)
    async with running(settings, NAMES, gate) as server:
        await server.serve(add or handlers(**methods))
        async with connect(f"127.0.0.1:{server.port}", *NAMES) as channel:
            yield Probe(server, channel)


async def soon(awaitable: Any) -> Any:
    """Wait for what must come by itself."""
    return await asyncio.wait_for(awaitable, 25)


async def failure(call: Any) -> grpc.aio.AioRpcError:
    """Return how a call fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if isinstance(call, grpc.aio.UnaryStreamCall):
            async for _ in call:
                pass
        else:
            await call
    return caught.value


def retry_seconds(error: grpc.aio.AioRpcError) -> float | None:
    for detail in rpc_status.from_call(error).details:
        info = RetryInfo()
        if detail.Unpack(info):
            return info.retry_delay.ToTimedelta().total_seconds()
    return None


def raising(error: BaseException) -> dict[str, Any]:
    """Return methods that fail with `error`, the stream after its first message."""

    async def embed(request: Any, context: Any) -> EmbedResponse:
        raise error

    async def generate(request: Any, context: Any) -> AsyncIterator[GenerateResponse]:
        yield GenerateResponse()
        raise error

    return {"embed": embed, "generate": generate}


@asynccontextmanager
async def program() -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """Run this file as a program; yield its process and its port."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.probe", stderr=asyncio.subprocess.PIPE
    )
    try:
        assert process.stderr
        line = json.loads(await asyncio.wait_for(process.stderr.readline(), 60))
        yield process, int(line["message"].rpartition(" ")[2])
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _main() -> None:
    async def say_once(request: GenerateRequest, context: Any) -> AsyncIterator[GenerateResponse]:
        yield GenerateResponse(text="a")
        await asyncio.Event().wait()

    OPTIONS["grpc.http2.min_ping_interval_without_data_ms"] //= 5  # tests ping as much more often
    async with running(ServerSettings(grace_seconds=0), NAMES) as server:
        await server.serve(handlers(generate=say_once))
        await server.until_stopped()


if __name__ == "__main__":
    run(_main, ServerSettings())
