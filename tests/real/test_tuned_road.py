"""The second road on the whole stack: examples become an adapter, TUNED and HYBRID answer by it."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
from transformers import AutoTokenizer
from tworoads.v1 import tuning_pb2 as pb
from tworoads.v1.generation_pb2 import Message as MessagePb
from tworoads.v1.generation_pb2 import Part as PartPb
from tworoads.v1.generation_pb2 import TokenScore
from tworoads.v1.tuning_pb2_grpc import TuningServiceStub

from clients.adapters import FILES, Adapter
from clients.client import Client, TworoadsError
from clients.jobs import Job, JobProgress
from services.prompts.rendering import Renderer
from services.prompts.words import conversation
from tests.real.stack import RunningStack, start_stack, until

EXAMPLES = Path(__file__).parents[2] / "examples"
LEAVE = "How many days of paid leave do full-time employees get?"
TRAINED = 32  # examples: enough to learn a form in a dozen steps
ROLES = {"system": 1, "user": 2, "assistant": 3}
STOP_SECONDS = 10.0


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    with start_stack(tmp_path_factory.mktemp("tuned")) as stack:
        stack.json("ingest", str(EXAMPLES / "handbook"), "--corpus", "handbook")
        yield stack


@pytest.fixture
async def client(stack: RunningStack) -> AsyncIterator[Client]:
    async with stack.client() as client:
        yield client


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first examples of the sample."""
    lines = (EXAMPLES / "house-style.jsonl").read_text().splitlines()[:TRAINED]
    file = tmp_path_factory.mktemp("examples") / "examples.jsonl"
    file.write_text("\n".join(lines))
    return file


@dataclass(frozen=True)
class Tuned:
    job: Job
    adapter: Adapter


@pytest.fixture(scope="module")
def tuned(stack: RunningStack, examples: Path) -> Tuned:
    """An adapter trained by the command, as a user does it."""
    said = stack.json("tune", str(examples), "--name", "house", "--epochs", "3", "--held-out", "0")

    async def made() -> Tuned:
        async with stack.client() as client:
            return Tuned(await client.job(said["job"]["id"]), await client.adapter("house"))

    return asyncio.run(made())


