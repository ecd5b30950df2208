import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tworoads.v1 import generation_pb2 as pb
from tworoads.v1.generation_pb2_grpc import GenerationServiceStub

from services.generation.checks import Sampling
from services.generation.service import Finish, Piece
from services.prompts.options import DEFAULT_TOKENS
from services.runtime.call import TENANT
from services.runtime.channel import connect
from services.runtime.errors import Overloaded, Unavailable, error_info
from tests.fake_engine import CONTEXT, FakeEngine, serving
from tests.tiny_tokenizer import TinyTokenizer

NAME = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name
FRAME = len("<user\n>\n<assistant\n") - 1  # tokens around a user's text; "ss" is one


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def stub(engine: FakeEngine, tmp_path: Path) -> AsyncIterator[GenerationServiceStub]:
    async with serving(engine, tmp_path, f"unix:{tmp_path}/nobody") as (_, address):
        async with connect(address, NAME) as channel:
            yield GenerationServiceStub(channel)


def user(text: str = "Who?", *droppable: str) -> pb.Message:
    parts = [pb.Part(text=text)]
    parts += [pb.Part(text=t, id=f"p{i}", droppable=True) for i, t in enumerate(droppable)]
    return pb.Message(role=pb.ROLE_USER, parts=parts)


def said(role: Any, text: str = "x") -> pb.Message:
    return pb.Message(role=role, parts=[pb.Part(text=text)])


def asks(*messages: pb.Message, adapter: str = "", **options: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        messages=messages or [user()], adapter=adapter, options=pb.GenerateOptions(**options)
    )


async def written(stub: GenerationServiceStub, *args: Any, **options: Any) -> list[Any]:
    return [response async for response in stub.Generate(asks(*args, **options))]


async def test_text_comes_as_it_is_written_and_nothing_comes_before_it(
    stub: GenerationServiceStub,
) -> None:
    responses = await written(stub)
    assert [response.text for response in responses] == ["Ada", " wrote", ""]
    assert [response.HasField("prompt") for response in responses] == [True, False, False]
    assert [response.HasField("finish") for response in responses] == [False, False, True]
    assert responses[0].prompt.tokens == FRAME + len("Who?")
    assert responses[0].prompt.cached_tokens == 3


async def test_the_last_response_says_why_how_much_and_how_long(
    stub: GenerationServiceStub, engine: FakeEngine
) -> None:
    finish = (await written(stub))[-1].finish
    assert finish.reason == pb.FINISH_REASON_STOP
    assert finish.tokens == 8
    assert (finish.prefill_ms, finish.decode_ms) == (250.0, 1000.0)
    engine.pieces = [Piece("a", 1, finish=Finish("length", 1.0, 1.0, 1.0))]
    (only,) = await written(stub)
    assert only.finish.reason == pb.FINISH_REASON_LENGTH
    assert only.HasField("prompt")


async def test_an_empty_answer_still_says_how_it_ended(
    stub: GenerationServiceStub, engine: FakeEngine
) -> None:
    engine.pieces = [Piece("", 1, finish=Finish("stop", 1.0, 1.0, 1.0))]
    (only,) = await written(stub)
    assert (only.text, only.finish.tokens, only.HasField("prompt")) == ("", 1, True)


async def test_options_reach_the_engine(stub: GenerationServiceStub, engine: FakeEngine) -> None:
    schema = json.dumps({"type": "object"})
    request = asks(
        max_tokens=7,
        temperature=0.5,
        seed=-3,
        stop=["\n", "END"],
        json_schema=schema,
        priority=pb.PRIORITY_BATCH,
    )
    request.every_token = True
    _ = [response async for response in stub.Generate(request)]
    assert engine.asked[0][1] == Sampling(7, 0.5, -3, ("\n", "END"), schema, True, True)
    await written(stub, min_tokens=5)
    assert engine.asked[1][1] == Sampling(max_tokens=DEFAULT_TOKENS, min_tokens=5)


async def test_tenants_share_no_cache(stub: GenerationServiceStub, engine: FakeEngine) -> None:
    for tenant in ("a", "b", "a"):
        _ = [r async for r in stub.Generate(asks(), metadata=((TENANT, tenant),))]
    first, second, third = (salt for _, _, salt, _ in engine.asked)
    assert first == third != second
    assert len(first) == 64


async def test_the_prompt_leaves_room_for_the_answer(
    stub: GenerationServiceStub, engine: FakeEngine
) -> None:
    responses = await written(stub, user("x", "a" * 200, "b" * 200, "c" * 200), max_tokens=100)
    assert list(responses[0].prompt.used_parts) == ["p0", "p1"]
    assert responses[0].prompt.tokens == FRAME + 401
    assert engine.asked[0][1].max_tokens == 100
    await written(stub, user("x" * 500))
    assert engine.asked[1][1].max_tokens == CONTEXT - FRAME - 500  # less than the default
    await written(stub, user("x" * (CONTEXT - FRAME - 1)))
    assert engine.asked[2][1].max_tokens == 1
    await written(stub, user("x" * 400, "a" * 100), min_tokens=150)
    assert engine.asked[3][1].max_tokens == CONTEXT - FRAME - 400  # for the least, parts go


