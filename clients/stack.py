"""Which processes a stack on this machine is made of, and where each finds the others."""

import os
import random
import re
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from clients.local import LocalError, cache_folder
from clients.supervisor import Child
from services.generation.prepare import DEFAULT

HOST = "127.0.0.1"
# Below the ports that outgoing connections get: none of those can take a service's port while the
# service is started again, nor connect to itself when nobody listens.
PORTS = range(20_000, 32_768)
MODEL = ("TWOROADS_GENERATION_MODEL", "TWOROADS_TUNING_MODEL")
GRACE_SECONDS = 5  # shorter than the supervisor waits before it kills
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?(@[\w.-]+)?")  # or the name of a package


@dataclass(frozen=True)
class Stack:
    """What to run. `address` is the front's, HOST:PORT; `store` and `model` are for people."""

    address: str
    store: str
    model: str
    children: tuple[Child, ...]


def plan(
    folder: Path,
    store: str,
    weaviate: str,
    weaviate_key_file: Path | None,
    model: str,
    port: int,
    keys: Path | None = None,
) -> Stack:
    """Return the stack for a data folder, the front last.

    `store` is lancedb or weaviate; `weaviate` the address of a server, HOST:PORT,GRPC_PORT, empty
    to start one; `model` a folder or a hub id, empty for the small one from packages; `port` the
    front's, which demands one of `keys` if that file is given. Raises LocalError if an address, the
    model or the file cannot be used, or the port is taken.
    """
    if keys and not keys.is_file():
        raise LocalError(f"There is no file of keys {keys}; `tworoads keys add` makes one.")
    if not _free(port):
        raise LocalError(
            f"Port {port} of {HOST} is taken by another program; choose another with --port."
        )
    embedding, retrieval, generation, tuning, evaluation, internal, *metrics = free_addresses(12)
    front = f"{HOST}:{port}"
    model = model or DEFAULT
    preparing = _preparing(model)
    store_env, store_children = _store(folder, store, weaviate, weaviate_key_file)
    services = (
        _service("embedding", "EmbeddingService", embedding, metrics[0], {}),
        _service(
            "retrieval",
            "RetrievalService",
            retrieval,
            metrics[1],
            {"EMBEDDING": embedding, "STORE": store, **store_env},
        ),
        _service(
            "generation",
            "GenerationService",
            generation,
            metrics[2],
            {"TUNING": tuning, "ADAPTERS": str(folder / "generation")},
        ),
        _service(
            "tuning",
            "TuningService",
            tuning,
            metrics[3],
            {
                "FOLDER": str(folder / "tuning"),
                "GENERATION": generation,
                "RETRIEVAL": retrieval,
            },
        ),
        _service(
            "evaluation",
            "EvaluationService",
            evaluation,
            metrics[4],
            {"FOLDER": str(folder / "evaluation"), "GATEWAY": internal},
        ),
        _service(
            "gateway",
            "AnswerService",
            front,
            metrics[5],
            {
                "RETRIEVAL": retrieval,
                "EMBEDDING": embedding,
                "GENERATION": generation,
                "TUNING": tuning,
                "EVALUATION": evaluation,
                "INTERNAL": internal,
                **({"KEYS": str(keys.absolute())} if keys else {}),
            },
        ),
    )
    return Stack(front, store, Path(model).name, (preparing, *store_children, *services))


def module(name: str, *arguments: str) -> tuple[str, ...]:
    """Return the command line of a module, which the current folder cannot shadow."""
    return (sys.executable, "-P", "-m", name, *arguments)


def free_addresses(count: int) -> list[str]:
    """Return addresses of this machine that nobody listens on."""
    free = filter(_free, random.sample(PORTS, len(PORTS)))
    return [f"{HOST}:{port}" for port, _ in zip(free, range(count), strict=False)]


def _service(name: str, service: str, listen: str, metrics: str, env: dict[str, str]) -> Child:
    prefix = f"TWOROADS_{name.upper()}_"
    env = {"LISTEN": listen, "METRICS": metrics, "GRACE_SECONDS": str(GRACE_SECONDS), **env}
    return Child(
        name,
        module(f"services.{name}"),
        {prefix + key: value for key, value in env.items()} | _no_proxy(),
        listen,
        f"tworoads.v1.{service}",
        metrics,
    )


def _preparing(model: str) -> Child:
    """Return what finds or makes the model's folder and tells it to those who load it."""
    folder = Path(model).expanduser().absolute()
    if not folder.is_dir() and not HUB_ID.fullmatch(model):
        raise LocalError(f"There is no model folder {folder}; --model takes a folder or a hub id.")
    source = str(folder) if folder.is_dir() else model
    out = str(cache_folder() / "models")
    argv = module("services.generation.prepare", "--out", out, "--model", source)
    return Child("model", argv, once=True, gives=MODEL)


def _store(
    folder: Path, store: str, weaviate: str, key_file: Path | None
) -> tuple[dict[str, str], tuple[Child, ...]]:
    """Return retrieval's settings for the store, and the server that it needs, if any."""
    if store == "lancedb":
        return {"FOLDER": str(folder / "store")}, ()
    if weaviate:
        host, _, ports = weaviate.rpartition(":")
        http, _, grpc = ports.partition(",")
        if not (host and http.isdecimal() and grpc.isdecimal()):
            raise LocalError(f"--weaviate takes HOST:PORT,GRPC_PORT, not {weaviate}.")
        if key_file and not key_file.is_file():
            raise LocalError(f"There is no key file {key_file}.")
        key = {"WEAVIATE_KEY_FILE": str(key_file.absolute())} if key_file else {}
        return {"WEAVIATE_HTTP": f"{host}:{http}", "WEAVIATE_GRPC": f"{host}:{grpc}", **key}, ()
    from clients.weaviate import children

    settings, processes = children(folder, module("clients.weaviate"))
    return settings, tuple(processes)


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _no_proxy() -> dict[str, str]:
    """Keep calls on this machine away from a proxy that the user's environment names."""
    others = os.environ.get("no_proxy", "")
    return {"no_proxy": f"{others},{HOST},localhost".lstrip(",")}
