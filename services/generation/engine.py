"""The engine: vLLM's AsyncLLM in this process, its scheduler and its worker in a child process."""

import asyncio
import logging
import os
import uuid
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.generation import plugin
from services.generation.adapters import Lora
from services.generation.checks import Sampling
from services.generation.processor import environment, executor
from services.generation.service import Finish, Load, Model, Piece
from services.generation.settings import Settings
from services.prompts.rendering import Renderer
from services.runtime import checkpoint
from services.runtime.errors import InvalidInput, NotReady, Overloaded, Stopping, Unavailable
from services.runtime.processor import this_processor

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.stats import SchedulerStats

BLOCK = 32  # tokens that a prefix hit counts in; vLLM's 128 on a CPU hits too rarely
TOGETHER = 8  # tokens that are sent together at most
POLL_SECONDS = 0.2
CLOSE_SECONDS = 1.0  # nothing is lost by killing it

log = logging.getLogger(__name__)


class VllmEngine:
    """Implements `service.Engine`. Made by `start`, ended by `close`."""

    def __init__(self, llm: "AsyncLLM", stats: "list[SchedulerStats]", model: Model) -> None:
        self.model = model
        self._llm = llm
        self._stats = stats

    @classmethod
    async def start(cls, settings: Settings) -> "VllmEngine":
        """Load the model: seconds to minutes, during which the event loop runs on.

        Raises checkpoint.Unfit if the model may not be served.
        """
        folder = Path(settings.model)
        checkpoint.check(folder)
        hashing = asyncio.create_task(asyncio.to_thread(checkpoint.fingerprint, folder))
        stats: list[SchedulerStats] = []
        # Not in a short-lived thread: the engine's process dies with the thread that started it.
        llm = await asyncio.to_thread(_load, settings, folder, stats)
        model = Model(
            id=settings.name or folder.resolve().name,
            hash=await hashing,
            dtype=str(llm.model_config.dtype).removeprefix("torch."),
            context_length=llm.model_config.max_model_len,
        )
        log.info("%s is loaded in %s", model.id, model.dtype)
        return cls(llm, stats, model)

    def renderer(self) -> Renderer:
        """Return the renderer of the model's prompts."""
        return Renderer(self._llm.renderer.get_tokenizer())

    async def until_dead(self) -> None:
        """Return when the engine can no longer work. Only a new process helps then."""
        while not self._llm.errored:
            await asyncio.sleep(POLL_SECONDS)
        log.error("the engine died")

    def close(self) -> None:
        """End the engine's process."""
        self._llm.shutdown(timeout=CLOSE_SECONDS)

    def load(self) -> Load:
        # The engine reports by its steps, and an idle one makes none: its last word may be old.
        known = self._llm.get_num_unfinished_requests()
        if not self._stats:
            return Load(running=known)
        running = min(known, self._stats[0].num_running_reqs)
        return Load(running, known - running, self._stats[0].kv_cache_usage)

    async def generate(
        self, prompt: list[int], how: Sampling, salt: str, lora: Lora | None = None
    ) -> AsyncGenerator[Piece, None]:
        from vllm.inputs.engine import tokens_input

        outputs = self._llm.generate(
            tokens_input(prompt, cache_salt=salt),
            self._params(how),
            uuid.uuid4().hex,
            lora_request=_request(lora) if lora else None,
            priority=int(how.batch),
        )
        with _translated(bool(how.json_schema)):
            async with aclosing(outputs):
                async for output in outputs:
                    (written,) = output.outputs
                    yield Piece(
                        written.text,
                        len(written.token_ids),
                        output.num_cached_tokens or 0,
                        _finish(written.finish_reason, output.metrics),
                    )

    async def score(
        self, prompt: list[int], continuation: list[int], salt: str, lora: Lora | None = None
    ) -> list[float]:
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        params = SamplingParams(
            max_tokens=1,
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        ids = [*prompt, *continuation]
        outputs = self._llm.generate(
            tokens_input(ids, cache_salt=salt),
            params,
            uuid.uuid4().hex,
            lora_request=_request(lora) if lora else None,
            priority=1,
        )
        with _translated():
            async with aclosing(outputs):
                async for output in outputs:
                    _finish(output.outputs[0].finish_reason, output.metrics)
                    scores: Any = output.prompt_logprobs  # {token id: Logprob} of each place
                    places = enumerate(continuation, start=len(prompt))
                    return [float(scores[i][token].logprob) for i, token in places]
        raise RuntimeError("the engine ended without a score")

    async def load_lora(self, lora: Lora) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        with _translated():
            try:
                await self._done(self._llm.add_lora(_request(lora)))
            except EngineDeadError:
                raise
            except Exception as error:  # all that comes out of the engine's process is its text
                log.warning("an adapter could not be loaded: %s", error)
                await self._done(self._llm.remove_lora(lora.number))  # the half of it
                raise NotReady(
                    "ADAPTER_INCOMPATIBLE", "the adapter's weights do not fit the model"
                ) from error

    async def unload_lora(self, lora: Lora) -> None:
        with _translated():
            await self._done(self._llm.remove_lora(lora.number))

    async def _done(self, call: Coroutine[Any, Any, bool]) -> None:
        """Wait until the engine did something. One that dies meanwhile does not say so itself."""
        from vllm.v1.engine.exceptions import EngineDeadError

        doing = asyncio.create_task(call)
        while not doing.done():
            await asyncio.wait([doing], timeout=POLL_SECONDS)
            if self._llm.errored:
                doing.cancel()
                raise EngineDeadError
        await doing

    def _params(self, how: Sampling) -> "SamplingParams":
        from vllm.sampling_params import (
            RequestOutputKind,
            SamplingParams,
            StructuredOutputsParams,
        )

        # A lone reader gets every token when it comes. The busier the engine, the longer a step
        # takes anyway, and the more the work per message weighs.
        others = self._llm.get_num_unfinished_requests()
        return SamplingParams(
            max_tokens=how.max_tokens,
            min_tokens=how.min_tokens,
            temperature=how.temperature,
            seed=how.seed,
            stop=list(how.stop),
            structured_outputs=(
                StructuredOutputsParams(json=how.json_schema) if how.json_schema else None
            ),
            output_kind=RequestOutputKind.DELTA,
            stream_interval=1 if how.every_token else min(TOGETHER, 1 + others),
        )


def _load(settings: Settings, folder: Path, stats: "list[SchedulerStats]") -> "AsyncLLM":
    processor = this_processor()
    how = executor(processor, settings.executor)
    os.environ.update(environment(processor, how, settings.threads, settings.cache_gib))
    os.environ["TWOROADS_GENERATION_LOG_LEVEL"] = settings.log_level

    from vllm.config import StructuredOutputsConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import StatLoggerBase

    class LatestStats(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None: ...

        def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
            if scheduler_stats is not None:
                stats[:] = [scheduler_stats]

        def log_engine_initialized(self) -> None: ...

    plugin.quiet()
    by_processor: dict[str, Any] = (
        {"gpu_memory_utilization": settings.gpu_memory}
        if processor.gpu
        else {"block_size": BLOCK, "enforce_eager": True}
    )
    arguments = AsyncEngineArgs(
        model=str(folder),
        served_model_name=settings.name or folder.resolve().name,
        dtype=processor.dtype(settings.dtype),
        distributed_executor_backend=how,
        max_model_len=checkpoint.context_length(folder, settings.context_length),
        max_num_seqs=settings.max_sequences,
        enable_prefix_caching=True,
        enable_lora=True,
        max_loras=settings.max_loras,
        max_lora_rank=settings.max_lora_rank,
        max_cpu_loras=settings.max_adapters,
        scheduling_policy="priority",
        # Small models fill the room that a schema leaves with white space, for ever.
        structured_outputs_config=StructuredOutputsConfig(
            backend="xgrammar", disable_any_whitespace=True
        ),
        trust_remote_code=False,
        **by_processor,
    )
    return AsyncLLM.from_engine_args(arguments, stat_loggers=[LatestStats])


def _request(lora: Lora) -> "LoRARequest":
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora.name, lora.number, str(lora.folder))


def _finish(reason: str | None, metrics: Any) -> Finish | None:
    if reason is None:
        return None
    if reason == "abort":
        raise Stopping("STOPPING", "this replica is stopping; try again")
    if reason not in ("stop", "length"):
        raise RuntimeError(f"the engine ended a request with {reason!r}")
    return Finish(
        "stop" if reason == "stop" else "length",
        metrics.scheduled_ts,
        metrics.first_token_ts,
        metrics.last_token_ts,
    )


@contextmanager
def _translated(with_schema: bool = False) -> Iterator[None]:
    """Turn vLLM's exceptions into ours."""
    from vllm.exceptions import GracefulHTTPError, VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise Unavailable("ENGINE_DEAD", "the engine died; the service restarts") from error
    except GracefulHTTPError as error:  # its queue is full
        raise Overloaded("QUEUE_FULL", "the engine is busy; try again later") from error
    except VLLMClientError as error:
        if not with_schema:
            raise
        raise InvalidInput("JSON_SCHEMA_INVALID", "the JSON schema is not supported") from error
