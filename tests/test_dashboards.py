"""Alerts, dashboard and autoscaler ask for metrics that a run of every service exposes."""

import asyncio
import json
import re
import urllib.request
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import promql_parser as promql
import pytest
import yaml
from google.protobuf.descriptor_pool import Default
from prometheus_client.parser import text_string_to_metric_families
from tworoads.v1 import answer_pb2, embedding_pb2, generation_pb2, retrieval_pb2
from tworoads.v1.answer_pb2_grpc import AnswerServiceStub
from tworoads.v1.embedding_pb2_grpc import (
    EmbeddingServiceStub,
    add_EmbeddingServiceServicer_to_server,
)
from tworoads.v1.generation_pb2_grpc import GenerationServiceStub

from services.embedding.batcher import Batcher
from services.embedding.service import EmbeddingService
from services.runtime import metrics
from services.runtime.channel import connect
from services.runtime.errors import Overloaded
from services.runtime.gate import TENANT
from services.runtime.server import running
from services.runtime.settings import ServerSettings
from tests.fake_engine import FakeEngine
from tests.fake_engine import serving as generation_service
from tests.fake_tuning import FakeTuning
from tests.fake_tuning import serving as tuning_service
from tests.small_stack import ANSWERS, EMBEDDING, GENERATION, RETRIEVAL, small_stack
from tests.small_tuning import small_tuning
from tests.test_batcher import FakeModel
from tests.test_metrics import certificate
from tests.test_retrieval import END, document, start
from tests.vllm_metrics import VLLM

ROOT = Path(__file__).parents[1]
MONITORING = ROOT / "k8s" / "monitoring"
GUIDE = ROOT / "docs" / "operations.md"
SERVICES = {"gateway", "embedding", "retrieval", "generation", "tuning", "evaluation"}
# What Prometheus puts to every sample, and what it knows besides.
TARGET = {"namespace": {"tworoads"}, "pod": set(), "app": SERVICES}
STRANGER = "canary-tenant"

Samples = dict[str, dict[str, set[str]]]  # of each metric its labels, of each of these its values


