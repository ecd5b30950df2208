"""RAG answers of a running stack to a question set, and whether their citations hold.

    python -m benchmarks.answers [FOLDER] [--questions 100] [--address HOST:PORT]

FOLDER (or TWOROADS_DATA) holds corpus.jsonl and questions.jsonl. Every citation is compared with
the document as the API returns it. "Right" means that an accepted answer occurs in the text, case
aside.
"""

import argparse
import asyncio
import random
from collections import Counter

from rich.progress import track

from benchmarks.question_set import Question, QuestionSet, question_set
from clients.client import Client
from clients.events import Answer

AT_ONCE = 4


async def measure(questions: QuestionSet, count: int, address: str | None) -> None:
    asked = random.Random(1).sample(questions.questions(), count)
    counts: Counter[str] = Counter()
    async with Client(address) as client, questions.ingested(client) as corpus:
        places = asyncio.Semaphore(AT_ONCE)

        async def one(question: Question) -> tuple[Question, Answer]:
            async with places:
                answer = await client.ask(question.text, corpus, "rag", max_tokens=80, timeout=300)
            return question, answer

        tasks = [asyncio.create_task(one(question)) for question in asked]
        texts: dict[str, str] = {}
        for task in track(tasks, "asking", transient=True):
            question, answer = await task
            counts["answers"] += 1
            counts["right"] += any(a.lower() in answer.text.lower() for a in question.answers)
            counts["sentences without support"] += len(answer.unsupported)
            cited = {(c.answer_start, c.answer_end) for c in answer.citations}
            counts["sentences with support"] += len(cited)
            for citation in answer.citations:
                if citation.document not in texts:
                    _, texts[citation.document] = await client.document(corpus, citation.document)
                text = texts[citation.document]
                holds = text[citation.source_start : citation.source_end] == citation.quote
                counts["citations"] += 1
                counts["citations that hold"] += holds
    for name, number in counts.items():
        print(f"{number:6} {name}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", default="")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--address", default=None)
    arguments = parser.parse_args()
    chosen = question_set(arguments.folder)
    asyncio.run(measure(chosen, arguments.questions, arguments.address))


if __name__ == "__main__":
    main()
