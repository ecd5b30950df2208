"""The stack of docker-compose.yml on the images of the Dockerfile, without a container engine.

An image is built in a clean virtual environment from the extras and the files of its target alone.
A container runs as the user of the image on a read-only root, with the environment, the volumes and
the command of docker-compose.yml, and nothing else of this machine but its Python and /usr.
"""

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import pytest_asyncio

from clients.client import Client
from clients.documents import NewDocument
from clients.errors import TworoadsError
from services.retrieval.stores.weaviate_server import find_binary
from services.runtime.healthy import is_healthy
from tests.compose import ADDRESS, SERVICES, services
from tests.dockerfile import build
from tests.real.container import Image, Network, Pod, ended, weaviate
from tests.real.random_adapter import layers, random_adapter

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="root gives containers their own file systems"
)

# The index of PyTorch's builds without CUDA is no package registry, and a build with it computes
# the same on a processor. Bytecode is left out: compiling it takes longer than to start once.
BUILD = {"UV_TORCH_BACKEND": "", "UV_LINK_MODE": "hardlink", "UV_COMPILE_BYTECODE": ""}
SECRETS = {"weaviate-key": {"key": b"a-key-of-the-test\n"}}
CLUSTER = ".tworoads.svc.cluster.local"  # as tests.real.container knows hosts
MODEL_SECONDS = 600
READY_SECONDS = 600
STOP_SECONDS = 60
DOCUMENT = "The full-time employees get 27 days of paid leave a year."

# Imports each module that starts nothing when it is imported; tells what else could be imported.
IMPORT_ALL = """
import importlib, pkgutil, services
from importlib.util import find_spec
for module in pkgutil.walk_packages(services.__path__, "services."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print("found:", *(name for name in ("torch", "vllm", "clients", "pytest") if find_spec(name)))
"""
FOUND = {"embedding": ["torch"], "generation": ["torch", "vllm"], "tuning": ["torch"]}