async def test_a_prompt_over_the_context_is_refused_with_the_numbers(
    stub: GenerationServiceStub, engine: FakeEngine
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await written(stub, user("x" * CONTEXT), max_tokens=100)
    info = error_info(error.value)
    assert info is not None
    assert info.reason == "PROMPT_TOO_LONG"
    assert dict(info.metadata) == {"tokens": str(CONTEXT + FRAME), "limit": str(CONTEXT - 100)}
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.Score(pb.ScoreRequest(messages=[user()], continuation="x" * CONTEXT))
    info = error_info(error.value)
    assert info is not None and info.reason == "PROMPT_TOO_LONG"
    assert engine.asked == [] and engine.scored == []


def nested(depth: int) -> str:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth - 1):
        schema = {"type": "object", "properties": {"a": schema}}
    return json.dumps(schema)


SYSTEM, USER, ASSISTANT = pb.ROLE_SYSTEM, pb.ROLE_USER, pb.ROLE_ASSISTANT

REFUSED = [
    (pb.GenerateRequest(), "MESSAGES_EMPTY"),
    (asks(said(pb.ROLE_UNSPECIFIED)), "MESSAGE_INVALID"),
    (asks(said(9)), "MESSAGE_INVALID"),
    (asks(said(USER), said(SYSTEM)), "MESSAGE_INVALID"),
    (asks(said(SYSTEM), said(SYSTEM), said(USER)), "MESSAGE_INVALID"),
    (asks(said(SYSTEM)), "MESSAGE_INVALID"),
    (asks(said(ASSISTANT), said(USER)), "MESSAGE_INVALID"),
    (asks(said(USER), said(USER)), "MESSAGE_INVALID"),
    (asks(said(USER), said(ASSISTANT)), "MESSAGE_INVALID"),
    (asks(pb.Message(role=USER)), "MESSAGE_INVALID"),
    (asks(pb.Message(role=USER, parts=[pb.Part(text="x", droppable=True)])), "MESSAGE_INVALID"),
    (asks(max_tokens=0), "MAX_TOKENS_OUT_OF_RANGE"),
    (asks(max_tokens=CONTEXT + 1), "MAX_TOKENS_OUT_OF_RANGE"),
    (asks(min_tokens=DEFAULT_TOKENS + 1), "MIN_TOKENS_OUT_OF_RANGE"),
    (asks(max_tokens=7, min_tokens=8), "MIN_TOKENS_OUT_OF_RANGE"),
    (asks(min_tokens=1, json_schema="{}"), "MIN_TOKENS_OUT_OF_RANGE"),
    (asks(user("x" * 500), min_tokens=100), "PROMPT_TOO_LONG"),
    (asks(temperature=-0.1), "TEMPERATURE_OUT_OF_RANGE"),
    (asks(temperature=2.1), "TEMPERATURE_OUT_OF_RANGE"),
    (asks(temperature=float("nan")), "TEMPERATURE_OUT_OF_RANGE"),
    (asks(stop=["x"] * 9), "STOP_INVALID"),
    (asks(stop=[""]), "STOP_INVALID"),
    (asks(stop=["x" * 65]), "STOP_INVALID"),
    (asks(max_tokens=CONTEXT), "PROMPT_TOO_LONG"),
    (asks(json_schema="{"), "JSON_SCHEMA_INVALID"),
    (asks(json_schema="[]"), "JSON_SCHEMA_INVALID"),
    (asks(json_schema="[" * 16_000), "JSON_SCHEMA_INVALID"),
    (asks(json_schema='{"const": NaN}'), "JSON_SCHEMA_INVALID"),
    (asks(json_schema=json.dumps({"title": "x" * 16_384})), "JSON_SCHEMA_INVALID"),
    (asks(json_schema='{"pattern": "(a+)+$"}'), "JSON_SCHEMA_INVALID"),
    (asks(json_schema='{"$ref": "#"}'), "JSON_SCHEMA_INVALID"),
    (asks(json_schema='{"items": {"$ref": "#"}}'), "JSON_SCHEMA_INVALID"),
    (asks(json_schema='{"patternProperties": {"(a+)+$": {}}}'), "JSON_SCHEMA_INVALID"),
    (asks(json_schema='{"properties": {"a": 1}}'), "JSON_SCHEMA_INVALID"),
    (asks(json_schema='{"properties": []}'), "JSON_SCHEMA_INVALID"),
    (asks(json_schema='{"anyOf": {}}'), "JSON_SCHEMA_INVALID"),
    (asks(json_schema='{"enum": "a"}'), "JSON_SCHEMA_INVALID"),
    (asks(json_schema=json.dumps({"enum": list(range(101))})), "JSON_SCHEMA_INVALID"),
    (asks(json_schema='{"maxLength": 1000000}'), "JSON_SCHEMA_INVALID"),
    (asks(json_schema='{"minItems": -1}'), "JSON_SCHEMA_INVALID"),
    (asks(json_schema='{"maxItems": 1.5}'), "JSON_SCHEMA_INVALID"),
    (asks(json_schema='{"prefixItems": [{"maxLength": 600}, {"maxLength": 600}]}'),
     "JSON_SCHEMA_INVALID"),
    (asks(json_schema=nested(11)), "JSON_SCHEMA_INVALID"),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "reason"), REFUSED)
