"""Search quality of a running stack on a question set: nDCG@10 and recall@10 by document.

    python -m benchmarks.retrieval [FOLDER] [--address HOST:PORT]

FOLDER (or TWOROADS_DATA) holds corpus.jsonl and questions.jsonl with "relevant". The corpus is
ingested with default settings; a document ranks where its best passage ranks. Start the stack with
--store weaviate to measure that store.
"""

import argparse
import asyncio

import ir_measures
from ir_measures import R, nDCG
from rich.progress import track

from benchmarks.question_set import Question, QuestionSet, question_set
from clients.client import Client, Mode

MODES: tuple[Mode, ...] = ("hybrid", "vector", "text")
DEPTH = 30  # passages, for ten documents
AT_ONCE = 8


async def ranked(
    client: Client, corpus: str, mode: Mode, questions: list[Question]
) -> list[ir_measures.ScoredDoc]:
    """Return the documents that a mode finds, scored by the place of their best passage."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(question: Question) -> list[ir_measures.ScoredDoc]:
        async with places:
            passages = await client.search(question.text, corpus, DEPTH, mode)
        documents = dict.fromkeys(passage.document for passage in passages)
        return [
            ir_measures.ScoredDoc(question.id, id, -float(rank))
            for rank, id in enumerate(documents)
        ]

    tasks = [asyncio.create_task(one(question)) for question in questions]
    return [
        document for task in track(tasks, f"{mode:7}", transient=True) for document in await task
    ]


async def measure(questions: QuestionSet, address: str | None) -> None:
    asked = [question for question in questions.questions() if question.relevant]
    relevant = [ir_measures.Qrel(q.id, id, 1) for q in asked for id in q.relevant]
    measures = [nDCG @ 10, R @ 10]
    async with Client(address) as client, questions.ingested(client) as corpus:
        print(f"{questions.folder.name}: {len(asked)} questions")
        print(f"{'mode':8} {'nDCG@10':>8} {'R@10':>8}")
        for mode in MODES:
            found = await ranked(client, corpus, mode, asked)
            values = ir_measures.calc_aggregate(measures, relevant, found)
            print(f"{mode:8} " + " ".join(f"{values[m]:8.4f}" for m in measures))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", default="")
    parser.add_argument("--address", default=None)
    arguments = parser.parse_args()
    asyncio.run(measure(question_set(arguments.folder), arguments.address))


if __name__ == "__main__":
    main()
