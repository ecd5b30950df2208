"""`tworoads jobs`."""

from typing import Annotated

import typer

from clients.cli.adapters import options
from clients.cli.data import report
from clients.cli.output import Address, Json, line, plain, print_json, print_table, run
from clients.cli.training import describe, follow
from clients.client import Client
from clients.jobs import ENDED, Job

Id = Annotated[str, typer.Argument(metavar="ID", help="The job.")]

app = typer.Typer(rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def jobs(context: typer.Context, address: Address = "", json: Json = False) -> None:
    """List the training jobs; show, watch or cancel one."""
    if context.invoked_subcommand:
        return
    found = run(address, Client.jobs)
    if json:
        print_json(found)
    elif found:
        header = ("JOB", "STATE", "NAME", "EXAMPLES", "STEP", "CREATED", "ADAPTER")
        print_table(header, map(_row, found))
    else:
        print("There is no job yet. Make one: tworoads tune FILE --name NAME")


@app.command()
def show(job: Id, address: Address = "", json: Json = False) -> None:
    """Show a job: its data, how it is trained, how far it is, and why it failed."""
    found = run(address, lambda client: client.job(job))
    if json:
        print_json(found)
        return
    print(f"{describe(found)}.")
    if found.reason:
        print(f"Why: {line(found.message)} ({found.reason}).")
    print(f"Base model: {line(found.base_model)}.")
    print(f"Training: {options(found.options)}, prompts {found.prompt_version}.")
    print("\n".join(report(found.data)))
    if found.adapter:
        print(f"Adapter: {found.adapter}")
    if found.log_tail:
        print("The end of the trainer's log:")
        print("\n".join(f"  {plain(text)}" for text in found.log_tail.splitlines()))
    if found.state not in ENDED:
        print(f"See it go on: tworoads jobs watch {found.id}")


@app.command()
def watch(job: Id, address: Address = "", json: Json = False) -> None:
    """Show a job until it has ended; Ctrl-C leaves it running."""
    follow(address, job, json)


@app.command()
def cancel(job: Id, address: Address = "", json: Json = False) -> None:
    """Stop a job."""
    cancelled = run(address, lambda client: client.cancel_job(job))
    if json:
        print_json(cancelled)
    else:
        print(f"{describe(cancelled)}.")


def _row(job: Job) -> tuple[str, ...]:
    return (
        job.id,
        job.state,
        job.name,
        str(job.data.examples),
        f"{job.progress.step}/{job.progress.steps}" if job.progress else "-",
        f"{job.created.astimezone():%Y-%m-%d %H:%M}" if job.created else "-",
        job.adapter or "-",
    )
