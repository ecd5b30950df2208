"""What the gateway adds to the first token of a RAG answer, and to the work on every token.

    python -m benchmarks.gateway [--questions 20] [--rounds 5] [--tokens 128]

First token: each question is new, about another document, and is asked three times: directly, by
Search (which embeds the question) and then Generate with the same prompt in a cache of its own; by
Answer on the RAG path; and by Answer again with other last words after the same passages, so that
its beginning is in the prefix cache. The first two take turns to be first.

Work: CPU time per token of the processes in front of the engine, of the gateway and the generation
service together, token by token and coalesced, against vLLM's own OpenAI server with the same
engine. 16 streams ask one question after the other, for answers of 0.5 to 1.5 times --tokens, the
same for each party. The engine's processes and the client's are not counted.
"""

import argparse
import asyncio
import json
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

import aiohttp
from tworoads.v1 import answer_pb2, generation_pb2, retrieval_pb2
from tworoads.v1.answer_pb2_grpc import AnswerServiceStub
from tworoads.v1.generation_pb2_grpc import GenerationServiceStub
from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub

from benchmarks import texts
from benchmarks.generation import GENERATION, SECONDS, by_gateway, messages, questions, timed
from benchmarks.openai_server import MODEL, openai_server
from benchmarks.ratios import ratios, spread
from benchmarks.stack import cpu_seconds, environment, process, running_stack
from clients.client import ANSWERS, RETRIEVAL, Client
from clients.local import ServiceState
from clients.stack import free_addresses
from services.prompts.words import Shown, conversation
from services.runtime.call import TENANT
from services.runtime.channel import connect

AnswerBy = Callable[[str, int], Awaitable[int]]  # question and tokens at most to tokens written

LIMIT = 5  # passages
STREAMS = 16
ANSWERS_EACH = 3
FIRST = generation_pb2.GenerateOptions(max_tokens=2)
APART = ((TENANT, "benchmark"),)  # generation's cache of one tenant is not that of another


@dataclass(frozen=True)
class First:
    """When the first text came, in seconds, and what the prompt was."""

    seconds: float
    tokens: int
    cached: int
    passages: tuple[str, ...]


class Asking:
    """Asks for a first token in either way."""

    def __init__(
        self,
        corpus: str,
        answers: AnswerServiceStub,
        retrieval: RetrievalServiceStub,
        generation: GenerationServiceStub,
    ) -> None:
        self._corpus = corpus
        self._answers = answers
        self._retrieval = retrieval
        self._generation = generation

    async def directly(self, question: str) -> First:
        start = time.perf_counter()
        found = await self._retrieval.Search(
            retrieval_pb2.SearchRequest(corpus=self._corpus, query=question, limit=LIMIT)
        )
        shown = [Shown(passage.id, passage.title, passage.text) for passage in found.passages]
        request = generation_pb2.GenerateRequest(
            messages=messages(conversation(question, shown)), options=FIRST
        )
        seconds, prompt = 0.0, generation_pb2.PromptInfo()
        async for response in self._generation.Generate(request, metadata=APART, timeout=SECONDS):
            if response.HasField("prompt"):
                seconds, prompt = time.perf_counter() - start, response.prompt
        passages = tuple(passage.id for passage in found.passages)
        return First(seconds, prompt.tokens, prompt.cached_tokens, passages)

    async def by_gateway(self, question: str) -> First:
        request = answer_pb2.AnswerRequest(
            question=question,
            corpus=self._corpus,
            path=retrieval_pb2.PATH_RAG,
            options=answer_pb2.AnswerOptions(limit=LIMIT, generate=FIRST),
        )
        start = time.perf_counter()
        seconds, passages = 0.0, tuple[str, ...]()
        finished = answer_pb2.AnswerFinished()
        async for response in self._answers.Answer(request, timeout=SECONDS):
            if response.text and not seconds:
                seconds = time.perf_counter() - start
            passages = tuple(passage.id for passage in response.passages.passages) or passages
            if response.HasField("finished"):
                finished = response.finished
        return First(seconds, finished.input_tokens, finished.cached_tokens, passages)


