"""`tworoads status`."""

import asyncio
import os
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from google.protobuf.json_format import MessageToDict
from tworoads.v1.answer_pb2 import GetServerInfoRequest
from tworoads.v1.answer_pb2_grpc import AnswerServiceStub

from clients.cli.output import Json, print_json, print_table
from clients.health import OPTIONS, is_ready
from clients.local import ServiceState, StackState, command, data_folder, holder, read_state

ANSWER_SECONDS = 2.0
HEADINGS = ("service", "status", "pid", "address", "uptime", "restarts", "memory")


def status(
    json: Json = False,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the stack.", show_default="the user's own")
    ] = None,
) -> None:
    """Show how every service of the stack is. Exit code 1 if no stack runs."""
    folder = (data or data_folder()).absolute()
    pid = holder(folder)
    state = read_state(folder)
    if pid is None or state is None:
        if json:
            print_json({"running": False, "data": str(folder)})
        else:
            print(f"Nothing runs on {folder}; `{command('up', folder)}` starts it.")
        raise typer.Exit(1)
    services, server = asyncio.run(_ask(state))
    if json:
        print_json(
            {
                "running": True,
                "data": str(folder),
                "pid": pid,
                "address": state.address,
                "store": state.store,
                "model": state.model,
                "services": services,
                "server": server,
            }
        )
        return
    print(f"{state.address}, model {state.model}, store {state.store}, data in {folder}")
    print_table(HEADINGS, map(_row, services))
    for path in (server or {}).get("paths", []):
        print(f"{path['path']}: {'open' if path['open'] else path['reason']}")


async def _ask(state: StackState) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Return how each service is, and what the gateway says of itself, None if it says nothing."""
    kept = [service for service in state.services if service.status != "done"]
    services, server = await asyncio.gather(
        asyncio.gather(*map(_service, kept)), _server_info(state.address)
    )
    return list(services), server


async def _service(state: ServiceState) -> dict[str, Any]:
    alive = state.pid is not None and _alive(state.pid)
    ready = alive and await is_ready(state.address, state.health, ANSWER_SECONDS)
    return {
        "name": state.name,
        "status": "ready" if ready else "starting" if alive else "down",
        "pid": state.pid if alive else None,
        "address": state.address,
        "metrics": state.metrics,
        "uptime_seconds": round(time.time() - state.started, 1) if alive else 0.0,
        "restarts": state.restarts,
        "memory_bytes": _memory(state.pid) if state.pid and alive else 0,
    }


async def _server_info(address: str) -> dict[str, Any] | None:
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        try:
            answer = await AnswerServiceStub(channel).GetServerInfo(
                GetServerInfoRequest(), timeout=ANSWER_SECONDS
            )
        except grpc.aio.AioRpcError:
            return None
    return MessageToDict(
        answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


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
    return (
        service["name"],
        service["status"],
        str(service["pid"] or "-"),
        service["address"],
        str(timedelta(seconds=int(service["uptime_seconds"]))),
        str(service["restarts"]),
        f"{service['memory_bytes'] / 2**20:.0f} MiB",
    )
