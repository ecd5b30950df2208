"""The tuning service with a trainer and models that need no library: all else is real."""

import asyncio
import hashlib
import json
import struct
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tworoads.v1 import generation_pb2, retrieval_pb2
from tworoads.v1 import tuning_pb2 as pb
from tworoads.v1.generation_pb2_grpc import (
    GenerationServiceServicer,
    GenerationServiceStub,
    add_GenerationServiceServicer_to_server,
)
from tworoads.v1.retrieval_pb2_grpc import (
    RetrievalServiceServicer,
    RetrievalServiceStub,
    add_RetrievalServiceServicer_to_server,
)
from tworoads.v1.tuning_pb2_grpc import (
    TuningServiceStub,
    add_TuningServiceServicer_to_server,
)

from services.prompts.rendering import Renderer
from services.prompts.words import conversation
from services.runtime.channel import connect
from services.runtime.database import Database
from services.runtime.errors import NotFound, ServiceError
from services.runtime.server import running
from services.runtime.settings import ServerSettings
from services.tuning.adapters.base_model import BaseModel
from services.tuning.adapters.registry import Registry
from services.tuning.adapters.verifying import Verifier
from services.tuning.job import Options, Progress
from services.tuning.jobs import Jobs
from services.tuning.making import Trainer
from services.tuning.messages import messages_of
from services.tuning.schema import SCHEMA
from services.tuning.service import TuningService
from services.tuning.training.trainer import Trained, TrainingFailed
from services.tuning.uploads import Uploads
from tests.tiny_tokenizer import TinyTokenizer

TUNING = "tworoads.v1.TuningService"
RETRIEVAL = "tworoads.v1.RetrievalService"
GENERATION = "tworoads.v1.GenerationService"
CONTEXT = 2048
LAYER = "model.layers.0.self_attn.q_proj"
BASE = BaseModel("tiny", "ab" * 32, Path("tiny"), CONTEXT, {LAYER: (8, 8)}, 1000)
OTHER_BASE = BaseModel("tiny", "cd" * 32, Path("tiny"), CONTEXT, {LAYER: (8, 8)}, 1000)
MAX_RANK = 16
TRAINED = -0.5  # log-probability of every token in training, and by default in generation


class FakeTrainer:
    """Trains in `steps` steps of no length, and leaves an adapter that suits BASE.

    It dies `deaths` times, each time after a step; raises `error` if that is set; waits at a step
    while `open` is not set. `began` is set when it waits, and counts are kept of what happened.
    """

    def __init__(self) -> None:
        self.steps = 3
        self.deaths = 0
        self.error: Exception | None = None
        self.open = asyncio.Event()
        self.open.set()
        self.began = asyncio.Event()
        self.loss: float | None = 0.25
        self.runs: list[int] = []  # the steps that were there already when a run began
        self.running = 0
        self.most_running = 0
        self.order: list[str] = []  # folders, as they were trained

    async def train(self, folder: Path, options: Options) -> Any:
        checkpoint = folder / "checkpoints" / "step"
        done = int(checkpoint.read_text()) if checkpoint.exists() else 0
        self.runs.append(done)
        self.order.append(folder.name)
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            rows = [json.loads(line) for line in (folder / "training.jsonl").open()]
            for step in range(done + 1, self.steps + 1):
                yield Progress(step, self.steps, 1 / step, None, 100.0, float(self.steps - step))
                checkpoint.parent.mkdir(exist_ok=True)
                checkpoint.write_text(str(step))
                if self.deaths:
                    self.deaths -= 1
                    raise TrainingFailed("TRAINER_DIED", "the trainer was killed", "last words")
                if self.error:
                    raise self.error
                if not self.open.is_set():
                    self.began.set()
                    await self.open.wait()
            write_adapter(folder / "adapter", options.rank, options.alpha, seed=folder.name)
            probes = [[TRAINED] * len(row["answer"]) for row in rows if row["probe"]]
            yield Trained(self.loss, 1.5, probes)
        finally:
            self.running -= 1


