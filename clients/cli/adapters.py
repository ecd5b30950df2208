"""`tworoads adapters`."""

from pathlib import Path
from typing import Annotated

import typer

from clients.adapters import Adapter
from clients.cli.output import Address, Json, duration, line, print_json, print_table, run
from clients.client import Client
from clients.jobs import Context, Options

STATES = {
    "verifying": "being measured; it answers when that is done",
    "ready": "ready",
    "unfaithful": "not served: generation does not do what the trainer did",
    "unmeasured": "served, but nothing could measure it",
}
NOTHING = "There is no adapter yet. Train one: tworoads tune FILE --name NAME"

Id = Annotated[str, typer.Argument(metavar="NAME@HASH", help="The adapter.")]

app = typer.Typer(rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def adapters(context: typer.Context, address: Address = "", json: Json = False) -> None:
    """List the adapters; show, import, accept, delete or download one."""
    if context.invoked_subcommand:
        return
    found = run(address, Client.adapters)
    if json:
        print_json(found)
    elif found:
        header = ("ADAPTER", "STATE", "BASE MODEL", "CONTEXT", "RANK", "CREATED")
        print_table(header, map(_row, found))
    else:
        print(NOTHING)


@app.command()
def show(
    adapter: Annotated[
        str, typer.Argument(metavar="NAME[@HASH]", help="The adapter; NAME is its newest version.")
    ],
    address: Address = "",
    json: Json = False,
) -> None:
    """Show what an adapter was made from, whether it does what it was trained to, and its cost."""
    found = run(address, lambda client: client.adapter(adapter))
    if json:
        print_json(found)
    else:
        print("\n".join([found.id, *_made(found), *measured(found), *next_steps(found)]))


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="Folder that peft has saved an adapter into.")],
    name: Annotated[str, typer.Option(help="The name that it gets.")],
    base_model_hash: Annotated[
        str,
        typer.Option(
            help="Hash of the model that it was trained on.", show_default="the model that runs"
        ),
    ] = "",
    prompt_version: Annotated[
        str,
        typer.Option(
            help="Version of the prompts that it was trained with.", show_default="the newest"
        ),
    ] = "",
    trained_with: Annotated[
        Context | None,
        typer.Option("--context", help="What its examples were shown.", show_default="unknown"),
    ] = None,
    examples: Annotated[
        Path | None, typer.Option(help="File of the examples that it was trained on.")
    ] = None,
    address: Address = "",
    json: Json = False,
) -> None:
    """Take an adapter that was trained elsewhere."""
    taken = run(
        address,
        lambda client: client.import_adapter(
            folder,
            name,
            base_model_hash=base_model_hash,
            prompt_version=prompt_version,
            context=trained_with,
            examples=examples,
        ),
    )
    if json:
        print_json(taken)
    else:
        print("\n".join([f"{taken.id}: {state(taken)}.", *next_steps(taken)]))


@app.command()
def accept(adapter: Id, address: Address = "", json: Json = False) -> None:
    """Let an unfaithful adapter answer all the same."""
    accepted = run(address, lambda client: client.accept_adapter(adapter))
    if json:
        print_json(accepted)
    else:
        print("\n".join([f"{accepted.id} answers from now on.", *next_steps(accepted)]))


@app.command()
def delete(adapter: Id, address: Address = "") -> None:
    """Delete an adapter."""
    run(address, lambda client: client.delete_adapter(adapter))
    print(f"{adapter} is deleted.")


@app.command()
def download(
    adapter: Id,
    folder: Annotated[Path, typer.Argument(help="A new folder for its files.")],
    address: Address = "",
    json: Json = False,
) -> None:
    """Write an adapter's files into a folder, as peft saves them."""
    found = run(address, lambda client: client.download_adapter(adapter, folder))
    if json:
        print_json(found)
    else:
        print(f"{found.id} is in {folder}.")


