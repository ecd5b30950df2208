"""GenerationService: checks the request, renders and fits the prompt, passes the text on."""

import asyncio
import hashlib
import struct
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

import grpc
from tworoads.v1 import generation_pb2 as pb
from tworoads.v1 import generation_pb2_grpc as pb_grpc

from services.generation.adapters import Adapters, Loader, Lora
from services.generation.checks import Sampling, conversation, sampling
from services.prompts.options import DEFAULT_TOKENS
from services.prompts.rendering import PromptTooLong, Rendered, Renderer
from services.prompts.words import Message
from services.runtime import call, tracing
from services.runtime.errors import InvalidInput

T = TypeVar("T")


@dataclass(frozen=True)
class Model:
    """What the engine runs. `hash` is in lower-case hex, `context_length` in tokens."""

    id: str
    hash: str
    dtype: str
    context_length: int


@dataclass(frozen=True)
class Load:
    """How busy the engine is: requests, and the share of its cache that is in use."""

    running: int = 0
    waiting: int = 0
    cache_use: float = 0.0


@dataclass(frozen=True)
class Finish:
    """Why and when writing ended. Times are seconds on the clock of `time.monotonic`."""

    reason: Literal["stop", "length"]
    scheduled: float
    first_token: float
    last_token: float


@dataclass(frozen=True)
class Piece:
    """The text written since the piece before, and of how many tokens it is. Texts may be empty."""

    text: str
    tokens: int
    cached_tokens: int = 0
    finish: Finish | None = None


class Engine(Loader, Protocol):
    """What the service needs. `engine.py` has the real one.

    `salt` separates caches: prompts with different salts share nothing. `lora` is loaded while it
    is used, None means the base model. `generate` and `score` raise Unavailable (ENGINE_DEAD),
    Overloaded (QUEUE_FULL) and InvalidInput (JSON_SCHEMA_INVALID). Closing the generator stops the
    engine's work for it.
    """

    @property
    def model(self) -> Model: ...

    def load(self) -> Load: ...

    def generate(
        self, prompt: list[int], how: Sampling, salt: str, lora: Lora | None = None
    ) -> AsyncGenerator[Piece, None]: ...

    async def score(
        self, prompt: list[int], continuation: list[int], salt: str, lora: Lora | None = None
    ) -> list[float]: ...


REASONS = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


