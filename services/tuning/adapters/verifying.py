"""Measures an adapter on a generation replica: whether it does there what it did in training, and
what it costs in speed."""

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TypeVar

import grpc
from tworoads.v1 import generation_pb2 as pb
from tworoads.v1.generation_pb2_grpc import GenerationServiceStub

from services.prompts.words import Message, Role
from services.runtime import call
from services.runtime.errors import Overloaded, ServiceError, TooLate, Unavailable, from_rpc
from services.tuning.job import Adapter, AdapterState, Fidelity, Probe, Speed

LEAST_PROBES = 16
# Measured on SmolLM2 135M with 32 answers. Rounding: bfloat16 against float32 differs by 0.02 nats
# per token once the answers are learnt, by 0.04 to 0.09 where they are unlikely (3 nats per token),
# and two ways to compute attention in bfloat16 by 0.05 there. Mistakes: half the scale (alpha) is
# 0.2 to 0.3, an adapter that is not applied 0.4 to 2. One target left out is 0.02 to 0.05, which
# no bound can tell from rounding.
BOUND = 0.15
# A token that neither would write says nothing about what is served, however far they are apart.
FLOOR = -10.0

STREAMS = (1, 8)
ROUNDS = 2
TOKENS = 32
SECONDS = 300.0  # the most that generation gives one call
FIRST_PAUSE = 0.2
LONGEST_PAUSE = 5.0
FULL = ("ADAPTERS_FULL", "STORE_FULL")  # here a person has to make room

ROLES: dict[Role, pb.Role.ValueType] = {
    "system": pb.ROLE_SYSTEM,
    "user": pb.ROLE_USER,
    "assistant": pb.ROLE_ASSISTANT,
}

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Measured:
    """What became of a measurement; `reason` and `message` say why it is not READY."""

    state: AdapterState
    reason: str = ""
    message: str = ""
    fidelity: Fidelity | None = None
    speeds: tuple[Speed, ...] = ()


def measurable(probes: Sequence[Probe]) -> list[Probe]:
    """Return the probes of which the trainer's log-probabilities are known."""
    return [probe for probe in probes if probe.tokens]


