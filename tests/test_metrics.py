"""What the metrics count: waiting and refused calls, work that ends, answers, certificates."""

import asyncio
import math
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from prometheus_client import REGISTRY
from tworoads.v1 import answer_pb2, retrieval_pb2, tuning_pb2
from tworoads.v1.answer_pb2_grpc import AnswerServiceStub

from services.runtime import metrics
from services.runtime.channel import connect
from services.runtime.errors import Overloaded
from tests.probe import failure, probe
from tests.small_stack import ANSWERS, SmallStack, small_stack
from tests.small_tuning import created, ended, small_tuning
from tests.test_admission import Gate, fill
from tests.test_retrieval import END, document, start


class Counted:
    """How much samples have grown since they were first asked for here."""

    def __init__(self) -> None:
        self._before = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in REGISTRY.collect()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        now = REGISTRY.get_sample_value(name, labels) or 0.0
        return now - self._before.get((name, frozenset(labels.items())), 0.0)


@pytest.fixture
def counted() -> Counted:
    return Counted()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.002)


async def test_calls_that_wait_are_shown_and_refused_ones_are_counted(counted: Counted) -> None:
    gate = Gate()
    async with probe(embed=gate.embed, max_running=1, max_waiting=2) as server:
        calls = await fill(server, gate, 1, 2)
        assert counted("tworoads_calls_waiting") == 2
        await failure(server.embed())
        assert counted("tworoads_call_errors_total", reason="QUEUE_FULL") == 1
        gate.open.set()
        await asyncio.gather(*calls)
        assert counted("tworoads_calls_waiting") == 0


async def test_a_call_that_stops_waiting_is_not_shown_any_more(counted: Counted) -> None:
    gate = Gate()
    async with probe(embed=gate.embed, max_running=1, max_waiting=2) as server:
        calls = await fill(server, gate, 1, 1)
        calls[1].cancel()
        await until(lambda: counted("tworoads_calls_waiting") == 0)
        gate.open.set()
        await calls[0]


async def test_jobs_are_counted_once_however_they_end(counted: Counted, tmp_path: Path) -> None:
    def jobs(state: str) -> float:
        return counted("tworoads_work_ended_total", kind="job", state=state)

    def now(state: str) -> float | None:
        return REGISTRY.get_sample_value("tworoads_work", {"kind": "job", "state": state})

    async with small_tuning(tmp_path / "t") as tuning:
        await ended(tuning.stub, (await created(tuning.stub)).id)
        await until(lambda: jobs("ready") == 1)
        tuning.trainer.error = RuntimeError("no")
        await ended(tuning.stub, (await created(tuning.stub, name="b")).id)
        await until(lambda: jobs("failed") == 1)

        tuning.trainer.error = None
        tuning.trainer.open.clear()
        running = await created(tuning.stub, name="c")
        queued = await created(tuning.stub, name="d")
        await until(lambda: (now("running"), now("queued")) == (1, 1))
        for job in (queued, running):
            await tuning.stub.CancelJob(tuning_pb2.CancelJobRequest(id=job.id))
        await until(lambda: (now("running"), now("queued")) == (0, 0))
        assert jobs("cancelled") == 2
    assert (jobs("ready"), jobs("failed"), jobs("cancelled")) == (1, 1, 2)


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[SmallStack]:
    async with small_stack(tmp_path) as stack:
        await stack.retrieval.CreateCorpus(retrieval_pb2.CreateCorpusRequest(name="c"))
        text = "Employees get 27 days of paid leave."
        sent = [start(), *document("a", text), *document("b", text, media_type="x/y"), END]
        async for _ in stack.retrieval.PutDocuments(iter(sent)):
            pass
        yield stack


async def test_documents_answers_and_checked_sentences_are_counted(
    counted: Counted, stack: SmallStack
) -> None:
    assert counted("tworoads_documents_ingested_total", outcome="indexed") == 1
    assert counted("tworoads_documents_ingested_total", outcome="failed") == 1
    assert counted("tworoads_passages_indexed_total") == 1
    said = "Employees get 27 days of paid leave. They get 99 days of holiday."
    stack.generation.answer = said
    request = answer_pb2.AnswerRequest(
        question="How many days?", corpus="c", path=retrieval_pb2.PATH_RAG
    )
    async with connect(stack.address, ANSWERS) as channel:
        answers = AnswerServiceStub(channel)
        async for _ in answers.Answer(request):
            pass
        assert counted("tworoads_answers_total", path="rag", reason="stop") == 1
        assert counted("tworoads_citations_total", verdict="supported") == 1
        assert counted("tworoads_citations_total", verdict="unsupported") == 1
        assert counted("tworoads_first_text_seconds_count", path="rag") == 1
        assert counted("tworoads_passages_found_sum") == 1

        stack.embedding.error = Overloaded("QUEUE_FULL", "full")
        request.options.allow_degraded = True
        async for _ in answers.Answer(request):
            pass
        assert counted("tworoads_answers_degraded_total", part="vector_search") == 1

        stack.generation.error = Overloaded("QUEUE_FULL", "full")
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in answers.Answer(request):
                pass
    assert counted("tworoads_answers_total", path="rag", reason="stop") == 2


def test_calls_that_find_no_replica_are_counted_from_zero_and_not_from_the_first_of_them() -> None:
    """What scales generation up from zero reads the gateway's count before it has ever grown."""
    program = (
        "import services.gateway.service\n"
        "from prometheus_client import generate_latest\n"
        "print(generate_latest().decode())"
    )
    page = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    for service in ("embedding", "retrieval", "generation", "tuning", "evaluation"):
        assert f'tworoads_unserved_total{{service="{service}"}} 0.0\n' in page


def certificate(path: Path, days: int) -> float:
    """Write a certificate that ends in so many days, and return when that is."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "gateway")])
    now = datetime.now(UTC).replace(microsecond=0)
    ends = now + timedelta(days=days)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, ends)
    made = builder.sign(key, hashes.SHA256())
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return ends.timestamp()


def test_a_certificate_says_when_it_ends_and_its_successor_too(tmp_path: Path) -> None:
    def shown() -> float:
        value = REGISTRY.get_sample_value("tworoads_certificate_expiry_seconds", {"side": "public"})
        assert value is not None
        return value

    file = tmp_path / "tls.crt"
    ends = certificate(file, 30)
    metrics.certificate("public", file)
    assert shown() == ends
    ends = certificate(file, 60)
    assert shown() == ends
    file.write_text("half written")
    assert math.isnan(shown())
    file.unlink()
    assert math.isnan(shown())
