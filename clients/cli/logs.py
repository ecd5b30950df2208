"""`tworoads logs`."""

import json
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from clients.cli.output import Json, plain
from clients.local import LocalError, data_folder

POLL_SECONDS = 0.2


def logs(
    service: Annotated[str, typer.Argument(help="One service.", show_default="all")] = "",
    number: Annotated[int, typer.Option("-n", min=1, help="Last lines of each service.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    as_json: Json = False,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the stack.", show_default="the user's own")
    ] = None,
) -> None:
    """Print the last lines of the services' logs, in the order of their times."""
    folder = (data or data_folder()).absolute() / "logs"
    files = {path.stem: path for path in sorted(folder.glob("*.log"))}
    if service and service not in files:
        known = ", ".join(files) or "none"
        raise LocalError(f"There is no log of {service} in {folder}; there are: {known}.")
    tails = [Tail(name, files[name]) for name in ([service] if service else files)]
    entries = [entry for tail in tails for entry in tail.read()[-number:]]
    _print(sorted(entries, key=lambda entry: entry["time"]), as_json)
    try:
        while follow:
            time.sleep(POLL_SECONDS)
            _print([entry for tail in tails for entry in tail.read()], as_json)
    except KeyboardInterrupt:
        return


class Tail:
    """Reads a service's log as it grows, and the next one when a new stack begins it."""

    def __init__(self, service: str, path: Path) -> None:
        self._service = service
        self._path = path
        self._file = path.open("rb")
        self._rest = b""
        self._time = ""

    def read(self) -> list[dict[str, Any]]:
        """Return the entries since the last call: time, service, message and what else is known.

        A line that is not JSON is an entry with the time of the one before it.
        """
        data = self._rest + self._file.read()
        if self._path.exists() and self._path.stat().st_ino != os.fstat(self._file.fileno()).st_ino:
            self._file.close()
            self._file = self._path.open("rb")
            data += self._file.read()
        *lines, self._rest = data.split(b"\n")
        return [self._entry(line.decode(errors="replace")) for line in lines if line]

    def _entry(self, line: str) -> dict[str, Any]:
        entry = {"time": self._time, "service": self._service} | parse(line)
        self._time = entry["time"]
        return entry


def parse(line: str) -> dict[str, Any]:
    """Return a line of a log as the fields that it has; one of another form is all message."""
    try:
        fields = json.loads(line)
        datetime.fromisoformat(fields["time"])
        return {**fields, "level": str(fields["level"]), "message": str(fields["message"])}
    except (ValueError, TypeError, KeyError):
        return {"message": line}


def readable(entry: dict[str, Any]) -> str:
    """Return an entry as a line for people, its time in the local zone; exceptions follow it."""
    words = [entry.get("service", ""), str(entry.get("level", "")), str(entry["message"])]
    if "level" in entry:
        words.insert(0, f"{datetime.fromisoformat(entry['time']).astimezone():%H:%M:%S}")
        if entry.get("request", "-") != "-":
            words.append(f"[{entry['request']}]")
    if "exception" in entry:
        words[-1] += f"\n{entry['exception']}"
    return plain(" ".join(filter(None, words)))


def _print(entries: list[dict[str, Any]], as_json: bool) -> None:
    for entry in entries:
        print(json.dumps(entry, ensure_ascii=False) if as_json else readable(entry), flush=True)