async def first_tokens(services: dict[str, ServiceState], count: int) -> None:
    places = texts.places(count + 1)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(Client(services["gateway"].address))
        corpus = await stack.enter_async_context(texts.ingested(client, texts.about(places)))
        channels = [
            await stack.enter_async_context(connect(services[name].address, service))
            for name, service in (
                ("gateway", ANSWERS),
                ("retrieval", RETRIEVAL),
                ("generation", GENERATION),
            )
        ]
        asking = Asking(
            corpus,
            AnswerServiceStub(channels[0]),
            RetrievalServiceStub(channels[1]),
            GenerationServiceStub(channels[2]),
        )
        rows: list[tuple[First, First, First]] = []
        for index, place in enumerate(places):
            question = f"What is the harbour of {place} known for?"
            if index % 2:
                direct = await asking.directly(question)
                cold = await asking.by_gateway(question)
            else:
                cold = await asking.by_gateway(question)
                direct = await asking.directly(question)
            again = await asking.by_gateway(question + " Please.")
            if (direct.tokens, direct.cached) != (cold.tokens, cold.cached):
                raise RuntimeError(f"the prompts differ: {direct} {cold}")
            if index and again.passages == cold.passages:  # the first one warms up
                rows.append((direct, cold, again))
    direct_s, cold_s, again_s = ([row[i].seconds for row in rows] for i in range(3))
    tokens = [row[1].tokens for row in rows]
    print(
        f"first token of a RAG answer, {len(rows)} questions, prompts of {min(tokens)} to", end=" "
    )
    print(f"{max(tokens)} tokens; median (least to most)")
    print(f"  embed + search + generate, directly  {_ms(direct_s)} ms")
    print(f"  gateway                              {_ms(cold_s)} ms", end="")
    print(f"   : directly {spread(ratios(cold_s, direct_s))}   goal <= 1.10")
    cached = spread([row[2].cached / row[2].tokens for row in rows])
    print(f"  gateway, {cached} of it cached  {_ms(again_s)} ms", end="")
    print(f"   : cold {spread(ratios(again_s, cold_s))}   goal <= 0.3")


async def work_per_token(services: dict[str, ServiceState], rounds: int, tokens: int) -> None:
    address = free_addresses(1)[0]
    ours = (process(services["gateway"]), process(services["generation"]))
    async with (
        openai_server(environment(services["generation"]), address) as theirs,
        aiohttp.ClientSession(f"http://{address}") as session,
        connect(services["gateway"].address, ANSWERS) as channel,
    ):
        stub = AnswerServiceStub(channel)

        def gateway(every_token: bool) -> AnswerBy:
            def answer(question: str, count: int) -> Awaitable[int]:
                generate = generation_pb2.GenerateOptions(max_tokens=count)
                options = answer_pb2.AnswerOptions(generate=generate, every_token=every_token)
                return by_gateway(stub, question, options)

            return answer

        parties: dict[str, tuple[tuple[int, ...], AnswerBy]] = {
            "OpenAI server": ((theirs.pid,), partial(by_openai, session)),
            "every token": (ours, gateway(every_token=True)),
            "coalesced": (ours, gateway(every_token=False)),
        }
        costs: dict[str, list[float]] = {name: [] for name in parties}
        rates: dict[str, list[float]] = {name: [] for name in parties}
        for round_ in range(rounds + 1):
            for name, (pids, answer) in parties.items():
                before = cpu_seconds(*pids)
                written = await timed([stream(i, answer, tokens) for i in range(STREAMS)])
                if round_:  # the first one warms up
                    costs[name].append((cpu_seconds(*pids) - before) / written.tokens * 1e6)
                    rates[name].append(written.rate)
    print(f"CPU in front of the engine, {STREAMS} streams, {rounds} rounds; median (least to most)")
    for name, goal in (("OpenAI server", ""), ("every token", "1.35"), ("coalesced", "0.8")):
        print(f"  {name:13}  {spread(costs[name], 0):20} us/token", end="")
        print(f"  {spread(rates[name], 1):22} tokens/s", end="")
        if goal:
            compared = spread(ratios(costs[name], costs["OpenAI server"]))
            print(f"   CPU : OpenAI server {compared}   goal <= {goal}", end="")
        print()


async def stream(number: int, answer: AnswerBy, tokens: int) -> int:
    """Ask one question after the other; return how many tokens were written."""
    chance = random.Random(number)
    lengths = [chance.randint(tokens // 2, tokens * 3 // 2) for _ in range(ANSWERS_EACH)]
    return sum([await answer(questions(STREAMS)[number], length) for length in lengths])


async def by_openai(session: aiohttp.ClientSession, question: str, tokens: int) -> int:
    """Return how many tokens vLLM's server wrote."""
    body = {
        "model": MODEL,
        "messages": [
            {"role": turn.role, "content": "".join(part.text for part in turn.parts)}
            for turn in conversation(question)
        ],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    timeout = aiohttp.ClientTimeout(SECONDS)
    async with session.post("/v1/chat/completions", json=body, timeout=timeout) as response:
        response.raise_for_status()
        return [int(usage["completion_tokens"]) async for usage in _usages(response)][-1]


async def _usages(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, int]]:
    async for line in response.content:
        if line.startswith(b"data: {"):
            usage = json.loads(line[len("data: ") :]).get("usage")
            if usage:
                yield usage


def _ms(seconds: list[float]) -> str:
    return spread([value * 1e3 for value in seconds], 0)


async def measure(options: argparse.Namespace) -> None:
    services = running_stack()
    await first_tokens(services, options.questions)
    await work_per_token(services, options.rounds, options.tokens)
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    asyncio.run(measure(parser.parse_args()))
