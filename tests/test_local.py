import asyncio
import json
import os
import platform
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clients import local
from clients.cli.app import app
from clients.cli.running import run_detached
from clients.local import LocalError, ServiceState, StackState, read_state, write_state
from clients.stack import free_addresses, module, plan
from clients.supervisor import Child, Policy, StartFailed, Supervisor
from tests.fake_stack import QUICK, fake


async def until(condition: Callable[[], object], seconds: float = 10) -> None:
    """Wait for what another process does; fail if it does not."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def runs(pid: int | None) -> bool:
    """Tell whether a process lives; one that is dead and not yet reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Recorded:
    """What a supervisor has said of its children."""

    def __init__(self) -> None:
        self.states: list[tuple[ServiceState, ...]] = []

    def last(self, name: str) -> ServiceState:
        return next(state for state in self.states[-1] if state.name == name)

    def history(self, name: str) -> list[ServiceState]:
        """The states that a child went through, each once."""
        seen = (state for states in self.states for state in states if state.name == name)
        return list(dict.fromkeys(seen))


@asynccontextmanager
async def supervised(
    children: Sequence[Child], folder: Path, policy: Policy = QUICK
) -> AsyncIterator[Recorded]:
    """Run the children until the block ends; it begins when all are ready."""
    recorded = Recorded()
    supervisor = Supervisor(children, folder, recorded.states.append, policy)
    work = asyncio.create_task(supervisor.run())
    ready = asyncio.create_task(supervisor.ready.wait())
    await asyncio.wait((work, ready), return_when=asyncio.FIRST_COMPLETED)
    ready.cancel()
    if work.done():
        work.result()
    try:
        yield recorded
    finally:
        supervisor.stop()
        await work


@contextmanager
def fake_up(folder: Path, how: str = "") -> Iterator[subprocess.Popen[str]]:
    """Run a stack of fake services in a process of its own."""
    argv = [*module("tests.fake_stack"), str(folder), *([how] if how else [])]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def free_port() -> int:
    [address] = free_addresses(1)
    return int(address.rpartition(":")[2])


async def ready(folder: Path) -> StackState:
    """Wait until the stack of a folder is ready."""
    await until(lambda: (state := read_state(folder)) and state.ready)
    state = read_state(folder)
    assert state
    return state


async def test_preparations_come_first_and_then_all_start_and_get_ready(tmp_path: Path) -> None:
    prepare = Child("model", module("platform"), once=True, gives=["PLATFORM", "SYSTEM"])
    async with supervised([prepare, fake("a", tmp_path), fake("b", tmp_path)], tmp_path) as seen:
        steps = [tuple(state.status for state in states) for states in seen.states]
        assert steps[:5] == [
            ("waiting", "waiting", "waiting"),
            ("starting", "waiting", "waiting"),
            ("done", "waiting", "waiting"),
            ("done", "starting", "waiting"),
            ("done", "starting", "starting"),
        ]
        assert steps[-1] == ("done", "ready", "ready")
        pids = [seen.last(name).pid for name in ("a", "b")]
        environment = Path(f"/proc/{pids[0]}/environ").read_text().split("\0")
        for variable in ("PLATFORM", "SYSTEM"):
            assert f"{variable}={platform.platform()}" in environment
    assert not any(map(runs, pids))
    assert (tmp_path / "stopped").read_text() == "b\na\n"  # the front, then the rest


