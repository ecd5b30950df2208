"""`tworoads up` and `tworoads down`."""

import os
import signal
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from clients.cli.running import run_detached, run_here
from clients.local import DEFAULT_PORT, LocalError, data_folder, holder, lock
from clients.stack import plan

STOP_SECONDS = 45.0  # more than twice what the supervisor gives a child

Data = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the stack: documents, adapters, logs.", show_default="the user's own"
    ),
]


class StoreChoice(StrEnum):
    lancedb = "lancedb"
    weaviate = "weaviate"


def up(
    detach: Annotated[bool, typer.Option("--detach", help="Return once it is ready.")] = False,
    store: Annotated[
        StoreChoice,
        typer.Option(help="Where documents are kept: in process, or a Weaviate server."),
    ] = StoreChoice.lancedb,
    weaviate: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT,GRPC_PORT",
            help="A Weaviate server that runs already; without it --store weaviate starts one.",
        ),
    ] = "",
    weaviate_key_file: Annotated[
        Path | None, typer.Option(help="File that holds the API key of that server.")
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            metavar="PATH_OR_ID",
            help="Language model: a local folder, or an id on the Hugging Face hub.",
            show_default="a small one from packages",
        ),
    ] = "",
    keys: Annotated[
        Path | None,
        typer.Option(
            help="File of API keys, made by `tworoads keys add`: only who has one gets in.",
            show_default="who can reach the port gets in",
        ),
    ] = None,
    data: Data = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve on.")] = DEFAULT_PORT,
) -> None:
    """Start everything on this machine and keep it running until Ctrl-C.

    The first start prepares the model, which takes a minute. Logs are kept in the data folder; a
    service that crashes is started again. TWOROADS_DATA_DIR names another data folder.
    """
    if (weaviate or weaviate_key_file) and store is not StoreChoice.weaviate:
        raise typer.BadParameter("--weaviate and --weaviate-key-file need --store weaviate")
    if weaviate_key_file and not weaviate:
        raise typer.BadParameter("--weaviate-key-file needs --weaviate")
    folder = (data or data_folder()).absolute()
    if detach:
        options = ["--store", store.value, "--data", str(folder), "--port", str(port)]
        options += ["--model", model] if model else []
        options += ["--weaviate", weaviate] if weaviate else []
        options += ["--weaviate-key-file", str(weaviate_key_file)] if weaviate_key_file else []
        options += ["--keys", str(keys)] if keys else []
        run_detached([sys.executable, "-P", "-m", "clients.cli", "up", *options], folder)
        return
    with lock(folder):
        run_here(plan(folder, store.value, weaviate, weaviate_key_file, model, port, keys), folder)


def down(data: Data = None) -> None:
    """Stop the stack of the data folder and wait until it has stopped."""
    folder = (data or data_folder()).absolute()
    pid = holder(folder)
    if pid is None:
        print(f"Nothing runs on {folder}.")
        return
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while holder(folder) == pid:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)  # its children die with it
            raise LocalError(f"The stack did not stop within {STOP_SECONDS:g} s and was killed.")
        time.sleep(0.05)
    print("Stopped.")
