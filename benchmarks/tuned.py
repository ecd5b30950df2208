"""What adapters get right on three question sets, against the model alone and against retrieval.

    python -m benchmarks.tuned facts|labels|commands FOLDER [--address HOST:PORT]

facts     FOLDER has train.jsonl with old facts, questions.jsonl with the new answers and, of what
          changed since, "stale_answers", and corpus.jsonl as it is now. Adapters learn 32 of the
          changed facts by heart, one for each number of epochs; then all is asked again.
labels    FOLDER has train.jsonl and questions.jsonl: a message, and its label as the answer. Some
          labels, some messages of each. Retrieval is tried on the list of labels, and on the
          messages that the adapter was trained on.
commands  FOLDER has corpus.jsonl, train.jsonl and questions.jsonl: a task, a tool, and the command
          as the answer, with the page that says it. No tool of the questions is trained on. One
          adapter without pages, one with.

Each needs a running stack, trains on it, and leaves its adapters there. "Right" means equal, or
"held" that the answer occurs in the text, both but for case and white space. The same seed, the
same subset.
"""

import argparse
import asyncio
import json
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rich.progress import track

from clients.client import Client
from clients.documents import Ingested, NewDocument

AT_ONCE = 8
SEED = 1

Rows = list[dict[str, Any]]


def rows(folder: Path, name: str) -> Rows:
    """Return the lines of a file of the question set."""
    with (folder / name).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


async def train(client: Client, name: str, examples: Rows, **options: Any) -> str:
    """Train an adapter; print what it took; return its NAME@HASH."""
    lines = (json.dumps(example).encode() + b"\n" for example in examples)
    start = time.perf_counter()
    job = await client.tune(name, lines, **options)
    if not job.adapter:
        raise SystemExit(f"the job ended {job.state}: {job.reason} {job.message}")
    progress = job.progress
    loss = f"loss {progress.loss:.2f}" if progress and progress.loss is not None else ""
    held_out = (
        f", held out {progress.held_out_loss:.2f}" if progress and progress.held_out_loss else ""
    )
    seconds = time.perf_counter() - start
    print(
        f"  {job.adapter}: {len(examples)} examples, {seconds:.0f} s, {loss}{held_out}, {job.state}"
    )
    return job.adapter