def alerts() -> list[dict[str, Any]]:
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
    return [rule for group in rules["spec"]["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return list(json.loads((MONITORING / "dashboard.json").read_text())["panels"])


def expressions() -> Iterator[tuple[str, str]]:
    for alert in alerts():
        yield alert["alert"], alert["expr"]
    for panel in panels():
        for target in panel.get("targets", []):
            expression = target["expr"].replace("$__rate_interval", "5m")
            yield panel["title"], expression.replace("$namespace", "tworoads")
    for scaled in (ROOT / "k8s" / "components" / "keda").glob("*.yaml"):
        for trigger in _triggers(yaml.safe_load(scaled.read_text())):
            yield f"{scaled.name} {trigger['name']}", trigger["metadata"]["query"]


def _triggers(scaled: dict[str, Any]) -> list[dict[str, Any]]:
    return list(scaled.get("spec", {}).get("triggers", []))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the metrics say after a run of everything that they count."""
    return asyncio.run(_run(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def exposed(page: str) -> Samples:
    seen: Samples = {name: {label: set() for label in labels} for name, labels in VLLM.items()}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = seen.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return seen


async def _run(folder: Path) -> str:
    certificate(folder / "tls.crt", 30)
    metrics.certificate("inside", folder / "tls.crt")
    async with AsyncExitStack() as parts:
        port = parts.enter_context(metrics.serving("127.0.0.1:0"))
        await _answers(folder / "stack")
        await _embeddings()
        await _generations(folder)
        await parts.enter_async_context(small_tuning(folder / "tuning"))
        async with asyncio.timeout(10):
            while 'tworoads_work{kind="job"' not in (text := await _scrape(port)):
                await asyncio.sleep(0.01)
        return text


async def _scrape(port: int | None) -> str:
    def read() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
            return str(response.read(), "utf-8")

    return await asyncio.to_thread(read)


async def _answers(folder: Path) -> None:
    async with (
        small_stack(folder) as stack,
        connect(stack.address, ANSWERS, RETRIEVAL) as channel,
    ):
        stack.generation.answer = "Employees get 27 days of leave. They get 99 days of holiday."
        ours = ((TENANT, STRANGER),)
        await stack.retrieval.CreateCorpus(
            retrieval_pb2.CreateCorpusRequest(name="c"), metadata=ours
        )
        await stack.retrieval.CreateCorpus(retrieval_pb2.CreateCorpusRequest(name="c"))
        text = "Employees get 27 days of leave."
        sent = [start(), *document("a", text), *document("b", text, media_type="x/y"), END]
        async for _ in stack.retrieval.PutDocuments(iter(sent)):
            pass
        answers = AnswerServiceStub(channel)
        request = answer_pb2.AnswerRequest(
            question="How many days?", corpus="c", path=retrieval_pb2.PATH_RAG
        )
        async for _ in answers.Answer(request):
            pass
        stack.embedding.error = Overloaded("QUEUE_FULL", "full")
        request.options.allow_degraded = True
        async for _ in answers.Answer(request):
            pass
        stack.generation.error = Overloaded("QUEUE_FULL", "full")
        with suppress(grpc.aio.AioRpcError):
            async for _ in answers.Answer(request):
                pass


async def _embeddings() -> None:
    model = FakeModel()
    async with (
        Batcher(model, 64, 64) as batcher,
        running(ServerSettings(grace_seconds=0), [EMBEDDING]) as server,
        connect(f"127.0.0.1:{server.port}", EMBEDDING) as channel,
    ):
        service = EmbeddingService(model, batcher)
        await server.serve(lambda s: add_EmbeddingServiceServicer_to_server(service, s))
        await EmbeddingServiceStub(channel).Embed(
            embedding_pb2.EmbedRequest(texts=["a"], kind=embedding_pb2.EMBED_KIND_QUERY)
        )


async def _generations(folder: Path) -> None:
    tuning = FakeTuning()
    adapter = tuning.add("house")
    async with (
        tuning_service(tuning) as address,
        generation_service(FakeEngine(), folder / "adapters", address) as (_, generation),
        connect(generation, GENERATION) as channel,
    ):
        request = generation_pb2.GenerateRequest(
            messages=[
                generation_pb2.Message(
                    role=generation_pb2.ROLE_USER, parts=[generation_pb2.Part(text="Hello")]
                )
            ],
            adapter=adapter.id,
        )
        async for _ in GenerationServiceStub(channel).Generate(request):
            pass


@pytest.mark.parametrize(("where", "expression"), [*expressions()])
def test_an_expression_asks_for_what_a_run_exposes(
    where: str, expression: str, exposed: Samples
) -> None:
    assert list(_problems(promql.parse(expression), exposed)) == []


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("tworoads_made_up > 0", "tworoads_made_up is not exposed"),
        ("vllm:gpu_cache_usage_perc", "vllm:gpu_cache_usage_perc is not exposed"),
        ('tworoads_calls_total{tenant="a"}', "tworoads_calls_total has no label tenant"),
        ("sum by (model) (rate(tworoads_calls_total[5m]))", "tworoads_calls_total has no label"),
        ('tworoads_work{kind="training"}', "kind is never training"),
        ('tworoads_calls_total{code=~"OK|BAD"}', "code is never BAD"),
        ('tworoads_call_errors_total{reason="FULL"}', "reason is never FULL"),
        ('tworoads_calls_total{app="gate"}', "app is never gate"),
    ],
)
def test_an_expression_that_asks_for_anything_else_is_found(
    expression: str, problem: str, exposed: Samples
) -> None:
    (found,) = _problems(promql.parse(expression), exposed)
    assert problem in found


def _problems(expression: Any, exposed: Samples, grouped: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield what is wrong with the metrics, labels and values in an expression."""
    match expression:
        case promql.VectorSelector(name=name, matchers=matchers):
            if name not in exposed:
                yield f"{name} is not exposed"
                return
            labels = {**exposed[name], **TARGET}
            for label in {*(m.name for m in matchers.matchers), *grouped} - labels.keys():
                yield f"{name} has no label {label}"
            for matcher in matchers.matchers:
                values = _known(matcher.name, labels.get(matcher.name, set()))
                for value in _alternatives(matcher.value):
                    if matcher.name in labels and not any(re.fullmatch(value, v) for v in values):
                        yield f"{name}: {matcher.name} is never {value}"
        case promql.MatrixSelector(vector_selector=selector):
            yield from _problems(selector, exposed, grouped)
        case promql.AggregateExpr(expr=inner, modifier=modifier):
            labels = tuple(modifier.labels) if modifier else ()
            yield from _problems(inner, exposed, (*grouped, *labels))
        case promql.BinaryExpr(lhs=left, rhs=right):
            yield from _problems(left, exposed, grouped)
            yield from _problems(right, exposed, grouped)
        case promql.Call(args=arguments):
            for argument in arguments:
                yield from _problems(argument, exposed, grouped)
        case promql.ParenExpr(expr=inner) | promql.UnaryExpr(expr=inner):
            yield from _problems(inner, exposed, grouped)
        case promql.NumberLiteral() | promql.StringLiteral():
            pass
        case _:
            yield f"{type(expression).__name__} is not known here"


def _alternatives(regex: str) -> list[str]:
    """Return what the bars of a regular expression separate, those in a group too."""
    if group := re.search(r"\(([^()]*)\)", regex):
        before, after = regex[: group.start()], regex[group.end() :]
        return [a for one in group[1].split("|") for a in _alternatives(f"{before}{one}{after}")]
    return regex.split("|")


def _known(label: str, seen: set[str]) -> set[str]:
    """Return the values of a label: those of the run, and those that are constants of the code."""
    if label == "code":
        return {code.name for code in grpc.StatusCode}
    if label == "method":
        services = map(Default().FindServiceByName, (ANSWERS, RETRIEVAL, EMBEDDING, GENERATION))
        return {f"/{s.full_name}/{method.name}" for s in services for method in s.methods}
    if label == "reason":
        sources = "".join(path.read_text() for path in (ROOT / "services").rglob("*.py"))
        return seen | set(re.findall(r'"([A-Z][A-Z_]+)"', sources))
    return seen


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_an_alert_says_how_bad_it_is_what_it_means_and_where_help_is(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    notes = alert["annotations"]
    assert notes["summary"].endswith(".") and notes["description"].endswith(".")
    assert notes["runbook_url"] == f"docs/operations.md#{alert['alert'].lower()}"
    for label in re.findall(r"\$labels\.(\w+)", notes["summary"] + notes["description"]):
        assert re.search(rf"by \([^)]*\b{label}\b", alert["expr"])


def test_the_operations_guide_has_a_heading_for_every_alert() -> None:
    headings = re.findall(r"^#+ (.+)$", GUIDE.read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert {alert["alert"].lower() for alert in alerts()} <= anchors


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    shown = panels()
    assert len({panel["id"] for panel in shown}) == len(shown)
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in shown]
    assert len(set(places)) == len(places)
    for panel in shown:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        if panel["type"] != "row":
            assert panel["targets"] and panel["datasource"]["uid"] == "${datasource}"


def test_labels_take_few_values_and_never_a_tenants_name(page: str, exposed: Samples) -> None:
    assert STRANGER not in page
    ours = {name: labels for name, labels in exposed.items() if name.startswith("tworoads_")}
    assert ours
    for labels in ours.values():
        assert not labels.keys() & {"tenant", "principal", "request", "corpus", "adapter"}
