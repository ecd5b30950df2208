"""`tworoads status`."""

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from rich.live import Live
from rich.text import Text
from tworoads.v1.answer_pb2 import GetServerInfoResponse

from clients.cli.output import Address, Json, print_json, run, table
from clients.client import Client, TworoadsError
from clients.health import is_ready
from clients.load import load_of
from clients.local import (
    LocalError,
    ServiceState,
    StackState,
    command,
    data_folder,
    holder,
    read_state,
)

ANSWER_SECONDS = 2.0
WATCH_SECONDS = 1.0
HEADINGS = (
    "service",
    "status",
    "replicas",
    "running",
    "waiting",
    "queued",
    "cache hits",
    "uptime",
    "restarts",
    "memory",
)
REPLICA_HEADINGS = ("replica", "status", "running", "waiting", "cache use")
Shown = tuple[dict[str, Any], list[str]]  # for programs, and for people


def status(
    context: typer.Context,
    json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew every second.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the stack.", show_default="the user's own")
    ] = None,
    address: Address = "",
) -> None:
    """Show how every service is, how busy, and which paths are open. Exit code 1 if no stack
    runs. With an address it shows what that gateway says of itself."""
    if json and watch:
        raise typer.BadParameter("--json shows it once; leave out --watch")
    if data and address:
        source = context.get_parameter_source("address")
        if source and source.name != "ENVIRONMENT":
            raise typer.BadParameter("--data is for a stack on this machine; leave out --address")
        address = ""
    if address:
        _show(lambda: _remote(address), json, watch)
        return
    folder = (data or data_folder()).absolute()
    _show(lambda: _local(folder, json), json, watch)


def _show(look: Callable[[], Shown], json: bool, watch: bool) -> None:
    found, lines = look()
    if json:
        print_json(found)
        return
    if not watch:
        print("\n".join(lines))
        return
    with Live(Text("\n".join(lines)), auto_refresh=False) as live, suppress(KeyboardInterrupt):
        while True:
            time.sleep(WATCH_SECONDS)
            try:
                _, lines = look()
            except LocalError as error:  # it may come back
                lines = [str(error)]
            live.update(Text("\n".join(lines)), refresh=True)


def _local(folder: Path, json: bool) -> Shown:
    """Look at the stack of a data folder. Raises typer.Exit if none runs."""
    pid, state = holder(folder), read_state(folder)
    if pid is None or state is None:
        if json:
            print_json({"running": False, "data": str(folder)})
        else:
            print(f"Nothing runs on {folder}; `{command('up', folder)}` starts it.")
        raise typer.Exit(1)
    services, server = asyncio.run(_ask(state))
    found = {
        "running": True,
        "data": str(folder),
        "pid": pid,
        "address": state.address,
        "store": state.store,
        "model": state.model,
        "services": services,
        "server": server,
    }
    about = f"{state.address}, model {state.model}, store {state.store}, data in {folder}"
    return found, [about, *table(HEADINGS, map(_row, services)), *_paths(server or {})]


def _remote(address: str) -> Shown:
    """Ask a gateway. Raises LocalError if it does not answer."""

    async def ask(client: Client) -> dict[str, Any]:
        return _plain(await client.server_info())

    server = run(address, ask)
    about = (
        f"{address}, tworoads {server['version']}, model {server['model'] or 'away'}, "
        f"embedding model {server['embedding_model'] or 'away'}"
    )
    replicas = table(REPLICA_HEADINGS, map(_replica_row, server["replicas"]))
    lines = [about, *(replicas if server["replicas"] else []), *_paths(server)]
    return {"running": True, "address": address, "server": server}, lines


async def _ask(state: StackState) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Return how each service is, and what the gateway says of itself, None if it says nothing."""
    kept = [service for service in state.services if service.status != "done"]
    # Not at once: the gateway would count the question as one of its calls.
    services = await asyncio.gather(*map(_service, kept))
    return services, await _server_info(state.address)


async def _service(state: ServiceState) -> dict[str, Any]:
    alive = state.pid is not None and _alive(state.pid)
    ready = alive and await is_ready(state.address, state.health, ANSWER_SECONDS)
    load = await load_of(state.metrics) if ready and state.metrics else None
    return {
        "name": state.name,
        "status": "ready" if ready else "starting" if alive else "down",
        "replicas": 1,
        "ready_replicas": int(ready),
        "pid": state.pid if alive else None,
        "address": state.address,
        "metrics": state.metrics,
        "uptime_seconds": round(time.time() - state.started, 1) if alive else 0.0,
        "restarts": state.restarts,
        "memory_bytes": _memory(state.pid) if state.pid and alive else 0,
        "load": asdict(load) if load else None,
    }


async def _server_info(address: str) -> dict[str, Any] | None:
    with suppress(TworoadsError, TimeoutError):
        async with asyncio.timeout(ANSWER_SECONDS), Client(address) as client:
            return _plain(await client.server_info())
    return None


def _plain(info: GetServerInfoResponse) -> dict[str, Any]:
    return MessageToDict(
        info, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def _paths(server: dict[str, Any]) -> list[str]:
    return [
        f"{path['path']}: {'open' if path['open'] else path['reason']}"
        for path in server.get("paths", [])
    ]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _memory(session: int) -> int:
    """Return the resident memory, in bytes, of all processes of a session."""
    pages = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            fields = stat.read_text().rpartition(")")[2].split()  # proc(5), from the state on
            pages += int(fields[21]) if int(fields[3]) == session else 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _row(service: dict[str, Any]) -> tuple[str, ...]:
    load = service["load"] or {}
    return (
        service["name"],
        service["status"],
        f"{service['ready_replicas']}/{service['replicas']}",
        *(str(load.get(key, "-")) for key in ("running", "waiting", "queued")),
        _percent(load.get("cache_hits")),
        str(timedelta(seconds=int(service["uptime_seconds"]))),
        str(service["restarts"]),
        f"{service['memory_bytes'] / 2**20:.0f} MiB",
    )


def _replica_row(replica: dict[str, Any]) -> tuple[str, ...]:
    return (
        replica["name"],
        "ready" if replica["ready"] else "down",
        str(replica["running"]),
        str(replica["waiting"]),
        _percent(replica["cache_use"]),
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