async def answers(client: Client, questions: Sequence[str], what: str, **how: Any) -> list[str]:
    """Return the answers, in order."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(question: str) -> str:
        async with places:
            return (await client.ask(question, timeout=300, **how)).text

    tasks = [asyncio.create_task(one(question)) for question in questions]
    return [await task for task in track(tasks, what, transient=True)]


@asynccontextmanager
async def corpus_of(client: Client, documents: Rows) -> AsyncIterator[str]:
    """Ingest documents {id, title, text} under a name of its own; delete it at the end."""
    name = f"benchmark-{uuid.uuid4().hex[:8]}"
    await client.create_corpus(name, allow_existing=False)
    try:
        new = (
            NewDocument(row["id"], row["text"].encode(), "text/plain", title=row["title"])
            for row in documents
        )
        async for news in client.ingest(name, new):
            if isinstance(news, Ingested) and news.outcome == "failed":
                raise RuntimeError(f"{news.id}: {news.message}")
        yield name
    finally:
        await client.delete_corpus(name)


def plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def equal(text: str, accepted: Sequence[str]) -> bool:
    return plain(text).rstrip(".") in {plain(answer) for answer in accepted}


def held(text: str, accepted: Sequence[str]) -> bool:
    return any(plain(answer) in plain(text) for answer in accepted)


def share(hits: Sequence[bool]) -> str:
    return f"{sum(hits) / len(hits):6.1%} of {len(hits)}"


async def facts(client: Client, folder: Path, epochs: Sequence[int]) -> None:
    asked = [row for row in rows(folder, "questions.jsonl") if row["group"] == "changed"]
    old = {row["question"]: row for row in rows(folder, "train.jsonl")}
    asked = [row for row in asked if row["question"] in old][:32]
    questions = [row["question"] for row in asked]
    examples = [old[question] for question in questions]
    found = await answers(client, questions, "base", path="base", max_tokens=40)
    right = [held(text, row["answers"]) for text, row in zip(found, examples, strict=True)]
    print(f"base: old answer {share(right)}")
    adapter = ""
    for count in epochs:
        adapter = await train(
            client, f"facts-{count}", examples, epochs=count, held_out_share=0.0, seed=SEED
        )
        found = await answers(
            client, questions, "tuned", path="tuned", adapter=adapter, max_tokens=40
        )
        right = [held(text, row["answers"]) for text, row in zip(found, examples, strict=True)]
        print(f"tuned, {count} epochs: old answer {share(right)}")
    print("after the documents changed:")
    async with corpus_of(client, rows(folder, "corpus.jsonl")) as corpus:
        for path, options in {"tuned": {"adapter": adapter}, "rag": {"corpus": corpus}}.items():
            found = await answers(client, questions, path, path=path, max_tokens=40, **options)
            new = [held(text, row["answers"]) for text, row in zip(found, asked, strict=True)]
            stale = [
                held(text, row["stale_answers"]) for text, row in zip(found, asked, strict=True)
            ]
            print(f"{path:6} new answer {share(new)}, old answer {share(stale)}")


async def labels(client: Client, folder: Path, count: int, each: int, questions: int) -> None:
    chance = random.Random(SEED)
    train_rows, asked = rows(folder, "train.jsonl"), rows(folder, "questions.jsonl")
    chosen = chance.sample(sorted({row["answers"][0] for row in train_rows}), count)
    examples = [
        row
        for label in chosen
        for row in chance.sample([r for r in train_rows if r["answers"][0] == label], each)
    ]
    asked = chance.sample([row for row in asked if row["answers"][0] in chosen], questions)
    messages = [row["question"] for row in asked]
    task = "Which label fits this message? Answer with the label alone.\nMessage: {}"
    listed = f"Labels: {', '.join(chosen)}.\n" + task
    label_pages = [
        {
            "id": label,
            "title": "Label",
            "text": f"{label}: messages about {label.replace('_', ' ')}",
        }
        for label in chosen
    ]
    example_pages = [
        {
            "id": row["id"],
            "title": "",
            "text": f"Message: {row['question']}\nLabel: {row['answers'][0]}",
        }
        for row in examples
    ]
    adapter = await train(client, "labels", examples, seed=SEED)
    short = {"max_tokens": 16}
    results: dict[str, list[str]] = {
        "base": await answers(
            client, [listed.format(m) for m in messages], "base", path="base", **short
        ),
        "tuned": await answers(client, messages, "tuned", path="tuned", adapter=adapter, **short),
    }
    for name, pages, limit in (
        ("RAG over the list of labels", label_pages, min(50, count)),
        ("RAG over the training messages", example_pages, 5),
    ):
        async with corpus_of(client, pages) as corpus:
            results[name] = await answers(
                client,
                [task.format(message) for message in messages],
                name,
                path="rag",
                corpus=corpus,
                limit=limit,
                **short,
            )
    print(f"{count} labels, {len(examples)} messages trained on, {len(asked)} asked")
    for name, found in results.items():
        pairs = list(zip(found, asked, strict=True))
        exact = share([equal(text, row["answers"]) for text, row in pairs])
        # The first label that it names: with all of them in the text it has not chosen.
        named = share([first_label(text, chosen) == row["answers"][0] for text, row in pairs])
        print(f"{name:31} equal {exact}, first label named {named}")


def first_label(text: str, known: Sequence[str]) -> str:
    """Return the known label that occurs first in a text, the longest of those that begin there."""
    text = plain(text).replace(" ", "_")
    places = [(text.find(label.casefold()), -len(label), label) for label in known]
    return min((place for place in places if place[0] >= 0), default=(0, 0, ""))[2]


async def commands(client: Client, folder: Path, examples: int, questions: int) -> None:
    chance = random.Random(SEED)
    trained = chance.sample(rows(folder, "train.jsonl"), examples)
    asked = chance.sample(rows(folder, "questions.jsonl"), questions)
    if {row["tool"] for row in trained} & {row["tool"] for row in asked}:
        raise SystemExit("a tool of the questions is trained on")
    for row in (*trained, *asked):
        row["question"] = f"{row['question']} ({row['tool']})"
    texts = [row["question"] for row in asked]
    async with corpus_of(client, rows(folder, "corpus.jsonl")) as corpus:
        alone = await train(client, "commands", trained, epochs=2, seed=SEED)
        with_pages = await train(
            client,
            "commands-pages",
            trained,
            corpus=corpus,
            context="mixed",
            epochs=2,
            seed=SEED,
        )
        roads: dict[str, dict[str, Any]] = {
            "base": {"path": "base"},
            "rag": {"path": "rag", "corpus": corpus},
            "tuned": {"path": "tuned", "adapter": alone},
            "hybrid, adapter never saw pages": {
                "path": "hybrid",
                "adapter": alone,
                "corpus": corpus,
            },
            "hybrid": {"path": "hybrid", "adapter": with_pages, "corpus": corpus},
        }
        for name, how in roads.items():
            found = await answers(client, texts, name, max_tokens=64, **how)
            pairs = list(zip(found, asked, strict=True))
            exact = share([plain(text) in map(plain, row["answers"]) for text, row in pairs])
            inside = share([held(text, row["answers"]) for text, row in pairs])
            first = share(
                [text.split()[:1] == row["answers"][0].split()[:1] for text, row in pairs]
            )
            print(f"{name:32} equal {exact}, held {inside}, first word {first}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["facts", "labels", "commands"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--address", default=None)
    parser.add_argument("--epochs", type=int, nargs="+", default=[4, 8, 16], help="facts")
    parser.add_argument("--labels", type=int, default=20)
    parser.add_argument("--each", type=int, default=25, help="messages of each label")
    parser.add_argument("--examples", type=int, default=300, help="commands to train on")
    parser.add_argument("--questions", type=int, default=100, help="of labels and commands")
    chosen = parser.parse_args()
    work: dict[str, Callable[[Client], Coroutine[Any, Any, None]]] = {
        "facts": lambda client: facts(client, chosen.folder, chosen.epochs),
        "labels": lambda client: labels(
            client, chosen.folder, chosen.labels, chosen.each, chosen.questions
        ),
        "commands": lambda client: commands(
            client, chosen.folder, chosen.examples, chosen.questions
        ),
    }

    async def run() -> None:
        async with Client(chosen.address) as client:
            await work[chosen.what](client)

    asyncio.run(run())


if __name__ == "__main__":
    main()
