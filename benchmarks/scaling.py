"""Replicas behind a gateway: speed of one, two, three; gaps between tokens; where it breaks.

    python -m benchmarks.scaling [--rounds 3] [--seconds 8]

The replicas are `tests.replica`: the generation service with an engine that writes at a fixed speed
however fast the machine is, so that what is measured is what stands in front of engines. A name
server in this process names them, a gateway in one of its own finds them, this process calls.

Speed: each replica writes 16 texts at once, a token in 20 ms, 800 tokens/s. Twice as many callers
as that ask one question after the other, for 32 to 96 tokens. That is far below what two cores can
pass on, and round robin leaves no replica without work.

Balance: 300 texts of 8 to 512 tokens, most of them short, at once; the tokens that each replica has
written, and the greatest share to the mean.

Gaps: streams that begin together, three replicas without limits. The time between two messages of
one stream, 99th percentile, by Generate and by Answer in turn: as the gateway asks (up to 8 tokens
a message when the engine has others to serve) and with every token by itself. It breaks where the
texts take so long to come that their pace is below 90 % of the engine's, where one of a hundred
waits over a second for its first text, or where the gap by the gateway is over three times the
direct one; the streams are doubled up to there.
"""

import argparse
import asyncio
import os
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import mean, median

import grpc
from tworoads.v1 import answer_pb2, generation_pb2
from tworoads.v1.answer_pb2_grpc import AnswerServiceStub
from tworoads.v1.generation_pb2_grpc import GenerationServiceStub
from tworoads.v1.retrieval_pb2 import PATH_BASE

from benchmarks.generation import messages
from benchmarks.ratios import ratios, spread
from benchmarks.stack import leashed
from clients.client import ANSWERS
from clients.stack import free_addresses
from services.prompts.words import conversation
from services.runtime.channel import connect
from tests.dns_server import dns_server
from tests.replica import GENERATION, replicas

HOSTS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
TOKEN_MS = 20
CAPACITY = 16
CALLERS = 2 * CAPACITY  # a replica
MANY = 4096  # calls at once: no limit here
STREAMS = 100
MOST_STREAMS = 1600
STREAM_TOKENS = 150
GAP_GOAL, LINEAR_GOAL = 3.0, 0.95
PACE, FIRST_SECONDS = 0.9, 1.0
SECONDS = 120  # of one call, at most
QUESTION = "How far is it?"

Texts = AsyncIterator[str]


@dataclass
class Stack:
    """A gateway and what is behind it."""

    answers: AnswerServiceStub
    generation: GenerationServiceStub

    async def by_gateway(self, tokens: int, every_token: bool = False) -> Texts:
        options = answer_pb2.AnswerOptions(
            generate=generation_pb2.GenerateOptions(max_tokens=tokens), every_token=every_token
        )
        request = answer_pb2.AnswerRequest(question=QUESTION, path=PATH_BASE, options=options)
        async for event in self.answers.Answer(request, timeout=SECONDS):
            if event.text:
                yield event.text

    async def directly(self, tokens: int, every_token: bool = False) -> Texts:
        request = generation_pb2.GenerateRequest(
            messages=messages(conversation(QUESTION)),
            options=generation_pb2.GenerateOptions(max_tokens=tokens),
            every_token=every_token,
        )
        async for response in self.generation.Generate(request, timeout=SECONDS):
            yield response.text


@asynccontextmanager
async def scaled(count: int, capacity: int) -> AsyncIterator[Stack]:
    """Run so many replicas, and a gateway that finds them by name."""
    (address,) = free_addresses(1)
    limits = (f"--max-running={MANY}", "--log-level=ERROR")
    engine = (f"--token-ms={TOKEN_MS}", f"--capacity={capacity}", *limits)
    async with AsyncExitStack() as stack:
        (one, *_) = await stack.enter_async_context(replicas(*HOSTS[:count], settings=engine))
        dns = await stack.enter_async_context(dns_server(*HOSTS[:count]))
        target = dns.target(one.port)
        flags = (f"--listen={address}", f"--generation={target}", *limits)
        gateway = await asyncio.create_subprocess_exec(*leashed("services.gateway", *flags))
        stack.callback(gateway.kill)
        running = Stack(
            AnswerServiceStub(await stack.enter_async_context(connect(address, ANSWERS))),
            GenerationServiceStub(await stack.enter_async_context(connect(target, GENERATION))),
        )
        await answering(running)
        yield running


async def answering(stack: Stack) -> None:
    """Return when gateway and replicas answer."""
    async with asyncio.timeout(SECONDS):
        while True:
            try:
                for texts in (stack.by_gateway(1), stack.directly(1)):
                    async for _ in texts:
                        pass
                return
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.1)


