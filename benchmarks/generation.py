"""Tokens per second of the generation service and of the gateway, against vLLM in process.

    python -m benchmarks.generation [--rounds 5] [--tokens 48]

The same questions by the same prompt at 1, 8 and 16 streams: by AsyncLLM in a process of its own
with the settings of the service (one engine idles while the other works), by Generate, and by
Answer on the BASE path of a running stack. Each answer is as long as it may be. A ratio is taken
within a round.
"""

import argparse
import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from tworoads.v1 import answer_pb2, generation_pb2
from tworoads.v1.answer_pb2_grpc import AnswerServiceStub
from tworoads.v1.generation_pb2_grpc import GenerationServiceStub
from tworoads.v1.retrieval_pb2 import PATH_BASE

from benchmarks.offline_engine import Written, offline_engine
from benchmarks.ratios import ratios, spread
from benchmarks.stack import environment, running_stack
from clients.client import ANSWERS
from services.prompts.words import Message, conversation
from services.runtime.channel import connect

GENERATION = "tworoads.v1.GenerationService"
SECONDS = 300  # of one call, at most
STREAMS = (1, 8, 16)
GOALS = {"gRPC": 0.97, "gateway": 0.95}
THINGS = (
    "animals birds rivers cities plants tools colours trades foods songs games books mountains"
    " sports fabrics metals"
).split()
ROLES = {
    "system": generation_pb2.ROLE_SYSTEM,
    "user": generation_pb2.ROLE_USER,
    "assistant": generation_pb2.ROLE_ASSISTANT,
}


def questions(count: int) -> list[str]:
    """Return questions, the same ones each time, that take long to answer."""
    return [f"Write a numbered list of one hundred {thing}, one per line." for thing in THINGS][
        :count
    ]


def messages(turns: list[Message]) -> list[generation_pb2.Message]:
    """Return the turns as Generate takes them."""
    return [
        generation_pb2.Message(
            role=ROLES[turn.role],
            parts=[generation_pb2.Part(text=part.text) for part in turn.parts],
        )
        for turn in turns
    ]


async def by_service(
    stub: GenerationServiceStub, question: str, options: generation_pb2.GenerateOptions
) -> int:
    """Return how many tokens Generate wrote."""
    request = generation_pb2.GenerateRequest(
        messages=messages(conversation(question)), options=options
    )
    tokens = 0
    async for response in stub.Generate(request, timeout=SECONDS):
        tokens += response.finish.tokens
    return tokens


async def by_gateway(
    stub: AnswerServiceStub, question: str, options: answer_pb2.AnswerOptions
) -> int:
    """Return how many tokens Answer wrote."""
    request = answer_pb2.AnswerRequest(question=question, path=PATH_BASE, options=options)
    tokens = 0
    async for response in stub.Answer(request, timeout=SECONDS):
        tokens += response.finished.output_tokens
    return tokens


async def timed(streams: list[Awaitable[int]]) -> Written:
    """Wait for all streams, started at once."""
    start = time.perf_counter()
    tokens = sum(await asyncio.gather(*streams))
    return Written(tokens, time.perf_counter() - start)


async def measure(rounds: int, tokens: int) -> None:
    services = running_stack()
    options = generation_pb2.GenerateOptions(max_tokens=tokens)
    answer_options = answer_pb2.AnswerOptions(generate=options)
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(
            offline_engine(environment(services["generation"]))
        )
        to_service = connect(services["generation"].address, GENERATION)
        to_gateway = connect(services["gateway"].address, ANSWERS)
        service = GenerationServiceStub(await stack.enter_async_context(to_service))
        gateway = AnswerServiceStub(await stack.enter_async_context(to_gateway))
        parties: dict[str, Callable[[list[str]], Awaitable[Written]]] = {
            "in process": lambda asked: engine.write(asked, tokens),
            "gRPC": lambda asked: timed([by_service(service, q, options) for q in asked]),
            "gateway": lambda asked: timed([by_gateway(gateway, q, answer_options) for q in asked]),
        }
        for (
            party
        ) in parties.values():  # the prompts' beginnings are in the prefix cache from here on
            await party(questions(max(STREAMS)))
        print(f"tokens/s, {tokens} tokens each, {rounds} rounds; median (least to most)")
        for streams in STREAMS:
            rates: dict[str, list[float]] = {name: [] for name in parties}
            for _ in range(rounds):
                for name, party in parties.items():
                    written = await party(questions(streams))
                    if written.tokens != streams * tokens:
                        print(f"{name}: {written.tokens} tokens instead of {streams * tokens}")
                    rates[name].append(written.rate)
            for name, values in rates.items():
                line = f"{streams:2} streams  {name:10} {spread(values, 1):26}"
                if name in GOALS:
                    compared = spread(ratios(values, rates["in process"]))
                    line += f" : in process {compared}   goal >= {GOALS[name]}"
                print(line)
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    chosen = parser.parse_args()
    asyncio.run(measure(chosen.rounds, chosen.tokens))
