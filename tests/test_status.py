"""`tworoads status`: how busy services are, here and behind a gateway elsewhere."""

import asyncio
import json
import os
import pty
import re
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tworoads.v1.answer_pb2_grpc import add_AnswerServiceServicer_to_server
from tworoads.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tworoads.v1.generation_pb2_grpc import (
    GenerationServiceStub,
)
from tworoads.v1.retrieval_pb2_grpc import RetrievalServiceStub
from tworoads.v1.tuning_pb2_grpc import TuningServiceStub
from typer.testing import CliRunner

from clients.cli.app import app
from clients.load import Load, load_of
from clients.stack import free_addresses
from services.gateway.replicas import Replicas
from services.gateway.service import AnswerService
from services.runtime import metrics
from services.runtime.channel import connect
from services.runtime.gate import Open
from services.runtime.server import running
from services.runtime.settings import ServerSettings
from tests.command import tworoads
from tests.fake_engine import FakeEngine, serving
from tests.small_stack import ANSWERS, GENERATION
from tests.vllm_metrics import VLLM

ENGINE = """
vllm:num_requests_waiting{engine="0",model_name="m"} 4.0
# TYPE vllm:prefix_cache_queries counter
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 200.0
# TYPE vllm:prefix_cache_hits counter
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 150.0
"""
OURS = """
tworoads_calls_running{method="/a/B"} 3.0
tworoads_calls_running{method="/a/C"} 1.0
tworoads_calls_waiting 2.0
"""
QUEUES = """
tworoads_work{kind="job",state="queued"} 5.0
tworoads_work{kind="job",state="running"} 1.0
tworoads_texts_waiting{kind="query"} 2.0
"""


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is shown, however long it takes to answer."""
    monkeypatch.setattr("clients.load.SECONDS", 25.0)
    monkeypatch.setattr("services.gateway.replicas.LOOK_SECONDS", 25.0)
    monkeypatch.setattr("services.gateway.service.INFO_SECONDS", 25.0)


@contextmanager
def page(text: str) -> Iterator[str]:
    """Serve a page of metrics while the block runs; yields the address."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("text", "load"),
    [
        (OURS, Load(4, 2, 0, None)),
        (OURS + ENGINE, Load(4, 6, 0, 0.75)),
        (OURS + QUEUES, Load(4, 2, 7, None)),
        (ENGINE.replace("200", "0"), Load(0, 4, 0, None)),  # nothing was asked yet
        ("<html>", None),
    ],
)
async def test_the_load_of_a_service_is_read_from_its_metrics(text: str, load: Load | None) -> None:
    with page(text) as address:
        assert await load_of(address) == load


async def test_a_service_whose_metrics_are_away_has_no_load() -> None:
    with page(OURS) as address:
        pass
    assert await load_of(address) is None


def test_the_names_that_are_read_are_exposed() -> None:
    said = {
        sample.name
        for family in text_string_to_metric_families(OURS + ENGINE + QUEUES)
        for sample in family.samples
    }
    ours = {"tworoads_calls_running", "tworoads_calls_waiting", "tworoads_work"}
    assert said - VLLM.keys() - {"tworoads_texts_waiting"} == ours
    exposed = {metrics.RUNNING, metrics.WAITING, metrics.WORK}
    assert {family.name for metric in exposed for family in metric.collect()} == ours


@asynccontextmanager
async def gateway(target: str, listen: str = "127.0.0.1:0") -> AsyncIterator[str]:
    """Serve a gateway of generation alone, which is at `target`; yields its address."""
    async with (
        connect(target, GENERATION) as generation,
        running(ServerSettings(listen=listen, grace_seconds=0), [ANSWERS], Open()) as server,
    ):
        answers = AnswerService(
            RetrievalServiceStub(generation),
            EmbeddingServiceStub(generation),
            GenerationServiceStub(generation),
            TuningServiceStub(generation),
            Replicas(target, lambda address: connect(address, GENERATION)),
        )
        await server.serve(lambda s: add_AnswerServiceServicer_to_server(answers, s))
        yield f"127.0.0.1:{server.port}"


