"""The command `tworoads`."""

import sys
from collections.abc import Callable

import typer

from clients.cli import (
    adapters,
    ask,
    backup,
    compare,
    comparisons,
    documents,
    jobs,
    keys,
    logs,
    policies,
    status,
    tune,
    up,
)
from clients.local import LocalError

app = typer.Typer(
    name="tworoads",
    help="Answers questions about your documents, by retrieval, with citations that are checked,"
    " and by adapters that are trained on your examples, and measures which of them to take.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    up.up,
    up.down,
    backup.backup,
    backup.restore,
    status.status,
    logs.logs,
    documents.ingest,
    documents.documents,
    documents.delete,
    documents.search,
    ask.ask,
    tune.tune,
    compare.compare,
):
    app.command()(command)
app.add_typer(jobs.app, name="jobs")
app.add_typer(adapters.app, name="adapters")
app.add_typer(comparisons.app, name="comparisons")
app.add_typer(policies.app, name="policies")
app.add_typer(keys.app, name="keys")


def main() -> None:
    """Run the command line."""
    run(lambda: app(prog_name="tworoads"))


def run(work: Callable[[], object]) -> None:
    """Do a command's work; an error becomes one sentence and exit code 1."""
    try:
        work()
    except LocalError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