async def test_refuses(
    stub: GenerationServiceStub, engine: FakeEngine, request_: pb.GenerateRequest, reason: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        _ = [response async for response in stub.Generate(request_)]
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    info = error_info(error.value)
    assert info is not None and info.reason == reason
    assert engine.asked == []


@pytest.mark.parametrize(
    "request_",
    [
        asks(json_schema=nested(10)),
        asks(json_schema=json.dumps({"enum": list(range(100))})),
        asks(json_schema='{"properties": {"pattern": true, "$ref": {"type": "null"}}}'),
        asks(stop=["x" * 64] * 8, temperature=2, max_tokens=1),
        asks(max_tokens=7, min_tokens=7),
        asks(said(SYSTEM), said(USER), said(ASSISTANT), said(USER)),
        asks(user("")),
    ],
)
async def test_takes_what_is_just_within_the_limits(
    stub: GenerationServiceStub, engine: FakeEngine, request_: pb.GenerateRequest
) -> None:
    _ = [response async for response in stub.Generate(request_)]
    assert len(engine.asked) == 1


BAD_NAMES = [
    "tone",
    "tone@",
    "@0123456789ab",
    "tone@0123456789a",
    "tone@0123456789abc",
    "tone@0123456789AB",
    "Tone@0123456789ab",
    ".tone@0123456789ab",
    "../x",
    "../../etc@0123456789ab",
    "a/b@0123456789ab",
    "tone@0123456789ab/..",
    "tone@0123456789ab\n",
    "to\0ne@0123456789ab",
    "tоne@0123456789ab",  # noqa: RUF001 - a Cyrillic o
    "tone＠0123456789ab",  # noqa: RUF001 - a wide @
    "x" * 65 + "@0123456789ab",
    "x" * 300,
    "~root@0123456789ab",
]


@pytest.mark.parametrize("adapter", BAD_NAMES)
async def test_what_cannot_be_an_adapters_name_is_refused(
    stub: GenerationServiceStub, engine: FakeEngine, adapter: str
) -> None:
    for call in (
        written(stub, adapter=adapter),
        stub.Score(pb.ScoreRequest(messages=[user()], continuation="x", adapter=adapter)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        info = error_info(error.value)
        assert info is not None and info.reason == "ADAPTER_NAME_INVALID"
    assert engine.asked == [] and engine.scored == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Unavailable("ENGINE_DEAD", "dead"), grpc.StatusCode.UNAVAILABLE),
        (Overloaded("QUEUE_FULL", "full"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (RuntimeError("secret"), grpc.StatusCode.INTERNAL),
    ],
)
async def test_the_engines_errors_become_a_status(
    stub: GenerationServiceStub, engine: FakeEngine, error: Exception, code: grpc.StatusCode
) -> None:
    engine.error = error
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await written(stub)
    assert caught.value.code() == code
    assert "secret" not in (caught.value.details() or "")


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_a_caller_that_leaves_stops_the_engine(
    stub: GenerationServiceStub, engine: FakeEngine, how: str
) -> None:
    engine.pieces, engine.waits = engine.pieces[:2], True
    call = stub.Generate(asks(), timeout=0.5 if how == "deadline" else None)
    assert (await call.read()).text == "Ada"
    assert engine.running == 1
    if how == "cancel":
        call.cancel()
    await asyncio.wait_for(engine.idle.wait(), 5)
    assert engine.running == 0


async def test_score_gives_every_token_of_the_continuation_and_its_end(
    stub: GenerationServiceStub, engine: FakeEngine
) -> None:
    tokenizer = TinyTokenizer()
    response = await stub.Score(pb.ScoreRequest(messages=[user()], continuation="yes"))
    assert tokenizer.text([token.id for token in response.tokens]) == "yes<|end|>"
    assert [token.log_probability for token in response.tokens] == [0, -1, -2, -3]
    ((prompt, continuation, _),) = engine.scored
    little_endian = b"".join(token.to_bytes(4, "little") for token in prompt)
    assert response.prompt_hash == hashlib.sha256(little_endian).hexdigest()
    assert tokenizer.text(prompt).endswith("<|start|>assistant\n")
    assert len(continuation) == 4


async def test_score_refuses_nothing_to_score(stub: GenerationServiceStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.Score(pb.ScoreRequest(messages=[user()]))
    info = error_info(error.value)
    assert info is not None and info.reason == "CONTINUATION_EMPTY"


async def test_get_model_says_what_runs_and_how_busy_it_is(
    stub: GenerationServiceStub,
) -> None:
    model = await stub.GetModel(pb.GenerationServiceGetModelRequest())
    assert (model.id, model.hash, model.dtype) == ("tiny", "ab" * 32, "float32")
    assert (model.context_length, model.running, model.waiting) == (CONTEXT, 0, 2)
    assert model.cache_use == 0.5
    assert list(model.adapters) == []
