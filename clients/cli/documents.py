"""`tworoads ingest`, `documents`, `delete` and `search`."""

import sys
from collections import Counter
from datetime import UTC
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clients import files
from clients.cli.output import (
    DEFAULT_CORPUS,
    Address,
    Corpus,
    Json,
    plain,
    print_json,
    print_table,
    run,
)
from clients.client import Client, Ingested, Mode
from clients.client import Progress as IngestProgress


class ModeChoice(StrEnum):
    hybrid = "hybrid"
    vector = "vector"
    text = "text"


def ingest(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Files and folders: .txt .md .html .pdf .docx .csv .jsonl", metavar="PATH..."
        ),
    ],
    corpus: Corpus = DEFAULT_CORPUS,
    address: Address = "",
    json: Json = False,
) -> None:
    """Index documents, so that `ask` and `search` find them.

    A file's name, or its path within a given folder, becomes the document's id; sending it again
    replaces it, and unchanged content costs nothing. A .jsonl file whose lines have "id" and "text"
    holds one document a line. The corpus is created if it does not exist. Exit code 1 if a document
    failed.
    """
    results = run(_ingest(paths, corpus, address))
    outcomes = Counter(result.outcome for result in results)
    failed = [result for result in results if result.outcome == "failed"]
    if json:
        print_json(
            {
                "corpus": corpus,
                "indexed": outcomes["indexed"],
                "unchanged": outcomes["unchanged"],
                "failed": [
                    {"id": result.id, "reason": result.reason, "message": result.message}
                    for result in failed
                ],
                "passages": sum(result.passages for result in results),
            }
        )
    else:
        for result in failed:
            print(
                f"failed: {plain(result.id)}: {result.message} ({result.reason})", file=sys.stderr
            )
        print(
            f"{outcomes['indexed']} indexed, {outcomes['unchanged']} unchanged,"
            f" {outcomes['failed']} failed in corpus {corpus}."
        )
    if failed:
        raise typer.Exit(1)


async def _ingest(paths: list[Path], corpus: str, address: str) -> list[Ingested]:
    found = files.find(paths)
    if not found:
        raise files.FileError("these folders hold no file that can be ingested")
    results: list[Ingested] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[passages]} passages"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    async with Client(address or None) as client:
        await client.create_corpus(corpus)
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("Ingesting", total=files.count(found), passages=0)
            async for news in client.ingest(corpus, files.documents(found)):
                if isinstance(news, IngestProgress):
                    bar.update(task, completed=news.finished, passages=news.passages)
                else:
                    results.append(news)
                    bar.update(task, completed=len(results))
    return results


def documents(
    corpus: Annotated[
        str, typer.Argument(help="Name of the corpus; without it the corpora are listed.")
    ] = "",
    address: Address = "",
    json: Json = False,
) -> None:
    """List the corpora, or the documents of one."""
    if corpus:
        run(_documents(corpus, address, json))
    else:
        run(_corpora(address, json))


async def _corpora(address: str, json: bool) -> None:
    async with Client(address or None) as client:
        corpora = await client.corpora()
    rows = [
        {"name": corpus.name, "documents": corpus.documents, "embedder": corpus.embedder.name}
        for corpus in corpora
    ]
    if json:
        print_json(rows)
    elif not rows:
        print("There is no corpus yet. Make one: tworoads ingest FOLDER")
    else:
        print_table(
            ("CORPUS", "DOCUMENTS", "EMBEDDING MODEL"),
            [(str(row["name"]), str(row["documents"]), str(row["embedder"])) for row in rows],
        )


async def _documents(corpus: str, address: str, json: bool) -> None:
    async with Client(address or None) as client:
        found = [document async for document in client.documents(corpus)]
    rows = [
        {
            "id": document.id,
            "title": document.title,
            "uri": document.uri,
            "passages": document.passages,
            "characters": document.length,
            "updated": document.update_time.ToDatetime(UTC).isoformat(timespec="seconds"),
        }
        for document in found
    ]
    if json:
        print_json(rows)
    else:
        cells = ("id", "title", "passages", "characters", "updated")
        print_table(
            [cell.upper() for cell in cells], [[str(row[c]) for c in cells] for row in rows]
        )


def delete(
    ids: Annotated[
        list[str] | None, typer.Argument(help="Ids of documents.", metavar="ID...")
    ] = None,
    corpus: Corpus = DEFAULT_CORPUS,
    whole: Annotated[
        bool, typer.Option("--whole-corpus", help="Delete the corpus with all its documents.")
    ] = False,
    address: Address = "",
) -> None:
    """Delete documents of a corpus, or the whole corpus."""
    if whole == bool(ids):
        raise typer.BadParameter("say which documents to delete, or --whole-corpus")
    run(_delete(ids or [], corpus, address))


async def _delete(ids: list[str], corpus: str, address: str) -> None:
    async with Client(address or None) as client:
        if not ids:
            await client.delete_corpus(corpus)
            print(f"The corpus {corpus} is deleted.")
            return
        deleted = await client.delete(corpus, ids)
    print(f"{deleted} of {len(ids)} documents deleted from corpus {corpus}.")


def search(
    query: Annotated[str, typer.Argument(help="What to find.")],
    corpus: Corpus = DEFAULT_CORPUS,
    limit: Annotated[int, typer.Option(min=1, max=100, help="The most passages to find.")] = 5,
    mode: Annotated[ModeChoice, typer.Option(help="How to search.")] = ModeChoice.hybrid,
    address: Address = "",
    json: Json = False,
) -> None:
    """Find the passages that fit a question best."""
    run(_search(query, corpus, limit, mode.value, address, json))


async def _search(
    query: str, corpus: str, limit: int, mode: Mode, address: str, json: bool
) -> None:
    async with Client(address or None) as client:
        passages = await client.search(query, corpus, limit, mode)
    if json:
        print_json([vars(passage) for passage in passages])
        return
    if not passages:
        print("Nothing was found.")
    for number, passage in enumerate(passages, 1):
        page = f", page {passage.page}" if passage.page else ""
        headings = "".join(f" > {heading}" for heading in passage.heading_path)
        print(plain(f"{number}. {passage.document}{page}{headings}  ({passage.score:.4f})"))
        print("   " + plain(passage.text).replace("\n", "\n   ") + "\n")
