"""`tworoads keys`: the file of API keys that a gateway reads."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from clients.cli.output import Json, line, print_json, print_table
from clients.local import LocalError
from services.gateway import keys

app = typer.Typer(
    help="Make and revoke the API keys of a gateway; it reads their file again when it changes.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
File = Annotated[Path, typer.Argument(help="File of keys; the gateway's setting --keys.")]
FIELDS = ("id", "tenant", "principal", "role", "created", "expires", "state")


class RoleChoice(StrEnum):
    reader = "reader"
    writer = "writer"
    admin = "admin"


@app.command("add")
def add(
    file: File,
    tenant: Annotated[str, typer.Option(help="Whose documents, adapters and comparisons it sees.")],
    principal: Annotated[str, typer.Option(help="Who it is for: a person or a program.")],
    role: Annotated[
        RoleChoice,
        typer.Option(help="reader asks, writer changes, admin also deletes, accepts and sets."),
    ],
    days: Annotated[
        int | None, typer.Option(min=1, help="Valid for so long.", show_default="for ever")
    ] = None,
) -> None:
    """Make a key and print it, this once. An older key of the principal stays valid.

    A new file is for its owner's eyes alone. Where the gateway runs as another user, as in a
    container, let it read the file: chmod 644 is safe, since the file has hashes and no keys.
    Changes keep the file's owner and mode.
    """
    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=days) if days else None
    with _translated(file):
        key, text = keys.add(file, tenant, principal, role.value, expires)
    print(text)
    print(f"Key {key.id} is in {file}; nobody can tell it again.", file=sys.stderr)


@app.command("list")
def list_(file: File, json: Json = False) -> None:
    """Show the keys of a file, which does not have their secrets."""
    with _translated(file):
        found = keys.read(file)
    now = datetime.now(UTC)
    rows = [
        {
            "id": key.id,
            "tenant": key.tenant,
            "principal": key.principal,
            "role": key.role,
            "created": key.created,
            "expires": key.expires,
            "state": "revoked" if key.revoked else "valid" if key.valid(now) else "expired",
        }
        for key in found
    ]
    if json:
        print_json(rows)
        return
    header = [name.upper() for name in FIELDS]
    print_table(header, [[_cell(row[name]) for name in FIELDS] for row in rows])


@app.command("revoke")
def revoke(
    file: File, id: Annotated[str, typer.Argument(help="The part between trk_ and the next _.")]
) -> None:
    """Make a key invalid, within a second or so after the gateway can see the file."""
    with _translated(file):
        try:
            key = keys.revoke(file, id)
        except KeyError:
            raise LocalError(line(f"There is no key {id} in {file}.")) from None
    print(line(f"Key {key.id} of {key.principal} is revoked."))


def _cell(value: object) -> str:
    if isinstance(value, datetime):
        return value.date().isoformat()
    return "-" if value is None else str(value)


@contextmanager
def _translated(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LocalError(line(f"Cannot use {file} ({error.strerror}).")) from error
    except ValueError as error:
        raise LocalError(line(f"{file}: {error}.")) from error
