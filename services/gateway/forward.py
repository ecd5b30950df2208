"""Forwards the public methods of the other services, bytes in and bytes out.

No method is written twice: what may be called is a list, the rest comes from the descriptors.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.descriptor_pool import Default
from tworoads.v1 import evaluation_pb2  # noqa: F401 - describes what is forwarded
from tworoads.v1.tuning_pb2 import DeleteAdapterRequest

from services.runtime.call import outgoing
from services.runtime.errors import ServiceError, downstream
from services.runtime.status import real_status

PUBLIC = {
    "tworoads.v1.RetrievalService": (
        "CreateCorpus",
        "GetCorpus",
        "ListCorpora",
        "DeleteCorpus",
        "PutDocuments",
        "GetDocument",
        "ListDocuments",
        "DeleteDocuments",
        "Search",
        "GetPolicy",
        "SetPolicy",
        "ListPolicies",
    ),
    "tworoads.v1.EmbeddingService": ("Embed", "GetModel"),
    "tworoads.v1.GenerationService": ("GetModel",),
    "tworoads.v1.TuningService": (
        "CreateJob",
        "GetJob",
        "WatchJob",
        "CancelJob",
        "ListJobs",
        "ListAdapters",
        "GetAdapter",
        "ImportAdapter",
        "DownloadAdapter",
        "AcceptAdapter",
        "DeleteAdapter",
    ),
    "tworoads.v1.EvaluationService": (
        "CreateComparison",
        "GetComparison",
        "WatchComparison",
        "CancelComparison",
        "ListComparisons",
        "ListAnswers",
        "DownloadReport",
    ),
}
DELETE = "/tworoads.v1.TuningService/DeleteAdapter"


class Forwarder(grpc.GenericRpcHandler):
    """Handles the public methods by calling them on `channels`, by full name of the service.

    `forget` is told the NAME@HASH of each adapter that the caller has deleted.
    """

    def __init__(
        self,
        channels: Mapping[str, grpc.aio.Channel],
        forget: Callable[[str], None] = lambda adapter: None,
    ) -> None:
        self._handlers: dict[str, Any] = {}
        done = {DELETE: lambda request: forget(DeleteAdapterRequest.FromString(request).adapter)}
        for service, methods in PUBLIC.items():
            described = Default().FindServiceByName(service)
            word = described.name.removesuffix("Service").lower()
            for name in methods:
                method = described.methods_by_name[name]
                path = f"/{service}/{name}"
                self._handlers[path] = _handler(
                    method, path, channels[service], word, done.get(path)
                )

    def service(self, handler_call_details: Any) -> Any:
        return self._handlers.get(handler_call_details.method)


def _handler(
    method: Any,
    path: str,
    channel: grpc.aio.Channel,
    word: str,
    done: Callable[[bytes], None] | None,
) -> Any:
    """Return what handles a method; `done` is told each request that ended OK, of a unary call."""
    kinds = {
        (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
        (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
        (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
        (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
    }
    kind, make_handler = kinds[method.client_streaming, method.server_streaming]
    call_next = getattr(channel, kind)(path)

    async def unary(request: Any, context: Any) -> bytes:
        async with _calling(request, method, call_next, word) as call:
            response: bytes = await call
        if done:
            done(request)
        return response

    async def stream(request: Any, context: Any) -> AsyncIterator[bytes]:
        async with _calling(request, method, call_next, word) as call:
            async for response in call:
                yield response

    return make_handler(stream if method.server_streaming else unary)


@asynccontextmanager
async def _calling(request: Any, method: Any, call_next: Any, word: str) -> AsyncIterator[Any]:
    """Call the service `word`; the call is over when the block is."""
    failed: list[ServiceError] = []
    if method.client_streaming:
        request = _passed_on(request, failed)
    with downstream(word):
        call = call_next(request, **outgoing())
        try:
            async with real_status(call):
                yield call
        except (asyncio.CancelledError, grpc.aio.AioRpcError):
            if failed:  # gRPC only says that the call was cancelled, not by what
                raise failed[0] from None
            raise
        finally:
            call.cancel()


async def _passed_on(requests: Any, failed: list[ServiceError]) -> AsyncIterator[bytes]:
    """Yield the caller's messages; note the error that ends them."""
    try:
        async for request in requests:
            yield request
    except ServiceError as error:
        failed.append(error)
        raise