class FakeGeneration(GenerationServiceServicer):
    """Gives every token `adapted` with an adapter and -2 without one; writes what it is asked for.

    Set `error` to fail every call, and clear `open` to hold them.
    """

    def __init__(self) -> None:
        self.renderer = Renderer(TinyTokenizer())
        self.adapted = TRAINED
        self.error: ServiceError | None = None
        self.open = asyncio.Event()
        self.open.set()
        self.began = asyncio.Event()
        self.scored: list[str] = []

    async def Score(self, request, context):
        await self._held()
        self.scored.append(request.adapter)
        messages = messages_of(request.messages)
        prompt, said = self.renderer.exchange(messages, request.continuation, CONTEXT)
        ids = struct.pack(f"<{len(prompt.token_ids)}I", *prompt.token_ids)
        value = self.adapted if request.adapter else -2.0
        return generation_pb2.ScoreResponse(
            tokens=[generation_pb2.TokenScore(id=id, log_probability=value) for id in said],
            prompt_hash=hashlib.sha256(ids).hexdigest(),
        )

    async def Generate(self, request, context):
        await self._held()
        finish = generation_pb2.GenerateFinish(tokens=request.options.max_tokens)
        yield generation_pb2.GenerateResponse(text="words", finish=finish)

    async def GetModel(self, request, context):
        return generation_pb2.GenerationServiceGetModelResponse(
            id=BASE.id, hash=BASE.hash, context_length=CONTEXT
        )

    async def _held(self) -> None:
        self.began.set()
        await self.open.wait()
        if self.error:
            raise self.error


class FakeRetrieval(RetrievalServiceServicer):
    """Has `corpora`: the texts of documents by id, by corpus. Finds all of them for any query."""

    def __init__(self) -> None:
        texts = {f"d{number}": f"Passage {number} of the manual." for number in range(8)}
        self.corpora: dict[str, dict[str, str]] = {"manual": texts}
        self.error: ServiceError | None = None
        self.open = asyncio.Event()
        self.open.set()
        self.began = asyncio.Event()
        self.searches = 0

    async def GetCorpus(self, request, context):
        documents = len(self._corpus(request.name))
        corpus = retrieval_pb2.Corpus(name=request.name, documents=documents)
        return retrieval_pb2.GetCorpusResponse(corpus=corpus)

    async def ListDocuments(self, request, context):
        ids = self._corpus(request.corpus)
        return retrieval_pb2.ListDocumentsResponse(
            documents=[retrieval_pb2.Document(id=id) for id in ids]
        )

    async def GetDocument(self, request, context):
        texts = self._corpus(request.corpus)
        if request.id not in texts:
            raise NotFound("DOCUMENT_NOT_FOUND", "there is no such document")
        text = texts[request.id]
        document = retrieval_pb2.Document(id=request.id, length=len(text), passages=1)
        end = request.end if request.HasField("end") else len(text)
        return retrieval_pb2.GetDocumentResponse(document=document, text=text[:end], end=end)

    async def Search(self, request, context):
        self.began.set()
        self.searches += 1
        await self.open.wait()
        texts = self._corpus(request.corpus)
        wanted = request.filter.document_ids
        found = [id for id in texts if not wanted or id in wanted][: request.limit or 5]
        return retrieval_pb2.SearchResponse(
            passages=[
                retrieval_pb2.Passage(
                    id=f"{id}.0", document_id=id, text=texts[id], end=len(texts[id])
                )
                for id in found
            ]
        )

    def _corpus(self, name: str) -> dict[str, str]:
        if self.error:
            raise self.error
        if name not in self.corpora:
            raise NotFound("CORPUS_NOT_FOUND", f"there is no corpus {name!r}")
        return self.corpora[name]


@dataclass
class SmallTuning:
    """A running tuning service: its address and a stub of it, its folder, and what is faked."""

    address: str
    stub: TuningServiceStub
    folder: Path
    trainer: Any
    generation: FakeGeneration
    retrieval: FakeRetrieval
    jobs: Jobs


