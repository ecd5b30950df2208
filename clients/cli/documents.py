"""`tworoads ingest`, `documents`, `delete` and `search`."""

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clients import files
from clients.cli.output import (
    DEFAULT_CORPUS,
    Address,
    Corpus,
    Json,
    line,
    plain,
    print_json,
    print_table,
    run,
)
from clients.client import Client, Mode
from clients.documents import Document, Ingested


def ingest(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Files and folders: .txt .md .html .pdf .docx .csv .jsonl", metavar="PATH"
        ),
    ],
    corpus: Corpus = DEFAULT_CORPUS,
    address: Address = "",
    json: Json = False,
) -> None:
    """Index documents, so that `ask` and `search` find them.

    A file's name, or its path within a given folder, becomes the document's id; sending it again
    replaces it, and unchanged content costs nothing. A .jsonl file whose lines have "id" and "text"
    holds one document a line. In folders, hidden files and other formats are passed over. The
    corpus is created if it does not exist. Exit code 1 if a document failed; the others are
    indexed.
    """
    results = run(address, lambda client: _ingest(client, paths, corpus))
    outcomes = Counter(result.outcome for result in results)
    failed = [result for result in results if result.outcome == "failed"]
    for result in failed:
        message = line(f"failed: {result.id}: {result.message} ({result.reason})")
        print(message, file=sys.stderr)
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
        print(
            f"{outcomes['indexed']} indexed, {outcomes['unchanged']} unchanged,"
            f" {outcomes['failed']} failed in corpus {corpus}."
        )
    if failed:
        raise typer.Exit(1)


async def _ingest(client: Client, paths: list[Path], corpus: str) -> list[Ingested]:
    found = files.find(paths)
    if not found:
        raise files.FileError("there is no file to ingest: name a folder that holds some")
    results: list[Ingested] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[passages]} passages"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    await client.create_corpus(corpus)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("Ingesting", total=files.count(found), passages=0)
        async for news in client.ingest(corpus, files.documents(found)):
            if isinstance(news, Ingested):
                results.append(news)
                bar.update(task, completed=len(results))
            else:
                bar.update(task, passages=news.passages)
    return results


def documents(
    corpus: Annotated[
        str, typer.Argument(help="Name of the corpus; without it the corpora are listed.")
    ] = "",
    address: Address = "",
    json: Json = False,
) -> None:
    """List the corpora, or the documents of one."""
    rows: list[dict[str, Any]]
    if corpus:
        rows = [_row(document) for document in run(address, lambda client: _all(client, corpus))]
        nothing = f"The corpus {corpus} is empty. Fill it: tworoads ingest FOLDER --corpus {corpus}"
    else:
        rows = [
            {"corpus": found.name, "documents": found.documents, "embedder": found.embedder}
            for found in run(address, Client.corpora)
        ]
        nothing = "There is no corpus yet. Make one: tworoads ingest FOLDER --corpus NAME"
    if json:
        print_json(rows)
    elif rows:
        shown = [name for name in rows[0] if name != "uri"]
        cells = ([str(row[name]) for name in shown] for row in rows)
        print_table([name.upper() for name in shown], cells)
    else:
        print(nothing)


async def _all(client: Client, corpus: str) -> list[Document]:
    return [document async for document in client.documents(corpus)]


def _row(document: Document) -> dict[str, Any]:
    return {
        "id": document.id,
        "title": document.title,
        "uri": document.uri,
        "passages": document.passages,
        "characters": document.length,
        "updated": document.updated.isoformat(timespec="seconds"),
    }


def delete(
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of documents.", metavar="ID")] = None,
    corpus: Corpus = DEFAULT_CORPUS,
    whole: Annotated[
        bool, typer.Option("--whole-corpus", help="Delete the corpus with all its documents.")
    ] = False,
    address: Address = "",
    json: Json = False,
) -> None:
    """Delete documents of a corpus, or the whole corpus. Ids that do not exist are ignored."""
    if whole == bool(ids):
        raise typer.BadParameter("say which documents to delete, or --whole-corpus")
    if ids:
        deleted = run(address, lambda client: client.delete(corpus, ids))
        result = {"corpus": corpus, "deleted": deleted}
        sentence = f"{deleted} of {len(ids)} documents deleted from corpus {corpus}."
    else:
        run(address, lambda client: client.delete_corpus(corpus))
        result = {"corpus": corpus, "whole_corpus": True}
        sentence = f"The corpus {corpus} is deleted."
    if json:
        print_json(result)
    else:
        print(sentence)


def search(
    query: Annotated[str, typer.Argument(help="What to find.")],
    corpus: Corpus = DEFAULT_CORPUS,
    limit: Annotated[int, typer.Option(min=1, max=100, help="The most passages to find.")] = 5,
    mode: Annotated[
        Mode, typer.Option(help="By meaning (vector), by words (text), or both (hybrid).")
    ] = "hybrid",
    address: Address = "",
    json: Json = False,
) -> None:
    """Find the passages that fit a question best."""
    passages = run(address, lambda client: client.search(query, corpus, limit, mode))
    if json:
        print_json([vars(passage) for passage in passages])
        return
    if not passages:
        print("Nothing was found.")
    for number, passage in enumerate(passages, 1):
        page = f", page {passage.page}" if passage.page else ""
        headings = "".join(f" > {heading}" for heading in passage.heading_path)
        print(line(f"{number}. {passage.document}{page}{headings} ({passage.score:.4f})"))
        print("   " + plain(passage.text).replace("\n", "\n   ") + "\n")