class Host:
    """Runs services of docker-compose.yml. What they are made of and what they keep is in `folder`;
    `images` has those that are not built here."""

    def __init__(self, folder: Path, images: dict[str, Image]) -> None:
        self.network = Network({name: ports(name) for name in (*SERVICES, "weaviate", "model")})
        self._folder = folder
        self._images = images
        self.models = folder / "pods-0" / "model" / "volumes" / "models"
        self._numbers = count()

    def image(self, name: str) -> Image:
        if name not in self._images:
            made = build(name, self._folder / "images", **BUILD)
            files = {path: made.folder / path[1:] for path in ("/opt/venv", "/opt/tworoads")}
            files[sys.base_prefix] = Path(sys.base_prefix)
            self._images[name] = Image(made.entrypoint, made.environment, files)
        return self._images[name]

    @contextmanager
    def container(self, name: str, *command: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
        """Run a service while the block runs, or a `command` on its image, and yield its process
        and its log. The first one is the model, which the others read."""
        image, (workload, container) = self.image(name), manifest(name)
        if "models:/models:ro" in services()[name].get("volumes", ()):
            image = replace(image, files={**image.files, "/models": self.models})
        if command:
            container |= {"command": command, "args": ()}
        pod = Pod(workload, self._folder / f"pods-{next(self._numbers)}", self.network, SECRETS)
        process = pod.start(container, image)
        try:
            yield process, pod.log(name)
        finally:
            process.kill()
            process.wait()


def manifest(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a service as a manifest would have it: the workload, and its container."""
    service = services()[name]
    volumes: list[dict[str, Any]] = [{"name": "tmp"}]
    mounts: list[dict[str, Any]] = [{"name": "tmp", "mountPath": "/tmp"}]
    for volume in service.get("volumes", ()):
        source, _, path = volume.rpartition(":")
        if path != "ro":
            volumes.append({"name": source or "data"})
            mounts.append({"name": source or "data", "mountPath": path})
    for secret in service.get("secrets", ()):
        volumes.append({"name": "secret", "secret": {"secretName": secret["source"]}})
        folder = os.path.dirname(secret["target"])
        mounts.append({"name": "secret", "mountPath": folder, "readOnly": True})
    user, group = map(int, service["user"].split(":"))
    context = {"runAsUser": user, "runAsGroup": group, "fsGroup": group}
    container = {"name": name, "volumeMounts": mounts, "env": environment(service)}
    for theirs, ours in (("command", "entrypoint"), ("args", "command")):
        if ours in service:
            container[theirs] = [part.replace("$$", "$") for part in service[ours]]
    spec = {"securityContext": context, "volumes": volumes}
    return {"metadata": {"name": name}, "spec": {"template": {"spec": spec}}}, container


def environment(service: dict[str, Any]) -> list[dict[str, str]]:
    """Return the environment with the hosts as a cluster would name them."""

    def there(value: str) -> str:
        found = ADDRESS.fullmatch(value)
        return value.replace(f"{found[1]}:", f"{found[1]}{CLUSTER}:") if found else value

    return [{"name": k, "value": there(v)} for k, v in service.get("environment", {}).items()]


def ports(name: str) -> list[int]:
    """Return the ports that a service listens on."""
    service = services()[name]
    said = " ".join(service.get("command", ()))
    for key, value in service.get("environment", {}).items():
        said += f" --port {value}" if key.endswith("_PORT") else f" {value}"
    return [int(port) for port in re.findall(r"(?:0\.0\.0\.0:|--port )(\d+)", said)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host() -> Any:
    # In the file system of uv's cache, whose files are linked, and open to the images' user.
    with TemporaryDirectory(prefix="tworoads-images-", dir="/var/tmp") as made:
        folder = Path(made)
        folder.chmod(0o755)
        images = {"weaviate": weaviate(await find_binary(say=print))}
        host = Host(folder, images)
        with host.container("model") as (process, log):
            code = await asyncio.to_thread(process.wait, MODEL_SECONDS)
            assert code == 0, log.read_text()
        yield host


@pytest.mark.parametrize("name", SERVICES)
def test_an_image_has_what_its_modules_import_and_nothing_heavy_besides(
    name: str, host: Host
) -> None:
    with host.container(name, "/opt/venv/bin/python", "-P", "-c", IMPORT_ALL) as (process, log):
        code = process.wait(READY_SECONDS)
    *_, last = log.read_text().splitlines() or [""]
    assert code == 0, log.read_text()
    assert last.split()[1:] == FOUND.get(name, [])


@pytest.mark.asyncio(loop_scope="module")
async def test_the_stack_answers_from_its_images_by_both_roads(host: Host, tmp_path: Path) -> None:
    until = time.monotonic() + READY_SECONDS
    with ExitStack() as stack:
        started = {}
        for name in ("weaviate", *SERVICES):
            started[name] = stack.enter_context(host.container(name))
        for name in SERVICES:
            process, log = started[name]
            while not await asyncio.to_thread(is_healthy, host.network.address(name, 8081)):
                assert process.poll() is None and time.monotonic() < until, log.read_text()
                await asyncio.sleep(0.2)
        async with Client(host.network.address("gateway", 50050)) as client:
            while True:  # compose waits for the store
                try:
                    await client.create_corpus("handbook")
                    break
                except TworoadsError as error:
                    assert error.reason == "STORE_UNAVAILABLE" and time.monotonic() < until, error
                    await asyncio.sleep(0.5)
            document = NewDocument("leave", DOCUMENT.encode())
            async for _ in client.ingest("handbook", [document]):
                pass
            answer = await client.ask(
                "How many days of paid leave?", corpus="handbook", path="rag", timeout=60
            )
            assert "27" in answer.text
            shapes = layers(host.models / "model", "q_proj")
            for name, content in random_adapter(shapes, seed=1).items():
                (tmp_path / name).write_bytes(content)
            adapter = await client.import_adapter(tmp_path, "house")
            answer = await client.ask(
                "How many days of paid leave?", path="tuned", adapter="house", timeout=60
            )
            assert answer.text and (answer.path, answer.adapter) == ("tuned", adapter.id)
            assert not await client.jobs() and not await client.comparisons()
        for name in SERVICES:
            assert ended(started[name][0], STOP_SECONDS) == 0, started[name][1].read_text()
