"""ImportAdapter: what is taken, and what is refused before anything is kept."""

import asyncio
import hashlib
import resource
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path

import grpc
import pytest
from tworoads.v1 import generation_pb2, tuning_pb2
from tworoads.v1 import tuning_pb2 as pb
from tworoads.v1.tuning_pb2_grpc import (
    TuningServiceServicer,
    TuningServiceStub,
    add_TuningServiceServicer_to_server,
)

from services.runtime.call import TENANT
from services.runtime.channel import connect
from services.runtime.database import Database
from services.runtime.errors import error_info
from services.runtime.server import running
from services.runtime.settings import ServerSettings
from services.tuning.adapters import imports
from services.tuning.adapters.imports import AT_ONCE, OF_TENANT, receive
from services.tuning.adapters.registry import Registry
from services.tuning.messages import adapter_message
from services.tuning.schema import SCHEMA
from tests.small_adapter import HIDDEN, MAX_RANK, RANK, small_base, tensors, write_adapter

NAME = tuning_pb2.DESCRIPTOR.services_by_name["TuningService"].full_name
MEBIBYTE = 1024 * 1024
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LINES = b'{"question": "a?", "answer": "b"}\n{"messages": [%s]}' % (
    b'{"role": "user", "content": "c?"}, {"role": "assistant", "content": "d"}'
)