@pytest.mark.parametrize(("healthy", "waits"), [(60, [0.1, 0.15]), (0, [0.1, 0.1])])
async def test_a_crashed_service_starts_again_later_each_time_unless_it_was_healthy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, healthy: float, waits: list[float]
) -> None:
    policy = Policy(first_wait=0.1, longest_wait=0.15, healthy=healthy)
    async with supervised([fake("a", tmp_path, "--with-child")], tmp_path, policy) as seen:
        for crash in (1, 2):
            child = int((tmp_path / "child").read_text())
            os.kill(seen.last("a").pid or 0, signal.SIGKILL)
            await until(lambda: seen.last("a").restarts == crash)  # noqa: B023
            await until(lambda: seen.last("a").status == "ready")
            assert not runs(child)
        history = seen.history("a")
    downs = [state for state in history if state.status == "down"]
    ups = [state for state in history if state.status == "starting"][1:]
    waited = [up.since - down.since for down, up in zip(downs, ups, strict=True)]
    assert all(took >= wait for took, wait in zip(waited, waits, strict=True))
    warnings = [record.args for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [("a", "was killed by signal 9", wait) for wait in waits]


async def test_a_service_that_never_starts_ends_all_with_the_end_of_its_log(tmp_path: Path) -> None:
    children = [fake("a", tmp_path), fake("b", tmp_path, "--fail")]
    with pytest.raises(StartFailed, match="b does not start: 2 times in a row") as failure:
        async with supervised(children, tmp_path) as seen:
            pytest.fail(f"ready: {seen.states[-1]}")
    assert failure.value.tail == "b cannot find its model\nb cannot find its model"


async def test_a_preparation_that_fails_ends_all_before_a_service_starts(tmp_path: Path) -> None:
    prepare = Child("model", module("no.such.module"), once=True)
    with pytest.raises(StartFailed, match="model") as failure:
        async with supervised([prepare, fake("a", tmp_path)], tmp_path) as seen:
            pytest.fail(f"ready: {seen.states[-1]}")
    assert "No module named" in failure.value.tail
    assert not (tmp_path / "logs" / "a.log").exists()


async def test_a_service_that_does_not_stop_in_time_is_killed(tmp_path: Path) -> None:
    policy = replace(QUICK, grace=0.2)
    async with supervised([fake("a", tmp_path, "--stubborn")], tmp_path, policy) as seen:
        pid = seen.last("a").pid
        assert runs(pid)
    assert not runs(pid)


async def test_sigterm_stops_everything_and_forgets_the_state(tmp_path: Path) -> None:
    with fake_up(tmp_path) as process:
        state = await ready(tmp_path)
        assert local.holder(tmp_path) == state.pid == process.pid
        process.terminate()
        output, errors = process.communicate(timeout=10)
    assert process.returncode == 0
    assert errors == ""
    assert f"Ready on {state.address}, model fake model, store fake store" in output
    assert not any(runs(service.pid) for service in state.services)
    assert read_state(tmp_path) is None and local.holder(tmp_path) is None
    assert (tmp_path / "stopped").read_text() == "front\nback\n"


async def test_a_second_signal_kills_what_does_not_stop(tmp_path: Path) -> None:
    with fake_up(tmp_path, "--stubborn") as process:
        state = await ready(tmp_path)
        process.send_signal(signal.SIGINT)
        await until(lambda: not runs(state.services[1].pid))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == 0
    assert not any(runs(service.pid) for service in state.services)


async def test_nothing_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    with fake_up(tmp_path) as process:
        state = await ready(tmp_path)
        process.kill()
        process.wait()
        await until(lambda: not any(runs(service.pid) for service in state.services), seconds=3)
    assert local.holder(tmp_path) is None


async def test_a_second_stack_on_the_folder_is_told_of_the_first(tmp_path: Path) -> None:
    with fake_up(tmp_path) as first:
        await ready(tmp_path)
        with fake_up(tmp_path) as second:
            _, errors = second.communicate(timeout=10)
        assert second.returncode == 1
        assert errors == (
            f"Error: A stack already runs on {tmp_path} (process {first.pid}); stop it with "
            f"`tworoads down --data {tmp_path}`, or choose another folder with --data.\n"
        )
        assert first.poll() is None and read_state(tmp_path)


async def test_a_failed_start_shows_the_log_in_one_place(tmp_path: Path) -> None:
    with fake_up(tmp_path, "--fail") as process:
        _, errors = process.communicate(timeout=10)
    assert process.returncode == 1
    assert errors.splitlines()[-2:] == [
        "  back cannot find its model",
        "Error: back does not start: 2 times in a row it ended with exit code 1.",
    ]
    assert read_state(tmp_path) is None


def test_a_detached_stack_is_ready_shows_its_status_and_logs_and_is_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_detached([*module("tests.fake_stack"), str(tmp_path)], tmp_path)
    state = read_state(tmp_path)
    assert state and state.ready
    output = capsys.readouterr().out.splitlines()
    assert {"back: starting", "front: starting"} <= set(output)
    assert f"Ready on {state.address}, model fake model, store fake store. Next:" in output

    cli, here = CliRunner(), ["--data", str(tmp_path)]
    status = json.loads(cli.invoke(app, ["status", "--json", *here]).stdout)
    assert status["running"] and status["pid"] == state.pid and status["server"] is None
    for service, known in zip(status["services"], state.services, strict=True):
        assert (service["name"], service["pid"]) == (known.name, known.pid)
        assert service["status"] == "ready" and service["memory_bytes"] > 2**20
    shown = cli.invoke(app, ["status", *here]).stdout
    assert [line.split()[:2] for line in shown.splitlines()[2:]] == [
        ["back", "ready"],
        ["front", "ready"],
    ]
    assert "supervisor INFO front is ready" in cli.invoke(app, ["logs", *here]).stdout

    assert cli.invoke(app, ["down", *here]).stdout == "Stopped.\n"
    assert not any(runs(service.pid) for service in state.services)
    assert cli.invoke(app, ["down", *here]).stdout == f"Nothing runs on {tmp_path}.\n"
    gone = cli.invoke(app, ["status", "--json", *here])
    assert gone.exit_code == 1 and json.loads(gone.stdout)["running"] is False


def test_a_detached_stack_that_fails_says_why(tmp_path: Path) -> None:
    argv = [*module("tests.fake_stack"), str(tmp_path), "--fail"]
    with pytest.raises(LocalError, match="back cannot find its model\n(?s:.*)back does not start"):
        run_detached(argv, tmp_path)
    assert local.holder(tmp_path) is None


def test_the_plan_tells_every_service_where_the_others_are(tmp_path: Path) -> None:
    port = free_port()
    model, *services = plan(tmp_path, "lancedb", "", None, str(tmp_path), port).children
    assert model.argv[-1] == str(tmp_path)
    assert model.gives == ("TWOROADS_GENERATION_MODEL", "TWOROADS_TUNING_MODEL")
    children = {child.name: child for child in services}
    assert list(children) == [
        "embedding",
        "retrieval",
        "generation",
        "tuning",
        "evaluation",
        "gateway",
    ]
    gateway, retrieval = children["gateway"].env, children["retrieval"].env
    assert gateway["TWOROADS_GATEWAY_LISTEN"] == f"127.0.0.1:{port}"
    for name, child in children.items():
        assert child.env[f"TWOROADS_{name.upper()}_LISTEN"] == child.address
        if name != "gateway":
            assert gateway[f"TWOROADS_GATEWAY_{name.upper()}"] == child.address
    assert retrieval["TWOROADS_RETRIEVAL_EMBEDDING"] == children["embedding"].address
    assert retrieval["TWOROADS_RETRIEVAL_FOLDER"] == str(tmp_path / "store")
    generation, tuning = children["generation"], children["tuning"]
    assert generation.env["TWOROADS_GENERATION_TUNING"] == tuning.address
    assert generation.env["TWOROADS_GENERATION_ADAPTERS"] == str(tmp_path / "generation")
    assert tuning.env["TWOROADS_TUNING_GENERATION"] == generation.address
    assert tuning.env["TWOROADS_TUNING_RETRIEVAL"] == children["retrieval"].address
    assert tuning.env["TWOROADS_TUNING_FOLDER"] == str(tmp_path / "tuning")
    evaluation, gateway = children["evaluation"], children["gateway"]
    internal = gateway.env["TWOROADS_GATEWAY_INTERNAL"]
    assert evaluation.env["TWOROADS_EVALUATION_GATEWAY"] == internal
    assert "TWOROADS_GATEWAY_KEYS" not in gateway.env
    assert gateway.env["TWOROADS_GATEWAY_EVALUATION"] == evaluation.address
    assert evaluation.env["TWOROADS_EVALUATION_FOLDER"] == str(tmp_path / "evaluation")
    used = [address for c in children.values() for address in (c.address, c.metrics)]
    assert len({*used, internal}) == 13


def test_keys_reach_the_gateway(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    with pytest.raises(LocalError, match="There is no file of keys"):
        plan(tmp_path, "lancedb", "", None, "some/model", free_port(), keys)
    keys.touch()
    gateway = plan(tmp_path, "lancedb", "", None, "some/model", free_port(), keys).children[-1]
    assert gateway.env["TWOROADS_GATEWAY_KEYS"] == str(keys)


def test_a_weaviate_server_that_runs_already_is_used(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.touch()
    port = free_port()
    stack = plan(tmp_path, "weaviate", "db.example:8080,50051", key, "some/model", port)
    env = {key: value for child in stack.children for key, value in child.env.items()}
    assert env["TWOROADS_RETRIEVAL_STORE"] == "weaviate"
    assert env["TWOROADS_RETRIEVAL_WEAVIATE_HTTP"] == "db.example:8080"
    assert env["TWOROADS_RETRIEVAL_WEAVIATE_GRPC"] == "db.example:50051"
    assert env["TWOROADS_RETRIEVAL_WEAVIATE_KEY_FILE"] == str(key)


def test_a_taken_port_is_named_and_nothing_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = subprocess.run(
            [*module("clients.cli"), "up", "--data", str(tmp_path), "--port", str(port)],
            capture_output=True,
            text=True,
        )
    assert result.returncode == 1
    assert result.stderr == (
        f"Error: Port {port} of 127.0.0.1 is taken by another program; "
        "choose another with --port.\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--store", "weaviate", "--weaviate", "db:1"], "--weaviate takes HOST:PORT,GRPC_PORT"),
        (
            ["--store", "weaviate", "--weaviate", "db:1,2", "--weaviate-key-file", "none"],
            "There is no key file",
        ),
        (["--model", "no/such/folder"], "There is no model folder"),
        (["--data", "/proc/tworoads"], "choose another folder with --data"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(
    tmp_path: Path, options: list[str], said: str
) -> None:
    port = free_port()
    argv = ["up", "--port", str(port), "--data", str(tmp_path), *options]
    result = CliRunner().invoke(app, argv)
    assert isinstance(result.exception, LocalError) and said in str(result.exception)


@pytest.mark.parametrize(
    "options",
    [
        ["--store", "papyrus"],
        ["--port", "0"],
        ["--weaviate", "db:1,2"],
        ["--store", "weaviate", "--weaviate-key-file", "key"],
    ],
)
def test_wrong_usage_has_exit_code_2(tmp_path: Path, options: list[str]) -> None:
    assert CliRunner().invoke(app, ["up", "--data", str(tmp_path), *options]).exit_code == 2


def test_clients_find_the_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TWOROADS_ADDRESS", raising=False)
    monkeypatch.setenv("TWOROADS_DATA_DIR", str(tmp_path))
    assert local.address() == "127.0.0.1:50050"
    write_state(tmp_path, StackState(1, "127.0.0.1:6000", "lancedb", "tiny"))
    assert local.address() == "127.0.0.1:6000"
    monkeypatch.setenv("TWOROADS_ADDRESS", "elsewhere:1")
    assert local.address() == "elsewhere:1"


def test_three_older_logs_are_kept(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    for start in range(6):
        local.rotate(log)
        log.write_text(str(start))
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert kept == {"a.log": "5", "a.log.1": "4", "a.log.2": "3", "a.log.3": "2"}


def test_a_weaviate_server_of_its_own_has_a_key_that_only_the_user_reads(tmp_path: Path) -> None:
    stack = plan(tmp_path, "weaviate", "", None, "some/model", free_port())
    children = {child.name: child for child in stack.children}
    assert list(children)[:3] == ["model", "weaviate-program", "weaviate"]
    key_file = tmp_path / "weaviate.key"
    assert key_file.stat().st_mode & 0o777 == 0o600
    told, server = children["retrieval"].env, children["weaviate"]
    assert told["TWOROADS_RETRIEVAL_WEAVIATE_KEY_FILE"] == str(key_file)
    assert told["TWOROADS_RETRIEVAL_WEAVIATE_HTTP"] == server.address
    assert server.env["AUTHENTICATION_APIKEY_ALLOWED_KEYS"] == key_file.read_text()
    assert server.env["AUTHENTICATION_ANONYMOUS_ACCESS_ENABLED"] == "false"
