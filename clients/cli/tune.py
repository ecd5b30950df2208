"""`tworoads tune`: examples in, an adapter out."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from clients.cli.data import finding, read_again, report
from clients.cli.output import Address, Json, print_json, run
from clients.cli.training import follow
from clients.client import Client
from clients.jobs import CheckProgress, Context, Finding, Job
from clients.local import LocalError


def tune(
    file: Annotated[
        Path, typer.Argument(help="Examples, as JSON Lines; - reads them from standard input.")
    ],
    name: Annotated[str, typer.Option("--name", "-n", help="The name that the adapter gets.")],
    corpus: Annotated[
        str, typer.Option("--corpus", "-c", help="Where the examples' passages are searched.")
    ] = "",
    context: Annotated[
        Context | None,
        typer.Option(
            help="What each example is shown: no passages, those that a search returns, or those"
            " in most examples and none in the others.",
            show_default="none; retrieved with --corpus",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, max=100, help="The most passes over the data.", show_default="3"),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of the LoRA matrices.", show_default="16")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="LoRA scale.", show_default="twice the rank")
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Highest learning rate.", show_default="by the model's size"),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="A layer that gets matrices, such as q_proj.", show_default="all"),
    ] = None,
    held_out: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=0.5,
            help="Share of the examples that only measure the loss.",
            show_default="a tenth",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Makes the training repeatable.")] = 0,
    quantized: Annotated[
        bool, typer.Option("--quantized", help="Load the model in 4 bits (QLoRA); needs a GPU.")
    ] = False,
    questions: Annotated[
        Path | None,
        typer.Option(help="Question set to count the overlap with; never trained on."),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return once the job is in the queue.")
    ] = False,
    address: Address = "",
    json: Json = False,
) -> None:
    """Train an adapter that answers as the examples do.

    Each line of FILE is {"question": ..., "answer": ...} or {"messages": [...]}, optionally with
    "relevant" (ids of documents) and "corpus". Lines that are not in order are named. With --corpus
    the adapter learns to answer with passages, for `ask --path hybrid`; without, for --path tuned.
    Ctrl-C leaves the job running. Exit code 1 if no adapter that answers came of it.
    """
    chosen: dict[str, Any] = {
        "epochs": epochs,
        "rank": rank,
        "alpha": alpha,
        "learning_rate": learning_rate,
        "targets": target,
        "held_out_share": held_out,
    }
    arguments = {
        "corpus": corpus,
        "context": context or ("retrieved" if corpus else "none"),
        "questions": questions,
        "seed": seed,
        "quantized": quantized,
        **{option: value for option, value in chosen.items() if value is not None},
    }
    with read_again(file) as examples:
        job = run(address, lambda client: _create(client, name, examples, arguments))
    if not detach:
        follow(address, job.id, json)
    elif json:
        print_json(job)
    else:
        print(f"Job {job.id} is in the queue. Watch it: tworoads jobs watch {job.id}")


async def _create(client: Client, name: str, examples: Path, arguments: dict[str, Any]) -> Job:
    console = Console(stderr=True)
    with console.status("Checking") as status:
        async for news in client.create_job(name, examples, **arguments):
            match news:
                case Finding():
                    print(finding(news), file=sys.stderr)
                case CheckProgress():
                    status.update(f"Checking: {news.checked:,} lines")
                case Job():
                    status.stop()
                    print("\n".join(report(news.data)), file=sys.stderr)
                    return news
    raise LocalError("the server ended the check without a job")
