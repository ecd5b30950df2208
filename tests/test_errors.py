import asyncio
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from tworoads.v1.embedding_pb2 import EmbedResponse

from services.runtime.call import outgoing
from services.runtime.errors import (
    AlreadyExists,
    Conflict,
    InvalidInput,
    NotFound,
    NotReady,
    Overloaded,
    ServiceError,
    Stopping,
    TooLate,
    Unavailable,
    downstream,
    error_info,
)
from tests.probe import Probe, failure, probe, raising, retry_seconds

ERRORS = [
    (InvalidInput, StatusCode.INVALID_ARGUMENT, None),
    (NotFound, StatusCode.NOT_FOUND, None),
    (AlreadyExists, StatusCode.ALREADY_EXISTS, None),
    (NotReady, StatusCode.FAILED_PRECONDITION, None),
    (Conflict, StatusCode.ABORTED, None),
    (Overloaded, StatusCode.RESOURCE_EXHAUSTED, 1.0),
    (TooLate, StatusCode.DEADLINE_EXCEEDED, None),
    (Unavailable, StatusCode.UNAVAILABLE, 1.0),
    (Stopping, StatusCode.UNAVAILABLE, 0.0),
]


@pytest.mark.parametrize(("error", "code", "seconds"), ERRORS)
@pytest.mark.parametrize("method", ["embed", "generate"])
async def test_an_error_becomes_a_status_with_its_reason(
    error: type[ServiceError], code: StatusCode, seconds: float | None, method: str
) -> None:
    raised = error("SOME_REASON", "some text", name="a", reason="b")
    async with probe(**raising(raised)) as server:
        seen = await failure(getattr(server, method)())
    info = error_info(seen)
    assert (seen.code(), seen.details()) == (code, "some text")
    assert info and (info.reason, info.domain) == ("SOME_REASON", "tworoads")
    assert dict(info.metadata) == {"name": "a", "reason": "b"}
    assert retry_seconds(seen) == seconds


async def test_an_error_in_a_task_group_becomes_a_status_too() -> None:
    async def embed(request: Any, context: Any) -> EmbedResponse:
        async def part() -> None:
            raise NotFound("CORPUS_NOT_FOUND", "there is no such corpus")

        async with asyncio.TaskGroup() as group:
            group.create_task(part())
        return EmbedResponse()

    async with probe(embed=embed) as server:
        assert (await failure(server.embed())).code() == StatusCode.NOT_FOUND


async def test_an_error_that_quotes_a_megabyte_still_gets_through() -> None:
    name = "🙂" * 1_000_000
    async with probe(**raising(NotFound("CORPUS_NOT_FOUND", name, corpus=name))) as server:
        seen = await failure(server.embed())
    info = error_info(seen)
    assert seen.code() == StatusCode.NOT_FOUND
    assert info and info.reason == "CORPUS_NOT_FOUND"


def forwarding(back: Probe) -> dict[str, Any]:
    async def embed(request: Any, context: Any) -> EmbedResponse:
        with downstream("embedding"):
            return await back.embed(**outgoing())

    return {"embed": embed}


@pytest.mark.parametrize(
    ("below", "code", "reason", "text"),
    [
        (NotFound("GONE", "no such text"), StatusCode.NOT_FOUND, "GONE", "no such text"),
        (Overloaded("FULL", "full"), StatusCode.RESOURCE_EXHAUSTED, "FULL", "full"),
        (
            Unavailable("ENGINE_DEAD", "secret"),
            StatusCode.UNAVAILABLE,
            "ENGINE_DEAD",
            "the embedding service cannot answer now; try again",
        ),
        (
            Stopping("STOPPING", "secret"),
            StatusCode.UNAVAILABLE,
            "EMBEDDING_UNAVAILABLE",
            "the embedding service is away; try again",
        ),
        (RuntimeError("secret"), StatusCode.INTERNAL, None, "internal error, request r1"),
    ],
)
async def test_an_error_further_down_keeps_its_reason_and_hides_its_secrets(
    below: Exception, code: StatusCode, reason: str | None, text: str
) -> None:
    async with probe(**raising(below)) as back, probe(**forwarding(back)) as front:
        seen = await failure(front.embed(metadata=(("x-request-id", "r1"),)))
    info = error_info(seen)
    assert (seen.code(), seen.details()) == (code, text)
    assert (info.reason if info else None) == reason


async def test_a_service_that_is_gone_is_unavailable_by_name_and_not_tried_again_above() -> None:
    calls = 0

    async with probe() as back:
        pass

    async def embed(request: Any, context: Any) -> EmbedResponse:
        nonlocal calls
        calls += 1
        async with grpc.aio.insecure_channel(back.address) as channel:
            with downstream("embedding"):
                await channel.unary_unary("/tworoads.v1.EmbeddingService/Embed")(b"")
        return EmbedResponse()

    async with probe(embed=embed) as front:
        seen = await failure(front.embed())
    info = error_info(seen)
    assert info and info.reason == "EMBEDDING_UNAVAILABLE"
    assert calls == 1