class GenerationService(pb_grpc.GenerationServiceServicer):
    """Serves one engine. `renderer` is that of the engine's model."""

    def __init__(self, engine: Engine, renderer: Renderer, adapters: Adapters) -> None:
        self._engine = engine
        self._adapters = adapters
        self._renderer = renderer
        # A tokenizer serves one thread at a time; the event loop must not wait for it.
        self._rendering = ThreadPoolExecutor(1, thread_name_prefix="rendering")

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        arrived = call.current.get().started
        how = sampling(request, self._engine.model.context_length)
        prompt, how = await self._in_thread(self._fit, conversation(request.messages), how)
        tokens = 0
        sent = False
        async with (
            self._adapters.using(request.adapter, request.measuring) as lora,
            aclosing(self._written(prompt.token_ids, how, lora)) as pieces,
        ):
            async for piece in pieces:
                tokens += piece.tokens
                if not piece.text and piece.finish is None:
                    continue
                response = pb.GenerateResponse(text=piece.text)
                if not sent:
                    response.prompt.CopyFrom(_prompt_info(prompt, piece))
                    sent = True
                if piece.finish is not None:
                    response.finish.CopyFrom(_finish(piece.finish, tokens, arrived))
                yield response

    async def _written(
        self, prompt: list[int], how: Sampling, lora: Lora | None
    ) -> AsyncGenerator[Piece, None]:
        """Pass on what the engine writes, as one span of the trace."""
        model, started, tokens = self._engine.model.id, time.monotonic(), 0
        asked: dict[str, str | int | float] = {
            tracing.PROVIDER: "vllm",
            tracing.REQUEST_MODEL: model,
            tracing.ADAPTER: lora.name if lora else "",
            tracing.INPUT_TOKENS: len(prompt),
            tracing.MAX_TOKENS: how.max_tokens or 0,
            tracing.TEMPERATURE: how.temperature,
        }
        with tracing.span("chat", model, asked) as span:
            async with aclosing(self._engine.generate(prompt, how, _salt(), lora)) as pieces:
                async for piece in pieces:
                    if not tokens:
                        span.set({tracing.FIRST_CHUNK: time.monotonic() - started})
                        span.set({tracing.CACHED_TOKENS: piece.cached_tokens})
                    tokens += piece.tokens
                    span.set({tracing.OUTPUT_TOKENS: tokens})
                    if piece.finish is not None:
                        span.set({tracing.FINISH_REASONS: [piece.finish.reason]})
                    yield piece

    async def Score(
        self, request: pb.ScoreRequest, context: grpc.aio.ServicerContext
    ) -> pb.ScoreResponse:
        if not request.continuation:
            raise InvalidInput("CONTINUATION_EMPTY", "continuation must not be empty")
        messages = conversation(request.messages)
        prompt, said = await self._in_thread(self._score_ids, messages, request.continuation)
        async with self._adapters.using(request.adapter, measuring=True) as lora:
            scores = await self._engine.score(prompt.token_ids, said, _salt(), lora)
        return pb.ScoreResponse(
            tokens=[
                pb.TokenScore(id=token, log_probability=score)
                for token, score in zip(said, scores, strict=True)
            ],
            prompt_hash=_prompt_hash(prompt.token_ids),
        )

    async def GetModel(
        self, request: pb.GenerationServiceGetModelRequest, context: grpc.aio.ServicerContext
    ) -> pb.GenerationServiceGetModelResponse:
        model, load = self._engine.model, self._engine.load()
        return pb.GenerationServiceGetModelResponse(
            id=model.id,
            hash=model.hash,
            context_length=model.context_length,
            adapters=self._adapters.loaded(),
            running=load.running,
            waiting=load.waiting,
            cache_use=load.cache_use,
            dtype=model.dtype,
        )

    def _fit(self, messages: list[Message], how: Sampling) -> tuple[Rendered, Sampling]:
        """Render the prompt so that the answer has room, and say how long that may be."""
        context_length = self._engine.model.context_length
        wanted = how.max_tokens or DEFAULT_TOKENS
        try:
            prompt = self._renderer.render(messages, context_length - wanted)
        except PromptTooLong as error:
            if how.max_tokens is not None:
                raise
            limit = context_length - max(1, how.min_tokens)
            if error.tokens > limit:
                raise PromptTooLong(error.tokens, limit) from error
            prompt = self._renderer.render(messages, limit)
        room = context_length - len(prompt.token_ids)
        return prompt, replace(how, max_tokens=min(wanted, room))

    def _score_ids(self, messages: list[Message], text: str) -> tuple[Rendered, list[int]]:
        return self._renderer.exchange(messages, text, self._engine.model.context_length)

    async def _in_thread(self, render: Callable[..., T], *arguments: Any) -> T:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._rendering, render, *arguments)
        except PromptTooLong as error:
            raise InvalidInput(
                "PROMPT_TOO_LONG", str(error), tokens=str(error.tokens), limit=str(error.limit)
            ) from error


def _salt() -> str:
    return hashlib.sha256(call.tenant().encode()).hexdigest()


def _prompt_hash(token_ids: list[int]) -> str:
    return hashlib.sha256(struct.pack(f"<{len(token_ids)}I", *token_ids)).hexdigest()


def _prompt_info(prompt: Rendered, first: Piece) -> pb.PromptInfo:
    return pb.PromptInfo(
        tokens=len(prompt.token_ids),
        cached_tokens=first.cached_tokens,
        used_parts=prompt.used_parts,
    )


def _finish(finish: Finish, tokens: int, arrived: float) -> pb.GenerateFinish:
    return pb.GenerateFinish(
        reason=REASONS[finish.reason],
        tokens=tokens,
        queue_ms=max(0.0, finish.scheduled - arrived) * 1e3,
        prefill_ms=(finish.first_token - finish.scheduled) * 1e3,
        decode_ms=(finish.last_token - finish.first_token) * 1e3,
    )