def state(adapter: Adapter) -> str:
    """Return in words whether an adapter is served, and why not."""
    if adapter.accepted_by:
        when = f" on {adapter.accepted.astimezone():%Y-%m-%d}" if adapter.accepted else ""
        return f"served, because {adapter.accepted_by} accepted it{when}"
    reason = f" ({adapter.reason})" if adapter.reason else ""
    return f"{STATES.get(adapter.state, adapter.state)}{reason}"


def measured(adapter: Adapter) -> list[str]:
    """Return in lines what was measured of an adapter."""
    lines = []
    if adapter.held_out_loss is not None:
        lines.append(f"Held-out loss: {adapter.held_out_loss:.3f} nats per answer token.")
    if fidelity := adapter.fidelity:
        lines.append(
            f"Fidelity: over {fidelity.probes} answers with {fidelity.tokens:,} tokens, generation"
            f" and trainer differ by {fidelity.trainer_difference:.4f} nats per token, by"
            f" {fidelity.trainer_difference_max:.4f} in the worst answer; up to"
            f" {fidelity.bound:g} is faithful."
        )
        lines.append(
            f"Effect: it moves the model by {fidelity.base_difference:.3f} nats per token on them."
        )
    for speed in adapter.speeds:
        share = speed.adapter_tokens_per_second / (speed.base_tokens_per_second or 1)
        lines.append(
            f"Speed, {speed.streams} {'answers' if speed.streams > 1 else 'answer'} at a time:"
            f" {speed.adapter_tokens_per_second:,.1f} tokens/s with it,"
            f" {speed.base_tokens_per_second:,.1f} without ({share:.2f} of that)."
        )
    return lines


def next_steps(adapter: Adapter) -> list[str]:
    """Return in lines what to do with an adapter now."""
    if adapter.state == "verifying":
        return [f"See what is measured: tworoads adapters show {adapter.id}"]
    if not adapter.served:
        return [f"Let it answer all the same: tworoads adapters accept {adapter.id}"]
    saw_passages = adapter.options and adapter.options.context in ("retrieved", "mixed")
    corpus = f" --corpus {adapter.corpus}" if adapter.corpus else ""
    path = f"hybrid{corpus}" if saw_passages else "tuned"
    return [f'Ask it: tworoads ask "..." --path {path} --adapter {adapter.name}']


def options(options: Options) -> str:
    """Return in words how an adapter is trained."""
    known = {
        "context": options.context,
        "rank": options.rank,
        "alpha": options.alpha,
        "epochs": options.epochs,
        "learning rate": options.learning_rate,
        "layers": ", ".join(options.targets),
    }
    words = [
        f"{name} {value:g}" if isinstance(value, int | float) else f"{name} {value}"
        for name, value in known.items()
        if value
    ]
    return ", ".join([*words, *(["in 4 bits"] if options.quantized else [])])


def _made(adapter: Adapter) -> list[str]:
    created = f" on {adapter.created.astimezone():%Y-%m-%d %H:%M}" if adapter.created else ""
    size = sum(file.size for file in adapter.files) / 2**20
    lines = [
        f"State: {state(adapter)}.",
        f"Made by: {f'job {adapter.job}' if adapter.job else 'import'}{created}, {size:.1f} MiB.",
        f"Base model: {line(adapter.base_model)} ({adapter.base_model_hash[:12]}).",
        f"Examples: {adapter.examples_hash[:12] or 'unknown'}"
        + (f", corpus {adapter.corpus}." if adapter.corpus else "."),
    ]
    words = [options(adapter.options)] if adapter.options else []
    words.append(f"prompts {adapter.prompt_version}")
    if adapter.training_seconds is not None:
        words.append(f"in {duration(adapter.training_seconds)}")
    return [*lines, f"Training: {', '.join(filter(None, words))}."]


def _row(adapter: Adapter) -> tuple[str, ...]:
    options = adapter.options
    return (
        adapter.id,
        f"{adapter.state}, accepted" if adapter.accepted_by else adapter.state,
        adapter.base_model,
        (options.context if options else "") or "-",
        str(options.rank) if options and options.rank else "-",
        f"{adapter.created.astimezone():%Y-%m-%d %H:%M}" if adapter.created else "-",
    )