class Importing(TuningServiceServicer):
    """Takes adapters into a real registry."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "data"
        self.folder.mkdir()
        self.base = small_base(folder / "model")
        self.registry = Registry(self.folder, Database(self.folder / "tuning.db", SCHEMA))
        self.ended = asyncio.Event()

    async def ImportAdapter(self, request_iterator, context):
        try:
            tmp = self.folder / "tmp"
            adapter = await receive(request_iterator, self.registry, self.base, MAX_RANK, tmp)
            return pb.ImportAdapterResponse(adapter=adapter_message(adapter))
        finally:
            self.ended.set()

    def left(self) -> list[Path]:
        return [path for top in ("adapters", "tmp") for path in (self.folder / top).rglob("*.*")]


@pytest.fixture
def service(tmp_path: Path) -> Importing:
    return Importing(tmp_path)


@pytest.fixture
async def stub(service: Importing) -> AsyncIterator[TuningServiceStub]:
    async with running(ServerSettings(grace_seconds=0), [NAME]) as server:
        await server.serve(lambda s: add_TuningServiceServicer_to_server(service, s))
        async with connect(f"127.0.0.1:{server.port}", NAME) as channel:
            yield TuningServiceStub(channel)


def part(**what) -> pb.ImportAdapterRequest:
    return pb.ImportAdapterRequest(**what)


def start(name: str = "house-style", **how) -> pb.ImportAdapterRequest:
    return part(start=pb.ImportAdapterStart(name=name, **how))


def file(name: str, content: bytes, **wrong) -> Iterator[pb.ImportAdapterRequest]:
    digest = hashlib.sha256(content).hexdigest()
    yield part(
        file=pb.AdapterFile(**{"name": name, "size": len(content), "sha256": digest} | wrong)
    )
    for begin in range(0, len(content), 700):
        yield part(chunk=content[begin : begin + 700])


def user(text: str = "Who?", **more) -> generation_pb2.Message:
    return generation_pb2.Message(
        role=generation_pb2.ROLE_USER, parts=[generation_pb2.Part(text=text, **more)]
    )


def said(role: int) -> generation_pb2.Message:
    return generation_pb2.Message(role=role, parts=[generation_pb2.Part(text="x")])


def probe(
    *messages: generation_pb2.Message, continuation: str = "Ada.", score: float = -0.5
) -> pb.ImportAdapterRequest:
    return part(
        probe=pb.AdapterProbe(
            messages=messages or [user()],
            continuation=continuation,
            tokens=[generation_pb2.TokenScore(id=i, log_probability=score) for i in (5, 2)],
        )
    )


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    folder = write_adapter(tmp_path / "made")
    return {name: (folder / name).read_bytes() for name in (WEIGHTS, CONFIG)}


async def send(stub: TuningServiceStub, *parts, tenant: str = "default") -> pb.Adapter:
    """Send messages, and streams of them, in their order."""

    async def requests() -> AsyncIterator[pb.ImportAdapterRequest]:
        for given in parts:
            for request in given if isinstance(given, Iterable) else [given]:
                yield request
        yield part(end=pb.ImportAdapterEnd())

    response = await stub.ImportAdapter(requests(), metadata=((TENANT, tenant),))
    return response.adapter


async def refused(stub: TuningServiceStub, *parts) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await send(stub, *parts)
    info = error_info(error.value)
    return error.value.code(), info.reason if info else ""


async def test_an_adapter_that_was_trained_elsewhere_is_registered(
    stub: TuningServiceStub, service: Importing, files: dict[str, bytes]
) -> None:
    options = pb.TrainingOptions(
        context=pb.TRAINING_CONTEXT_MIXED, rank=1, alpha=1, epochs=2, learning_rate=0.01, seed=5
    )
    adapter = await send(
        stub,
        start(options=options, held_out_loss=0.25, training_seconds=9.5),
        file(CONFIG, files[CONFIG]),
        file(WEIGHTS, files[WEIGHTS]),
        [probe(user(f"{i}?")) for i in range(8)],
        part(examples=LINES[:20]),
        [probe(said(1), user(f"{i}?")) for i in range(8)],
        part(examples=LINES[20:]),
    )
    assert adapter.state == pb.ADAPTER_STATE_VERIFYING
    assert adapter.options == pb.TrainingOptions(
        context=pb.TRAINING_CONTEXT_MIXED,
        rank=RANK,
        alpha=8,
        epochs=2,
        learning_rate=0.01,
        seed=5,
        targets=["q_proj", "up_proj"],
    )
    assert [(f.name, f.size) for f in adapter.files] == [
        (name, len(files[name])) for name in (WEIGHTS, CONFIG)
    ]
    assert adapter.base_model_hash == service.base.hash
    assert (adapter.prompt_version, adapter.job) == ("v1", "")
    assert (adapter.held_out_loss, adapter.training_seconds) == (0.25, 9.5)
    assert adapter.examples_hash == hashlib.sha256(LINES).hexdigest()
    kept = service.registry.get("default", adapter.id)
    assert b"".join(b for _, b in service.registry.read(kept, "examples", 0)) == LINES
    assert [p.messages[-1].parts[0].text for p in service.registry.probes(kept)] == [
        f"{i}?" for i in [*range(8), *range(8)]
    ]
    assert list((service.folder / "tmp").iterdir()) == []


async def test_probes_and_examples_are_optional_and_what_is_unknown_stays_open(
    stub: TuningServiceStub, service: Importing, files: dict[str, bytes]
) -> None:
    parts = [start(base_model_hash=service.base.hash), *file(WEIGHTS, files[WEIGHTS])]
    adapter = await send(stub, parts, file(CONFIG, files[CONFIG]))
    assert (adapter.state, adapter.reason) == (pb.ADAPTER_STATE_UNMEASURED, "TOO_FEW_PROBES")
    assert adapter.examples_hash == ""
    assert adapter.options.context == pb.TRAINING_CONTEXT_UNSPECIFIED
    assert (adapter.options.epochs, adapter.options.learning_rate) == (0, 0.0)
    for name in ("held_out_loss", "training_seconds"):
        assert not adapter.HasField(name)
    assert not adapter.options.HasField("held_out_share")


async def test_the_same_adapter_sent_again_is_returned_as_it_stands(
    stub: TuningServiceStub, files: dict[str, bytes]
) -> None:
    async def again(tenant: str) -> pb.Adapter:
        parts = (file(name, content) for name, content in files.items())
        return await send(stub, start(), *parts, tenant=tenant)

    first = await again("a")
    assert await again("a") == first
    theirs = await again("b")
    assert theirs.id == first.id and theirs.create_time != first.create_time


HASH = hashlib.sha256(b"x").hexdigest()
X = dict(name=CONFIG, size=1, sha256=HASH)
REFUSED = [
    ([], "START_MISSING"),
    ([part()], "START_MISSING"),
    ([part(chunk=b"x")], "START_MISSING"),
    ([part(file=pb.AdapterFile(**X))], "START_MISSING"),
    ([start("../x")], "ADAPTER_NAME_INVALID"),
    ([start("a" * 300)], "ADAPTER_NAME_INVALID"),
    ([start("а")], "ADAPTER_NAME_INVALID"),  # Cyrillic
    ([start("a\0")], "ADAPTER_NAME_INVALID"),
    ([start(prompt_version="v999")], "PROMPT_VERSION_UNKNOWN"),
    ([start(options=pb.TrainingOptions(context=9))], "CONTEXT_UNKNOWN"),
    ([start(options=pb.TrainingOptions(epochs=101))], "CONFIG_INVALID"),
    ([start(options=pb.TrainingOptions(learning_rate=float("nan")))], "CONFIG_INVALID"),
    ([start(options=pb.TrainingOptions(held_out_share=float("inf")))], "CONFIG_INVALID"),
    ([start(held_out_loss=float("nan"))], "CONFIG_INVALID"),
    ([start(training_seconds=-1)], "CONFIG_INVALID"),
    ([start()], "FILE_MISSING"),
    ([start(), *file(WEIGHTS, b"x")], "FILE_MISSING"),
    ([start(), *file(CONFIG, b"x")], "FILE_MISSING"),
    ([start(), start()], "PART_OUT_OF_ORDER"),
    ([start(), part()], "PART_OUT_OF_ORDER"),
    ([start(), part(chunk=b"x")], "PART_OUT_OF_ORDER"),
    ([start(), probe()], "PART_OUT_OF_ORDER"),
    ([start(), part(examples=b"x")], "PART_OUT_OF_ORDER"),
    ([start(), *file(CONFIG, b"x"), *file(CONFIG, b"x")], "PART_OUT_OF_ORDER"),
    ([start(), *file(CONFIG, b"x"), probe(), part(chunk=b"x")], "PART_OUT_OF_ORDER"),
    ([start(), *file(CONFIG, b"x"), probe(), *file(WEIGHTS, b"x")], "PART_OUT_OF_ORDER"),
    (
        [start(), *file(CONFIG, b"x"), part(examples=LINES), *file(WEIGHTS, b"x")],
        "PART_OUT_OF_ORDER",
    ),
    ([start(), *file("../../x", b"x")], "FILE_UNKNOWN"),
    ([start(), *file("adapter_model.bin", b"x")], "FILE_UNKNOWN"),
    ([start(), *file("examples.jsonl", b"x")], "FILE_UNKNOWN"),
    ([start(), *file("", b"x")], "FILE_UNKNOWN"),
    ([start(), *file(CONFIG, b"x", size=2 * MEBIBYTE)], "FILE_TOO_LARGE"),
    ([start(), *file(WEIGHTS, b"x", size=2**64 - 1)], "FILE_TOO_LARGE"),
    ([start(), *file(CONFIG, b"x", size=2), *file(WEIGHTS, b"x")], "FILE_HASH_MISMATCH"),
    ([start(), *file(CONFIG, b"xy", size=1)], "FILE_HASH_MISMATCH"),
    ([start(), *file(CONFIG, b"x", sha256=HASH.upper()), probe()], "FILE_HASH_MISMATCH"),
    ([start(), *file(CONFIG, b"x", sha256="")], "FILE_HASH_MISMATCH"),
    ([start(), *file(CONFIG, b"y", sha256=HASH)], "FILE_HASH_MISMATCH"),
    (
        [start(), part(file=pb.AdapterFile(**X)), part(chunk=bytes(MEBIBYTE + 1))],
        "CHUNK_TOO_LARGE",
    ),
    ([start(), *file(CONFIG, b"x"), part(examples=bytes(MEBIBYTE + 1))], "CHUNK_TOO_LARGE"),
    ([start(), *file(CONFIG, b"x"), probe(continuation="")], "PROBE_INVALID"),
    ([start(), *file(CONFIG, b"x"), part(probe=pb.AdapterProbe())], "PROBE_INVALID"),
    ([start(), *file(CONFIG, b"x"), probe(said(9))], "PROBE_INVALID"),
    ([start(), *file(CONFIG, b"x"), probe(said(3))], "PROBE_INVALID"),
    ([start(), *file(CONFIG, b"x"), probe(said(3), user())], "PROBE_INVALID"),
    ([start(), *file(CONFIG, b"x"), probe(user(), user())], "PROBE_INVALID"),
    ([start(), *file(CONFIG, b"x"), probe(user(droppable=True))], "PROBE_INVALID"),
    ([start(), *file(CONFIG, b"x"), probe(score=float("nan"))], "PROBE_INVALID"),
    ([start(), *file(CONFIG, b"x"), probe(score=-float("inf"))], "PROBE_INVALID"),
    ([start(), *file(CONFIG, b"x"), probe(score=0.5)], "PROBE_INVALID"),
    ([start(), *file(CONFIG, b"x"), *[probe()] * 257], "TOO_MANY_PROBES"),
    ([start(), *file(CONFIG, b"x"), *[probe(user("x" * MEBIBYTE))] * 8], "TOO_MANY_PROBES"),
]


@pytest.mark.parametrize(("parts", "reason"), REFUSED)
async def test_an_upload_that_is_not_in_order_is_refused(
    parts: list, reason: str, stub: TuningServiceStub, service: Importing
) -> None:
    assert await refused(stub, parts) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    assert service.left() == []


EXAMPLES = [
    b"{",
    b"\xff\n",
    b"[]\n",
    b'{"question": "a?"}\n',
    b'{"question": "a?", "answer": ""}\n',
    LINES + b"\n{}",
    b'{"question": "a?", "answer": "%s"}\n' % (b"x" * MEBIBYTE),
]


@pytest.mark.parametrize("examples", EXAMPLES)
async def test_examples_that_are_none_are_refused(
    examples: bytes, stub: TuningServiceStub, service: Importing, files: dict[str, bytes]
) -> None:
    chunks = [examples[i : i + 500_000] for i in range(0, len(examples), 500_000)]
    parts = (file(name, content) for name, content in files.items())
    answer = await refused(stub, start(), *parts, [part(examples=chunk) for chunk in chunks])
    assert answer == (grpc.StatusCode.INVALID_ARGUMENT, "EXAMPLES_INVALID")
    assert service.left() == []


async def test_an_adapter_of_another_base_model_is_refused(
    stub: TuningServiceStub, service: Importing, tmp_path: Path
) -> None:
    mismatch = (grpc.StatusCode.FAILED_PRECONDITION, "BASE_MODEL_MISMATCH")
    assert await refused(stub, start(base_model_hash="0" * 64)) == mismatch
    other = write_adapter(tmp_path / "other", tensors(into=HIDDEN + 1))
    parts = (file(name, (other / name).read_bytes()) for name in (WEIGHTS, CONFIG))
    assert await refused(stub, start(), *parts) == mismatch
    assert service.left() == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(use_dora=True), "DORA_REFUSED"),
        (dict(bias="all"), "BIAS_REFUSED"),
        (dict(r=MAX_RANK + 1), "RANK_OUT_OF_RANGE"),
        (dict(target_modules=["k_proj"]), "TARGETS_INVALID"),
    ],
)
async def test_an_adapter_that_generation_cannot_serve_is_refused(
    changes: dict, reason: str, stub: TuningServiceStub, service: Importing, tmp_path: Path
) -> None:
    made = write_adapter(tmp_path / "unfit", **changes)
    parts = (file(name, (made / name).read_bytes()) for name in (WEIGHTS, CONFIG))
    assert await refused(stub, start(), *parts) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    assert service.left() == []


async def test_truncated_weights_are_refused_though_their_hash_is_right(
    stub: TuningServiceStub, service: Importing, files: dict[str, bytes]
) -> None:
    parts = [*file(CONFIG, files[CONFIG]), *file(WEIGHTS, files[WEIGHTS][:-10])]
    answer = await refused(stub, start(), parts)
    assert answer == (grpc.StatusCode.INVALID_ARGUMENT, "SAFETENSORS_INVALID")
    assert service.left() == []


async def test_a_full_disk_refuses_the_upload_and_keeps_nothing(
    stub: TuningServiceStub, service: Importing, files: dict[str, bytes]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        answer = await refused(
            stub, start(), file(CONFIG, files[CONFIG]), file(WEIGHTS, files[WEIGHTS])
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert answer == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL")
    assert service.left() == []


async def test_an_upload_that_breaks_off_is_not_kept(
    stub: TuningServiceStub, service: Importing, files: dict[str, bytes]
) -> None:
    parts = [start(), *file(CONFIG, files[CONFIG]), *file(WEIGHTS, files[WEIGHTS])]
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.ImportAdapter(iter(parts))
    info = error_info(error.value)
    assert info and info.reason == "END_MISSING"
    assert service.left() == []


async def test_a_caller_who_leaves_in_the_middle_leaves_nothing_behind(
    stub: TuningServiceStub, service: Importing, files: dict[str, bytes]
) -> None:
    call = stub.ImportAdapter()
    for request in (
        start(),
        *file(CONFIG, files[CONFIG]),
        *list(file(WEIGHTS, files[WEIGHTS]))[:2],
    ):
        await call.write(request)
    call.cancel()
    await service.ended.wait()
    assert service.left() == []


async def test_only_so_many_are_imported_at_once(
    stub: TuningServiceStub, service: Importing, files: dict[str, bytes]
) -> None:
    full = (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    calls: list[grpc.aio.StreamUnaryCall] = []
    for tenant in ("one", "two"):
        mine = ((TENANT, tenant),)
        for _ in range(OF_TENANT):
            assert len(imports.under_way) < AT_ONCE
            calls.append(stub.ImportAdapter(metadata=mine))
            await calls[-1].write(start())
            async with asyncio.timeout(10):
                while len(imports.under_way) < len(calls):
                    await asyncio.sleep(0)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await send(stub, start(), tenant=tenant)
        assert error_info(error.value).reason == "QUEUE_FULL"
    assert await refused(stub, start()) == full
    for call in calls:
        call.cancel()
    async with asyncio.timeout(10):
        while imports.under_way:
            await asyncio.sleep(0)
    assert await send(stub, start(), *(file(name, content) for name, content in files.items()))