async def test_a_gateway_elsewhere_is_asked_for_its_paths_and_replicas(tmp_path: Any) -> None:
    async with serving(FakeEngine(), tmp_path, "127.0.0.1:1") as (_, generation):
        async with gateway(generation) as address:
            invoke = CliRunner().invoke
            shown = await asyncio.to_thread(invoke, app, ["status", "--address", address])
            said = await asyncio.to_thread(invoke, app, ["status", "--address", address, "--json"])
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert shown.exit_code == 0 and lines[0][0] == f"{address},"
    assert lines[1] == ["replica", "status", "running", "waiting", "cache", "use"]
    assert lines[2] == ["generation-1", "ready", "0", "2", "50%"]
    assert ["PATH_BASE:", "open"] in lines
    (replica,) = json.loads(said.stdout)["server"]["replicas"]
    assert replica["name"] == "generation-1" and generation not in said.stdout


def test_a_gateway_that_is_not_there_is_an_error_of_one_sentence() -> None:
    ended = CliRunner().invoke(app, ["status", "--address", "127.0.0.1:1"])
    assert ended.exit_code == 1 and "nothing answers at 127.0.0.1:1" in str(ended.exception)


async def test_every_replica_is_looked_at_and_one_that_is_gone_is_down(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name with three addresses: the first has a replica, another one a server of no model."""
    monkeypatch.setattr("services.gateway.replicas.KEPT_SECONDS", 25.0)
    engine = FakeEngine()
    async with serving(engine, tmp_path, "127.0.0.1:1") as (_, first):
        port = first.rpartition(":")[2]

        class Three(Replicas):
            async def _addresses(self) -> list[str]:
                return [f"ipv4:127.0.0.{i}:{port}" for i in (1, 2, 3)]

        settings = ServerSettings(listen=f"127.0.0.2:{port}", grace_seconds=0)
        async with running(settings, [GENERATION]) as second:
            replicas = Three(first, lambda address: connect(address, GENERATION))
            seen = await replicas.look()
            assert [(r.name, r.ready) for r in seen] == [
                ("generation-1", True),
                ("generation-2", False),  # it loads its model
                ("generation-3", False),
            ]
            assert await replicas.look() is seen  # not asked again at once
            assert second.port == int(port)


async def test_a_name_that_means_nobody_has_no_replicas() -> None:
    replicas = Replicas("dns:///127.0.0.1:no-port", lambda address: connect(address, GENERATION))
    assert await replicas.look() == []


async def test_watching_goes_on_until_it_is_interrupted(tmp_path: Any) -> None:
    engine = FakeEngine()
    screen, terminal = pty.openpty()
    shown = ""

    async def until(pattern: str) -> None:
        nonlocal shown
        while not re.search(pattern, shown):
            shown += await _read(screen)
        shown = ""

    async with serving(engine, tmp_path, "127.0.0.1:1") as (_, generation):
        async with asyncio.timeout(120), AsyncExitStack() as served:
            [address] = free_addresses(1)
            await served.enter_async_context(gateway(generation, address))
            words = ("status", "--watch", "--address", address)
            with tworoads("", *words, stdout=terminal) as process:
                os.close(terminal)
                await until("generation-1")
                engine.running = 7
                await until("generation-1 +ready +7")
                await served.aclose()
                await until("nothing answers")
                async with gateway(generation, address):
                    await until("generation-1 +ready +7")
                process.send_signal(signal.SIGINT)
                while await _read(screen):
                    pass
                assert process.wait(30) == 0
                assert process.stderr and process.stderr.read() == ""
    os.close(screen)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--json", "--watch"), "leave out --watch"),
        (("--data", "folder", "--address", "127.0.0.1:1"), "leave out --address"),
    ],
)
def test_what_cannot_be_shown_together_is_refused(words: tuple[str, ...], says: str) -> None:
    ended = CliRunner().invoke(app, ["status", *words])
    assert ended.exit_code == 2 and says in ended.output


def test_a_data_folder_goes_before_the_address_of_the_environment(tmp_path: Any) -> None:
    environment = {"TWOROADS_ADDRESS": "127.0.0.1:1"}
    ended = CliRunner().invoke(app, ["status", "--data", str(tmp_path)], env=environment)
    assert ended.exit_code == 1 and f"Nothing runs on {tmp_path}" in ended.output


async def _read(screen: int) -> str:
    try:
        return (await asyncio.to_thread(os.read, screen, 65536)).decode()
    except OSError:  # nobody writes any more
        return ""
