"""What a comparison costs beside its answers: its time over that of asking them directly.

    python -m benchmarks.comparison QUESTIONS --corpus CORPUS [--adapter NAME] [--rounds 2]

QUESTIONS is a file as `tworoads compare` takes; of it the first 100 are asked, without relevant
documents, so that nothing is asked but what is asked directly too. Both ask BASE, BASE with
examples, RAG, and with an adapter TUNED, at the same concurrency, with at most 32 tokens an answer.
Needs a running stack with the corpus. The two take turns; the ratio goal is 1.15.
"""

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

from clients.client import Client
from clients.comparisons import Candidate

CONCURRENCY = 4
MOST = 100
TOKENS = {"max_tokens": 32}
EXAMPLE = {"question": "What is the capital of France?", "answer": "Paris"}


def candidates(adapter: str) -> list[Candidate]:
    generate = {"generate": TOKENS}
    tuned = [Candidate("tuned", "tuned", adapter, options=generate)] if adapter else []
    return [
        Candidate("base", "base", options=generate),
        Candidate("few-shot", "base", options={**generate, "examples": [EXAMPLE]}),
        Candidate("rag", "rag", options=generate),
        *tuned,
    ]


async def directly(client: Client, questions: list[str], corpus: str, adapter: str) -> float:
    """Return the seconds that asking takes, with always CONCURRENCY questions on their way."""
    places = asyncio.Semaphore(CONCURRENCY)

    async def one(question: str, candidate: Candidate) -> None:
        options: dict[str, Any] = {
            key: value for key, value in candidate.options.items() if key != "generate"
        }
        async with places:
            await client.ask(
                question,
                corpus if candidate.path == "rag" else "",
                candidate.path,
                adapter=candidate.adapter,
                timeout=300,
                priority="PRIORITY_BATCH",
                **TOKENS,
                **options,
            )

    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for candidate in candidates(adapter):
            for question in questions:
                group.create_task(one(question, candidate))
    return time.perf_counter() - start


async def compared(client: Client, lines: list[dict[str, Any]], corpus: str, adapter: str) -> float:
    """Return the seconds from the upload to the verdict and its report."""
    content = "\n".join(map(json.dumps, lines)).encode()
    start = time.perf_counter()
    comparison = await client.compare(
        content, corpus, candidates=candidates(adapter), concurrency=CONCURRENCY
    )
    if comparison.state != "finished":
        raise SystemExit(f"the comparison ended {comparison.state}: {comparison.message}")
    return time.perf_counter() - start


async def measure(file: Path, corpus: str, adapter: str, rounds: int, address: str | None) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()][:MOST]
    lines = [{"question": row["question"], "answers": row["answers"]} for row in rows]
    questions = [row["question"] for row in lines]
    async with Client(address) as client:
        await directly(client, questions, corpus, adapter)  # models are loaded, prompts are cached
        ratios = []
        for number in range(1, rounds + 1):
            direct = await directly(client, questions, corpus, adapter)
            whole = await compared(client, lines, corpus, adapter)
            ratios.append(whole / direct)
            print(f"round {number}: directly {direct:.1f} s, compared {whole:.1f} s")
    count = len(questions) * len(candidates(adapter))
    print(f"compared : directly {statistics.median(ratios):.2f} ({count} answers; goal 1.15)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", type=Path)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--adapter", default="")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--address", default=None)
    chosen = parser.parse_args()
    asyncio.run(
        measure(chosen.questions, chosen.corpus, chosen.adapter, chosen.rounds, chosen.address)
    )


if __name__ == "__main__":
    main()
