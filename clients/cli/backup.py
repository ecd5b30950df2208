"""`tworoads backup` and `tworoads restore`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from clients import backup as copies
from clients.cli.output import Json, print_json
from clients.local import AlreadyRunning, LocalError, command, data_folder, lock

Data = Annotated[
    Path | None, typer.Option(help="Folder of the stack.", show_default="the user's own")
]


def backup(
    target: Annotated[Path, typer.Argument(help="New folder that takes the backup.")],
    data: Data = None,
    json: Json = False,
) -> None:
    """Copy documents, adapters, jobs, policies and comparisons of a stack that is down.

    Every file is kept with its hash. `tworoads restore` makes the same stack of it again.
    """
    folder, target = (data or data_folder()).absolute(), target.absolute()
    if not folder.is_dir():
        raise LocalError(f"There is no data in {folder}.")
    with _bar(folder, json) as tell:
        manifest = copies.back_up(folder, target, tell)
    _say(manifest, json, f"are in {target}")


def restore(
    source: Annotated[Path, typer.Argument(help="Folder that `tworoads backup` wrote.")],
    data: Data = None,
    json: Json = False,
) -> None:
    """Make the data folder of a stack from a backup, checked file by file: all of it, or nothing.

    A data folder that has something in it is not touched.
    """
    folder = (data or data_folder()).absolute()
    with _bar(folder, json) as tell:
        manifest = copies.restore(source.absolute(), folder, tell)
    _say(manifest, json, f"of {manifest.created} are in {folder}; `{command('up', folder)}` starts")


@contextmanager
def _bar(folder: Path, quiet: bool) -> Iterator[copies.Tell]:
    """Yield what shows how far it is, while no stack may use the data folder."""
    screen = Console(stderr=True)
    progress = Progress(
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=screen,
        transient=True,
        disable=quiet or not screen.is_terminal,
    )
    try:
        with lock(folder), progress:
            task = progress.add_task("", total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
    except AlreadyRunning as error:
        stop = command("down", folder)
        raise LocalError(f"A stack runs on {folder}; stop it first with `{stop}`.") from error


def _say(manifest: copies.Manifest, json: bool, where: str) -> None:
    if json:
        print_json(
            {
                "files": len(manifest.files),
                "bytes": manifest.size,
                "version": manifest.version,
                "created": manifest.created,
            }
        )
    else:
        print(f"{len(manifest.files)} files, {manifest.size / 2**20:.1f} MiB, {where}.")