class Verifier:
    """Asks `generation`. One that is away is asked again for `patience` seconds."""

    def __init__(self, generation: GenerationServiceStub, patience: float = 60.0) -> None:
        self._generation = generation
        self._patience = patience

    async def measure(self, adapter: Adapter, probes: Sequence[Probe]) -> Measured:
        """Compare the adapter's answers with the trainer's and the base's, then measure its speed.

        Log-probabilities below FLOOR count as FLOOR.
        Whatever hinders the measurement makes it UNMEASURED; nothing is raised for it.
        """
        known = measurable(probes)
        if len(known) < LEAST_PROBES:
            return Measured(
                "unmeasured",
                "TOO_FEW_PROBES",
                f"{len(known)} answers have the trainer's scores; measuring takes {LEAST_PROBES}",
            )
        before = call.current.set(call.Call(uuid.uuid4().hex, adapter.tenant))
        try:
            found = await self._fidelity(adapter.id, known)
            if isinstance(found, Measured):
                return found
            try:
                speeds = await self._speeds(adapter.id, known)
            except ServiceError as error:  # what was found stays true
                log.warning("the speed of %s could not be measured: %s", adapter.id, error)
                speeds = ()
            return _judged(found, speeds)
        except (Unavailable, Overloaded, TooLate) as error:
            reason = error.reason if error.reason in FULL else "GENERATION_UNAVAILABLE"
            return Measured("unmeasured", reason, str(error))
        except ServiceError as error:
            changed = error.reason == "ADAPTER_INCOMPATIBLE"
            reason = "BASE_MODEL_CHANGED" if changed else error.reason
            return Measured("unmeasured", reason, str(error))
        finally:
            call.current.reset(before)

    async def _fidelity(self, adapter: str, probes: Sequence[Probe]) -> Fidelity | Measured:
        to_trainer: list[list[float]] = []
        to_base: list[float] = []
        for probe in probes:
            scored = await self._score(probe, adapter)
            same_prompt = probe.prompt_hash in ("", scored.prompt_hash)
            if not same_prompt or [t.id for t in scored.tokens] != [t.id for t in probe.tokens]:
                what = "answer" if same_prompt else "prompt"
                return Measured(
                    "unfaithful",
                    "RENDERING_MISMATCH",
                    f"generation and the trainer turn the same {what} into different tokens",
                )
            base = await self._score(probe, "")
            trainer = [t.log_probability for t in probe.tokens]
            with_adapter = [t.log_probability for t in scored.tokens]
            to_trainer.append(_differences(with_adapter, trainer))
            to_base += _differences(with_adapter, [t.log_probability for t in base.tokens])
        return Fidelity(
            probes=len(probes),
            tokens=len(to_base),
            trainer_difference=fmean(d for answer in to_trainer for d in answer),
            trainer_difference_max=max(map(fmean, to_trainer)),
            bound=BOUND,
            base_difference=fmean(to_base),
        )

    async def _score(self, probe: Probe, adapter: str) -> pb.ScoreResponse:
        request = pb.ScoreRequest(
            messages=_messages(probe.messages), continuation=probe.continuation, adapter=adapter
        )
        return await self._patiently(
            lambda: self._generation.Score(request, **call.outgoing(SECONDS))
        )

    async def _speeds(self, adapter: str, probes: Sequence[Probe]) -> tuple[Speed, ...]:
        """Measure in turn, so that what else the machine does hits both alike."""
        by_length = sorted(probes, key=_length)  # it is the writing that is measured
        speeds: list[Speed] = []
        for streams in STREAMS:
            prompts = [_messages(probe.messages) for probe in by_length[:streams]]
            tokens, seconds = {adapter: 0, "": 0}, {adapter: 0.0, "": 0.0}
            for number in range(1 + ROUNDS):
                for name in tokens:
                    wrote, took = await self._patiently(partial(self._write, prompts, name))
                    if number > 0:  # the first is to warm up
                        tokens[name] += wrote
                        seconds[name] += took
            speeds.append(Speed(streams, *(tokens[name] / seconds[name] for name in tokens)))
        return tuple(speeds)

    async def _write(self, prompts: list[list[pb.Message]], adapter: str) -> tuple[int, float]:
        """Continue all prompts at once; return the tokens written and the seconds that it took."""
        started = time.monotonic()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._continue(p, adapter)) for p in prompts]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return sum(task.result() for task in tasks), time.monotonic() - started

    async def _continue(self, prompt: list[pb.Message], adapter: str) -> int:
        request = pb.GenerateRequest(
            messages=prompt,
            adapter=adapter,
            options=pb.GenerateOptions(
                max_tokens=TOKENS, min_tokens=TOKENS, priority=pb.PRIORITY_BATCH
            ),
            measuring=True,
        )
        tokens = 0
        async for response in self._generation.Generate(request, **call.outgoing(SECONDS)):
            tokens = response.finish.tokens
        return tokens

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask until there is an answer. Raises ServiceError."""
        end = time.monotonic() + self._patience
        pause = FIRST_PAUSE
        while True:
            try:
                return await ask()
            except grpc.aio.AioRpcError as failed:
                error = from_rpc(failed, "generation")
                if not isinstance(error, ServiceError):  # a bug there: no use in asking again
                    log.error("generation failed while an adapter was measured: %s", error)
                    raise Unavailable("GENERATION_UNAVAILABLE", "generation failed") from failed
                may_pass = isinstance(error, Unavailable | Overloaded | TooLate)
                if not may_pass or time.monotonic() + pause > end:
                    raise error from failed
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


def _judged(fidelity: Fidelity, speeds: tuple[Speed, ...]) -> Measured:
    if fidelity.trainer_difference <= BOUND:
        return Measured("ready", fidelity=fidelity, speeds=speeds)
    return Measured(
        "unfaithful",
        "LOG_PROBABILITIES_DIFFER",
        f"generation and the trainer differ by {fidelity.trainer_difference:.3f} nats per token,"
        f" more than {BOUND}",
        fidelity,
        speeds,
    )


def _differences(mine: Sequence[float], others: Sequence[float]) -> list[float]:
    return [abs(max(FLOOR, a) - max(FLOOR, b)) for a, b in zip(mine, others, strict=True)]


def _length(probe: Probe) -> int:
    return sum(len(part.text) for message in probe.messages for part in message.parts)


def _messages(messages: Sequence[Message]) -> list[pb.Message]:
    return [
        pb.Message(
            role=ROLES[message.role],
            parts=[pb.Part(text=p.text, id=p.id, droppable=p.droppable) for p in message.parts],
        )
        for message in messages
    ]
