"""Starting a Weaviate server, with other programs in the place of its binary."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from services.retrieval.stores.weaviate_server import WeaviateServer, find_binary, free_ports
from services.runtime.errors import NotReady


def make_program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


async def test_a_binary_that_the_user_names_is_taken(tmp_path: Path) -> None:
    program = make_program(tmp_path / "mine", "exit 0")
    assert await find_binary(program) == program


@pytest.mark.parametrize("name", ["nothing", "."])
async def test_a_name_that_is_no_program_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(NotReady) as caught:
        await find_binary(tmp_path / name)
    assert caught.value.reason == "WEAVIATE_MISSING"


async def test_a_binary_on_the_path_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = make_program(tmp_path / "weaviate", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert await find_binary() == program


async def test_a_server_that_ends_at_once_is_reported(tmp_path: Path) -> None:
    program = make_program(tmp_path / "broken", "echo broken; exit 3")
    with pytest.raises(NotReady) as caught:
        async with WeaviateServer(program, tmp_path / "data") as server:
            assert server
    assert caught.value.reason == "WEAVIATE_FAILED"
    assert (tmp_path / "data" / "weaviate.log").read_text() == "broken\n"


async def test_a_server_never_outlives_its_parent(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    program = make_program(
        tmp_path / "slow", f"echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; exec sleep 600"
    )
    script = (
        "import asyncio; from pathlib import Path\n"
        "from services.retrieval.stores.weaviate_server import WeaviateServer\n"
        f"asyncio.run(WeaviateServer(Path({str(program)!r}), Path({str(tmp_path)!r})).start())\n"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", script)
    async with asyncio.timeout(30):
        while not pid_file.exists():
            assert parent.returncode is None
            await asyncio.sleep(0.02)
        child = int(pid_file.read_text())
        os.kill(child, 0)
        parent.kill()
        await parent.wait()
        while is_running(child):
            await asyncio.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_free_ports_are_rows_of_different_ports() -> None:
    counts = (1, 1, 2, 2)
    firsts = free_ports(*counts)
    ports = [first + n for first, count in zip(firsts, counts, strict=True) for n in range(count)]
    assert len(set(ports)) == 6 and min(ports) > 1024
