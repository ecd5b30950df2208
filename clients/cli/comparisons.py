"""`tworoads comparisons`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from clients.cli.comparing import describe, tell
from clients.cli.comparing import watch as watched
from clients.cli.output import Address, Json, print_json, print_table, run
from clients.cli.policies import applied
from clients.cli.verdict import next_steps
from clients.client import Client
from clients.comparisons import ENDED, Comparison, Phase, ReportFormat
from clients.evaluation import FORMATS
from clients.files import FileError
from clients.policies import Policy

MOST_DIGITS = 6  # of a number in the list; an id is longer

Id = Annotated[
    str,
    typer.Argument(metavar="N", help="The comparison: its id, or its number in the list."),
]

app = typer.Typer(rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def comparisons(context: typer.Context, address: Address = "", json: Json = False) -> None:
    """List the comparisons, the newest first; show, watch, cancel or apply one, get its report or
    its answers."""
    if context.invoked_subcommand:
        return
    found = run(address, Client.comparisons)
    if json:
        print_json(found)
    elif found:
        header = ("N", "COMPARISON", "STATE", "CORPUS", "QUESTIONS", "CREATED", "VERDICT")
        print_table(header, [_row(number, one) for number, one in enumerate(found, 1)])
    else:
        print("There is no comparison yet. Make one: tworoads compare QUESTIONS --corpus NAME")


@app.command()
def show(comparison: Id, address: Address = "", json: Json = False) -> None:
    """Show a comparison: its verdict and what it rests on, or how far it is."""
    found = run(address, lambda client: _find(client, comparison))
    if json:
        print_json(found)
        return
    print(f"{describe(found)}.")
    if found.state == "finished":
        tell(found, json, next_steps(found))
    elif found.state not in ENDED:
        print(f"See it go on: tworoads comparisons watch {found.id}")


@app.command()
def watch(comparison: Id, address: Address = "", json: Json = False) -> None:
    """Show a comparison until it has ended; Ctrl-C leaves it running."""
    id = run(address, lambda client: _id(client, comparison))
    found = watched(address, id)
    tell(found, json, next_steps(found))


@app.command()
def cancel(comparison: Id, address: Address = "", json: Json = False) -> None:
    """Stop a comparison; its answers are kept."""
    cancelled = run(address, lambda client: _cancel(client, comparison))
    if json:
        print_json(cancelled)
    else:
        print(f"{describe(cancelled)}.")


@app.command()
def answers(
    comparison: Id,
    candidate: Annotated[str, typer.Option(help="Only of this candidate.")] = "",
    phase: Annotated[Phase | None, typer.Option(help="Only of this phase.")] = None,
    address: Address = "",
) -> None:
    """Print every single answer of a comparison as JSON Lines, in the order in which they came."""
    run(address, lambda client: _answers(client, comparison, candidate, phase))


@app.command()
def report(
    comparison: Id,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The file; - is standard output.", show_default="compare-ID.html"
        ),
    ] = None,
    format: Annotated[
        ReportFormat | None,
        typer.Option(help="What it is written in.", show_default="by the file's name"),
    ] = None,
    address: Address = "",
) -> None:
    """Write the report of a finished comparison into a file."""
    if output == Path("-"):
        content = run(address, lambda client: _report(client, comparison, format))
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        return
    file = run(address, lambda client: _download(client, comparison, output, format))
    print(f"The report is in {file}.")


@app.command()
def apply(comparison: Id, address: Address = "", json: Json = False) -> None:
    """Let AUTO follow the verdict of a comparison from now on."""
    policy = run(address, lambda client: _apply(client, comparison))
    if json:
        print_json(policy)
    else:
        print(applied(policy))


async def _id(client: Client, name: str) -> str:
    """Return the id of a comparison that is named by it or by its number in the list."""
    if not (name.isascii() and name.isdigit() and len(name) <= MOST_DIGITS):
        return name
    found, number = await client.comparisons(), int(name)
    if not 1 <= number <= len(found):
        raise FileError(
            f"there is no comparison number {number}: see which there are with"
            " `tworoads comparisons`"
        )
    return found[number - 1].id


async def _find(client: Client, name: str) -> Comparison:
    return await client.comparison(await _id(client, name))


async def _cancel(client: Client, name: str) -> Comparison:
    return await client.cancel_comparison(await _id(client, name))


async def _apply(client: Client, name: str) -> Policy:
    return await client.apply(await _id(client, name))


async def _report(client: Client, name: str, format: ReportFormat | None) -> bytes:
    return await client.report(await _id(client, name), format or "html")


async def _download(
    client: Client, name: str, output: Path | None, format: ReportFormat | None
) -> Path:
    id = await _id(client, name)
    endings = {named: ending for ending, named in FORMATS.items()}
    file = output or Path(f"compare-{id}{endings[format or 'html']}")
    await client.download_report(id, file, format)
    return file


async def _answers(client: Client, name: str, candidate: str, phase: Phase | None) -> None:
    id = await _id(client, name)
    async for answer in client.comparison_answers(id, candidate, phase):
        print_json(answer, indent=None)


def _row(number: int, comparison: Comparison) -> tuple[str, ...]:
    verdict = comparison.verdict
    open_ = "not decided" if verdict else "-"
    return (
        str(number),
        comparison.id,
        comparison.state,
        comparison.start.corpus or "-",
        f"{comparison.questions:,}",
        f"{comparison.created.astimezone():%Y-%m-%d %H:%M}" if comparison.created else "-",
        verdict.candidate if verdict and verdict.candidate else open_,
    )