def processes(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


async def until_training(client: Client, id: str) -> int:
    """Wait for the first step of a job; return the sequence number of the event."""
    async for event in client.watch_job(id):
        if isinstance(event.news, JobProgress) and event.news.step > 0:
            return event.sequence
    raise AssertionError("the job ended without a step")


async def queued(client: Client, examples: Path, name: str, epochs: int) -> str:
    news = [n async for n in client.create_job(name, examples, epochs=epochs, held_out_share=0.0)]
    assert isinstance(news[-1], Job)
    return news[-1].id


async def test_a_file_of_examples_becomes_an_adapter_that_answers_in_the_house_style(
    stack: RunningStack, tuned: Tuned
) -> None:
    assert tuned.job.state == "ready", (tuned.job.reason, tuned.job.message)
    assert tuned.adapter.id == tuned.job.adapter
    assert tuned.job.data.examples == TRAINED
    base = stack.json("ask", LEAVE, "--path", "base", "--max-tokens", "24")
    answer = stack.json("ask", LEAVE, "--path", "tuned", "--adapter", "house")
    assert answer["answer"].startswith("In short:") and "The handbook says:" in answer["answer"]
    assert not base["answer"].startswith("In short:")
    assert (answer["path"], answer["adapter"]) == ("tuned", tuned.adapter.id)
    assert answer["passages"] == answer["citations"] == []


async def test_generation_does_with_the_adapter_what_the_trainer_did(tuned: Tuned) -> None:
    fidelity = tuned.adapter.fidelity
    assert fidelity and fidelity.probes >= 16
    assert fidelity.trainer_difference < fidelity.bound
    assert fidelity.base_difference > 5 * fidelity.trainer_difference
    assert [speed.streams for speed in tuned.adapter.speeds] == [1, 8]
    assert all(speed.adapter_tokens_per_second > 0 for speed in tuned.adapter.speeds)


async def test_hybrid_with_an_adapter_that_never_saw_passages_answers_and_says_so(
    client: Client, tuned: Tuned
) -> None:
    answer = await client.ask(LEAVE, "handbook", "hybrid", adapter=tuned.adapter.id)
    assert (answer.path, answer.adapter) == ("hybrid", tuned.adapter.id)
    assert list(answer.warnings) == ["ADAPTER_WITHOUT_CONTEXT"]
    assert answer.passages and answer.text


async def test_an_adapter_that_was_downloaded_can_be_imported_and_answers_alike(
    stack: RunningStack, client: Client, tuned: Tuned, tmp_path: Path
) -> None:
    stack.tworoads("adapters", "download", tuned.adapter.id, str(tmp_path / "house"))
    assert {path.name for path in (tmp_path / "house").iterdir()} == set(FILES)
    imported = stack.json("adapters", "import", str(tmp_path / "house"), "--name", "guest")
    assert (imported["state"], imported["reason"]) == ("unmeasured", "TOO_FEW_PROBES")
    first, second = [
        await client.ask(LEAVE, path="tuned", adapter=name) for name in ("house", "guest")
    ]
    assert first.text == second.text


async def test_an_unfaithful_adapter_is_not_served_until_its_owner_accepts_it(
    stack: RunningStack,
    client: Client,
    tuned: Tuned,
    examples: Path,
    generation_model: Path,
    tmp_path: Path,
) -> None:
    renderer = Renderer(AutoTokenizer.from_pretrained(generation_model))
    await client.download_adapter(tuned.adapter.id, tmp_path / "house")
    async with grpc.aio.insecure_channel(stack.address) as channel:
        said = renderer.continuation("No", 100)
        requests = pretended(tmp_path / "house", examples, said)
        await TuningServiceStub(channel).ImportAdapter(requests)

    async def measured() -> Adapter:
        async with asyncio.timeout(120):
            while (adapter := await client.adapter("pretender")).state == "verifying":
                await asyncio.sleep(0.1)
        return adapter

    adapter = await measured()
    assert (adapter.state, adapter.reason) == ("unfaithful", "LOG_PROBABILITIES_DIFFER")
    with pytest.raises(TworoadsError) as refused:
        await client.ask(LEAVE, path="tuned", adapter="pretender")
    assert refused.value.reason == "ADAPTER_NOT_ACCEPTED"
    stack.tworoads("adapters", "accept", adapter.id)
    answer = await client.ask(LEAVE, path="tuned", adapter="pretender")
    assert answer.text.startswith("In short:")


def pretended(
    folder: Path, examples: Path, continuation: list[int]
) -> Iterator[pb.ImportAdapterRequest]:
    """Yield what imports an adapter whose trainer claims to be sure of what it never learned."""
    yield pb.ImportAdapterRequest(start=pb.ImportAdapterStart(name="pretender"))
    for name in FILES:
        content = (folder / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        file = pb.AdapterFile(name=name, size=len(content), sha256=digest)
        yield pb.ImportAdapterRequest(file=file)
        for start in range(0, len(content), 1 << 20):
            yield pb.ImportAdapterRequest(chunk=content[start : start + (1 << 20)])
    for line in examples.read_text().splitlines()[:16]:
        asked = conversation(json.loads(line)["question"])
        messages = [
            MessagePb(role=ROLES[m.role], parts=[PartPb(text=p.text) for p in m.parts])
            for m in asked
        ]
        tokens = [TokenScore(id=id, log_probability=0.0) for id in continuation]
        yield pb.ImportAdapterRequest(
            probe=pb.AdapterProbe(messages=messages, continuation="No", tokens=tokens)
        )
    yield pb.ImportAdapterRequest(end=pb.ImportAdapterEnd())


async def test_a_killed_trainer_and_a_killed_service_cost_no_job(
    stack: RunningStack, client: Client, tuned: Tuned, examples: Path
) -> None:
    id = await queued(client, examples, "survivor", epochs=4)
    sequence = await until_training(client, id)
    service = stack.service("tuning")
    assert service.pid is not None
    [trainer] = processes(service.pid)
    trainer.kill()

    async def restarted() -> None:
        while (await client.job(id)).restarts == 0:
            await asyncio.sleep(0.1)

    await asyncio.wait_for(restarted(), 120)
    await until(lambda: service.pid is not None and processes(service.pid))
    [second] = processes(service.pid)
    killed = stack.kill("tuning")
    await until(lambda: gone(second), STOP_SECONDS)
    await stack.restarted(killed)
    events = [event async for event in client.watch_job(id, after_sequence=sequence)]
    assert [event.sequence for event in events] == sorted({event.sequence for event in events})
    assert all(event.sequence > sequence for event in events)
    job = await client.job(id)
    assert (job.state, job.restarts) == ("ready", 1), (job.reason, job.log_tail)


async def test_a_cancelled_job_stops_at_once_and_frees_its_trainer(
    stack: RunningStack, client: Client, examples: Path
) -> None:
    id = await queued(client, examples, "unwanted", epochs=50)
    await until_training(client, id)
    pid = stack.service("tuning").pid
    assert pid is not None
    [trainer] = processes(pid)
    job = await asyncio.wait_for(client.cancel_job(id), STOP_SECONDS)
    assert job.state == "cancelled" and gone(trainer)
    assert "unwanted" not in {adapter.name for adapter in await client.adapters()}


async def test_what_a_replica_has_cached_it_serves_without_tuning_and_after_a_crash(
    stack: RunningStack, client: Client, tuned: Tuned
) -> None:
    before = await client.ask(LEAVE, path="tuned", adapter=tuned.adapter.id)
    generation = stack.kill("generation")
    tuning = stack.service("tuning")
    assert tuning.pid is not None
    await stack.restarted(generation)
    psutil.Process(tuning.pid).suspend()  # away, and not started again
    try:
        after = await client.ask(LEAVE, path="tuned", adapter=tuned.adapter.id, timeout=60)
    finally:
        psutil.Process(tuning.pid).resume()
    assert after.text == before.text


async def test_a_deleted_adapter_is_gone_at_once(
    stack: RunningStack, client: Client, tuned: Tuned
) -> None:
    stack.tworoads("adapters", "delete", tuned.adapter.id)
    with pytest.raises(TworoadsError) as refused:
        await client.ask(LEAVE, path="tuned", adapter=tuned.adapter.id)
    assert refused.value.reason == "ADAPTER_NOT_FOUND"
    assert tuned.adapter.id not in {adapter.id for adapter in await client.adapters()}
