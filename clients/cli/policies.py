"""`tworoads policies`."""

from typing import Annotated

import typer

from clients.cli.output import Address, Json, line, print_json, print_table, run
from clients.client import Client
from clients.comparisons import ComparisonPath
from clients.policies import Policy

NOTHING = (
    "There is no policy yet: AUTO retrieves if a corpus is given. Set one by a comparison:"
    " tworoads compare QUESTIONS --corpus NAME --apply"
)

app = typer.Typer(rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def policies(context: typer.Context, address: Address = "", json: Json = False) -> None:
    """List which path AUTO takes for each corpus, who said so and when; set one."""
    if context.invoked_subcommand:
        return
    found = run(address, Client.policies)
    if json:
        print_json(found)
    elif found:
        header = ("CORPUS", "PATH", "ADAPTER", "BY TYPE", "COMPARISON", "WHO", "WHEN")
        print_table(header, map(_row, found))
    else:
        print(NOTHING)


@app.command("set")
def set_(
    corpus: Annotated[str, typer.Argument(metavar="CORPUS", help="The corpus.")],
    path: Annotated[
        ComparisonPath, typer.Argument(metavar="PATH", help="base, rag, tuned, hybrid.")
    ],
    adapter: Annotated[str, typer.Option("--adapter", "-a", help="For tuned and hybrid.")] = "",
    comparison: Annotated[
        str, typer.Option(help="The id of the comparison that proves it.", show_default="none")
    ] = "",
    address: Address = "",
    json: Json = False,
) -> None:
    """Let AUTO take a path for a corpus, in place of what a comparison said."""
    policy = run(
        address, lambda client: client.set_policy(corpus, path, adapter, comparison=comparison)
    )
    if json:
        print_json(policy)
    else:
        print(applied(policy))


def applied(policy: Policy) -> str:
    """Return in one sentence what AUTO does now."""
    adapter = f" with {policy.adapter}" if policy.adapter else ""
    types = ", ".join(
        f"{one.path}{f' with {one.adapter}' if one.adapter else ''} for {one.type}"
        for one in policy.types
    )
    by_type = f", {types}" if types else ""
    return line(
        f"AUTO takes {policy.path}{adapter} for corpus {policy.corpus}{by_type} from now on."
    )


def _row(policy: Policy) -> tuple[str, ...]:
    return (
        policy.corpus,
        policy.path,
        policy.adapter or "-",
        ", ".join(f"{one.type}: {one.path}" for one in policy.types) or "-",
        policy.comparison or "-",
        policy.author or "-",
        f"{policy.updated.astimezone():%Y-%m-%d %H:%M}" if policy.updated else "-",
    )