@asynccontextmanager
async def small_tuning(
    folder: Path,
    trainer: Trainer | None = None,
    generation: FakeGeneration | None = None,
    *,
    base: BaseModel = BASE,
    upload_bytes: int = 4 * 1024 * 1024,
    patience: float = 0.0,
    **options: Any,
) -> AsyncIterator[SmallTuning]:
    """Run the tuning service on `folder`, the one of a service that ran before or a new one.

    `patience` is how long generation may be away in seconds, `options` are those of Jobs.
    """
    settings = ServerSettings(grace_seconds=0)
    trainer, generation = trainer or FakeTrainer(), generation or FakeGeneration()
    retrieval = FakeRetrieval()
    renderer = Renderer(TinyTokenizer())
    folder.mkdir(exist_ok=True)
    options = {"retry_seconds": 0.0, **options}
    async with (
        running(settings, [GENERATION, RETRIEVAL]) as models,
        running(settings, [TUNING]) as server,
        connect(f"127.0.0.1:{models.port}", GENERATION) as models_channel,
        connect(f"127.0.0.1:{server.port}", TUNING) as channel,
    ):
        await models.serve(
            lambda s: add_GenerationServiceServicer_to_server(generation, s),
            lambda s: add_RetrievalServiceServicer_to_server(retrieval, s),
        )
        searching = RetrievalServiceStub(models_channel)
        verifier = Verifier(GenerationServiceStub(models_channel), patience)
        with closing(Database(folder / "tuning.db", SCHEMA)) as database:
            registry = Registry(folder, database)
            async with Jobs(
                folder, database, registry, base, renderer, trainer, verifier, searching, **options
            ) as jobs:
                tmp = folder / "tmp"
                uploads = Uploads(
                    tmp, jobs, base, renderer, searching, MAX_RANK, False, upload_bytes
                )
                service = TuningService(jobs, uploads, registry, base, MAX_RANK, tmp)
                await server.serve(lambda s: add_TuningServiceServicer_to_server(service, s))
                yield SmallTuning(
                    f"127.0.0.1:{server.port}",
                    TuningServiceStub(channel),
                    folder,
                    trainer,
                    generation,
                    retrieval,
                    jobs,
                )


def write_adapter(folder: Path, rank: int = 8, alpha: float = 16.0, seed: str = "") -> None:
    """Write the two files of an adapter that suits BASE. Another seed gives other weights."""
    folder.mkdir(parents=True, exist_ok=True)
    value = struct.pack("<f", int(hashlib.sha256(seed.encode()).hexdigest()[:4], 16) / 2**16)
    header: dict[str, Any] = {}
    size = 4 * rank * 8
    for number, (half, shape) in enumerate((("A", [rank, 8]), ("B", [8, rank]))):
        key = f"base_model.model.{LAYER}.lora_{half}.weight"
        offsets = [number * size, (number + 1) * size]
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    weights = len(text).to_bytes(8, "little") + text + value * (2 * rank * 8)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def probe(number: int) -> pb.AdapterProbe:
    """Return an answer of which the trainer thought as FakeGeneration does."""
    messages = conversation(f"What is {number}?")
    answer = f"It is {number}."
    ids = Renderer(TinyTokenizer()).continuation(answer, CONTEXT)
    return pb.AdapterProbe(
        messages=[
            generation_pb2.Message(
                role=generation_pb2.Role.Value(f"ROLE_{message.role.upper()}"),
                parts=[generation_pb2.Part(text=part.text) for part in message.parts],
            )
            for message in messages
        ],
        continuation=answer,
        tokens=[generation_pb2.TokenScore(id=id, log_probability=TRAINED) for id in ids],
    )


def examples(count: int = 40, **fields: Any) -> list[dict[str, Any]]:
    """Return examples to train on."""
    return [
        {"question": f"What is {number}?", "answer": f"It is {number}.", **fields}
        for number in range(count)
    ]


def upload(
    rows: Iterable[dict[str, Any]] | bytes | None = None,
    questions: bytes | None = None,
    **start: Any,
) -> Iterator[pb.CreateJobRequest]:
    """Yield the parts of an upload; by default of 40 examples for an adapter called "house"."""
    if not isinstance(rows, bytes):
        rows = b"".join(json.dumps(row).encode() + b"\n" for row in rows or examples())
    yield pb.CreateJobRequest(start=pb.CreateJobStart(**{"name": "house", **start}))
    for begin in range(0, len(rows), 1000):
        yield pb.CreateJobRequest(examples=rows[begin : begin + 1000])
    if questions is not None:
        yield pb.CreateJobRequest(questions=questions)
    yield pb.CreateJobRequest(end=pb.CreateJobEnd())


async def created(stub: TuningServiceStub, *args: Any, **start: Any) -> pb.Job:
    """Upload examples as `upload` does, and return the job."""
    job = None
    async for response in stub.CreateJob(upload(*args, **start)):
        if response.HasField("job"):
            job = response.job
    assert job is not None
    return job


async def ended(stub: TuningServiceStub, id: str) -> pb.Job:
    """Watch a job to its end, and return it as it is then."""
    job = None
    async for response in stub.WatchJob(pb.WatchJobRequest(id=id)):
        if response.HasField("job"):
            job = response.job
    assert job is not None
    return job