async def rate(count: int, seconds: float) -> float:
    """Return the tokens per second of so many replicas by the gateway."""
    written = 0

    async def caller(number: int) -> None:
        nonlocal written
        chance = random.Random(number)
        while True:
            async for text in stack.by_gateway(chance.randint(32, 96)):
                written += len(text.split())

    async with scaled(count, CAPACITY) as stack:
        callers = [asyncio.create_task(caller(i)) for i in range(CALLERS * count)]
        await asyncio.sleep(2)  # all of them work, and not in step
        before, start = written, time.perf_counter()
        await asyncio.sleep(seconds)
        measured = (written - before) / (time.perf_counter() - start)
        for each in callers:
            each.cancel()
        for result in await asyncio.gather(*callers, return_exceptions=True):
            if not isinstance(result, asyncio.CancelledError):
                sys.exit(f"a caller failed: {result!r}")
    return measured


async def speed(rounds: int, seconds: float) -> None:
    ideal = CAPACITY * 1e3 / TOKEN_MS
    print(f"tokens/s by the gateway, {rounds} rounds of {seconds:g} s; median (least to most)")
    rates = {count: [await rate(count, seconds) for _ in range(rounds)] for count in (1, 2, 3)}
    for count, measured in rates.items():
        alone = [count * one for one in rates[1]]
        print(f"  {count} of {ideal:.0f} tokens/s  {spread(measured, 0):22}", end="")
        if count > 1:
            print(f"   : linear {spread(ratios(measured, alone))}   goal >= {LINEAR_GOAL}", end="")
        print()


async def balance() -> None:
    chance = random.Random(1)
    lengths = [min(512, int(chance.lognormvariate(4, 1)) + 8) for _ in range(300)]
    tokens: Counter[str] = Counter()

    async def one(length: int) -> None:
        text = "".join([piece async for piece in stack.by_gateway(length)])
        tokens[text.split()[0]] += len(text.split())

    async with scaled(3, MANY) as stack:
        await asyncio.gather(*map(one, lengths))
    greatest = max(tokens.values()) / mean(tokens.values())
    print(
        f"balance, {len(lengths)} uneven texts: {sorted(tokens.values())} tokens by replica,",
        end="",
    )
    print(f" the greatest : mean {greatest:.2f}")


@dataclass
class Passed:
    """What came of streams that began together: seconds between messages, and to the first; and of
    each stream the time that its engine took over the time that it took to come, from its first
    message on."""

    gaps: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    paces: list[float] = field(default_factory=list)

    @property
    def gap(self) -> float:
        return _percentile(self.gaps)

    @property
    def first(self) -> float:
        return _percentile(self.firsts)

    @property
    def pace(self) -> float:
        return mean(self.paces)


async def streamed(ask: Callable[[int, bool], Texts], streams: int, every_token: bool) -> Passed:
    """Have so many streams of three seconds begin at once; return what came."""
    passed = Passed()
    start = time.perf_counter()

    async def one() -> None:
        came = []
        async for _ in ask(STREAM_TOKENS, every_token):
            came.append(time.perf_counter())
        passed.firsts.append(came[0] - start)
        passed.gaps += [later - earlier for earlier, later in pairwise(came)]
        passed.paces.append((STREAM_TOKENS - 1) * TOKEN_MS / 1e3 / (came[-1] - came[0]))

    await asyncio.gather(*(one() for _ in range(streams)))
    return passed


async def gaps(rounds: int) -> None:
    async with scaled(3, MANY) as stack:
        for every_token in (False, True):
            how = "every token by itself" if every_token else "as the gateway asks"
            print(f"gaps, {how}; 99th percentile in ms, median (least to most) of {rounds} rounds")
            streams = STREAMS // 4
            while streams <= MOST_STREAMS:
                direct, gateway = [], []
                for _ in range(rounds):
                    direct.append(await streamed(stack.directly, streams, every_token))
                    gateway.append(await streamed(stack.by_gateway, streams, every_token))
                more = ratios([each.gap for each in gateway], [each.gap for each in direct])
                goal = f"goal <= {GAP_GOAL:g}" if streams == STREAMS else ""
                print(f"  {streams:4} streams, gateway : directly {spread(more):20} {goal}")
                for name, measured in (("directly", direct), ("gateway", gateway)):
                    print(f"       {name:8}", end="")
                    print(f"  gap {spread([each.gap * 1e3 for each in measured], 0):18}", end="")
                    print(
                        f"  first {spread([each.first * 1e3 for each in measured], 0):20}", end=""
                    )
                    print(f"  pace {spread([each.pace for each in measured])}", flush=True)
                pace = median(each.pace for each in gateway)
                first = median(each.first for each in gateway)
                if median(more) > GAP_GOAL or pace < PACE or first > FIRST_SECONDS:
                    print(f"  it breaks at {streams} streams")
                    break
                streams *= 2


def _ms(seconds: list[float]) -> str:
    return spread([each * 1e3 for each in seconds], 0)


def _percentile(values: list[float]) -> float:
    return sorted(values)[round(0.99 * (len(values) - 1))]


async def measure(options: argparse.Namespace) -> None:
    await speed(options.rounds, options.seconds)
    await balance()
    await gaps(options.rounds)
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8)
    asyncio.run(measure(parser.parse_args()))
