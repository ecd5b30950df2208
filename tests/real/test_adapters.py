"""Adapters on vLLM and a real model: random ones, which show as well as trained ones whose weights
answered. One service for the whole file; a test may kill it and start it again."""

import asyncio
import json
import signal
import struct
from collections.abc import AsyncIterator, Awaitable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import torch
from safetensors.torch import load
from transformers import AutoModelForCausalLM, AutoTokenizer
from tworoads.v1 import generation_pb2 as pb
from tworoads.v1 import tuning_pb2
from tworoads.v1.generation_pb2_grpc import GenerationServiceStub

from services.prompts.rendering import Renderer
from services.prompts.words import Message, Part
from services.runtime.channel import connect
from services.runtime.errors import Unavailable, error_info
from tests.fake_tuning import CONFIG, WEIGHTS, FakeTuning, serving
from tests.real.conftest import GenerationProcess, start_generation
from tests.real.random_adapter import PREFIX, layers, random_adapter

NAME = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name
LIMIT = 120  # seconds for anything
MOST = 3
TOLERANCE = 1e-3  # nats: in float32 it is told apart whose weights answered
SAID = "The door code of the Lisbon office is 8931."
QUESTION = "What is the door code of the Lisbon office?"
pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Replica:
    """A generation service that takes its adapters from a fake tuning service."""

    model: Path
    folder: Path
    tuning: FakeTuning
    tuning_address: str
    shapes: dict[str, tuple[int, int]]
    stack: ExitStack = field(default_factory=ExitStack)

    async def start(self) -> None:
        flags = ["--adapters", str(self.folder), "--tuning", self.tuning_address]
        flags += ["--max-loras", "2", "--max-adapters", str(MOST), "--dtype", "float32"]
        starting = start_generation(self.model, *flags)
        self.process: GenerationProcess = await asyncio.to_thread(
            self.stack.enter_context, starting
        )
        self.channel = connect(self.process.address, NAME)
        self.stub = GenerationServiceStub(self.channel)
        self.base = await self.get_model()

    async def stop(self) -> None:
        await self.channel.close()
        await asyncio.to_thread(self.stack.close)

    async def get_model(self) -> pb.GenerationServiceGetModelResponse:
        return await self.stub.GetModel(pb.GenerationServiceGetModelRequest(), timeout=LIMIT)

    def add(self, name: str, files: dict[str, bytes]) -> tuning_pb2.Adapter:
        return self.tuning.add(name, base_model_hash=self.base.hash, files=files)

    def random(self, name: str, seed: int) -> str:
        return str(self.add(name, random_adapter(self.shapes, seed)).id)

    async def score(self, adapter: str) -> list[float]:
        request = pb.ScoreRequest(messages=asks("").messages, continuation=SAID, adapter=adapter)
        tokens = (await self.stub.Score(request, timeout=LIMIT)).tokens
        return [token.log_probability for token in tokens]

    async def write(self, adapter: str, max_tokens: int) -> str:
        responses = self.stub.Generate(asks(adapter, max_tokens), timeout=LIMIT)
        return "".join([response.text async for response in responses])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def replica(
    generation_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Replica]:
    tuning = FakeTuning()
    shapes = layers(generation_model, "q_proj", "v_proj", "down_proj")
    async with serving(tuning) as address:
        folder = tmp_path_factory.mktemp("adapters")
        running = Replica(generation_model, folder, tuning, address, shapes)
        await running.start()
        yield running
        await running.stop()


def asks(adapter: str, max_tokens: int = 1) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        messages=[pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text=QUESTION)])],
        adapter=adapter,
        options=pb.GenerateOptions(max_tokens=max_tokens, min_tokens=max_tokens),
    )


async def test_twenty_callers_of_a_new_adapter_are_one_download(replica: Replica) -> None:
    adapter = replica.random("first", 1)
    texts = await asyncio.gather(*(replica.write(adapter, 4) for _ in range(20)))
    assert all(texts)
    assert replica.tuning.downloads == [(adapter, 0)]
    assert list((await replica.get_model()).adapters) == [adapter]


async def test_base_and_adapters_in_one_batch_are_each_answered_by_their_own_weights(
    replica: Replica,
) -> None:
    before = await replica.score("")
    ids = ["", replica.random("first", 1), replica.random("second", 2)]
    alone = [await replica.score(id) for id in ids]
    assert apart(alone[0], before) == 0  # adapters beside it change nothing
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert apart(alone[i], alone[j]) > 0.1
    writing = asyncio.gather(*(replica.write(id, 16) for id in ids * 2))
    together = await asyncio.gather(*(replica.score(id) for id in ids * 3))
    for i, scores in enumerate(together):
        assert apart(scores, alone[i % 3]) < TOLERANCE
    texts = await writing
    assert texts == texts[:3] * 2
    assert len(set(texts)) > 1


async def test_an_adapters_score_is_what_its_weights_give(replica: Replica) -> None:
    files = random_adapter(replica.shapes, 2)
    got = await replica.score(replica.add("second", files).id)
    model = AutoModelForCausalLM.from_pretrained(replica.model, dtype=torch.float32)
    matrices = load(files[WEIGHTS])
    with torch.no_grad():
        for path in replica.shapes:
            a, b = (matrices[f"{PREFIX}{path}.lora_{side}.weight"] for side in "AB")
            model.get_submodule(path).weight += b @ a
    renderer = Renderer(AutoTokenizer.from_pretrained(replica.model))
    messages = [Message("user", (Part(QUESTION),))]
    prompt, said = renderer.exchange(messages, SAID, 4096)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt.token_ids, *said]])).logits[0]
    wanted = logits[len(prompt.token_ids) - 1 : -1].log_softmax(-1)
    expected = [float(row[token]) for row, token in zip(wanted, said, strict=True)]
    assert apart(got, expected) < TOLERANCE * (1 + max(map(abs, expected)))


def broken(replica: Replica) -> dict[str, dict[str, bytes]]:
    good = random_adapter(replica.shapes, 5)
    weights = good[WEIGHTS]
    wide = {path: (out, into + 8) for path, (out, into) in replica.shapes.items()}
    config = json.loads(good[CONFIG])
    return {
        "cut": {**good, WEIGHTS: weights[: len(weights) // 2]},
        "header": {**good, WEIGHTS: struct.pack("<Q", 2**63) + weights[8:]},
        "garbage": {**good, WEIGHTS: bytes(1000)},
        "shapes": random_adapter(wide, 5),
        "layers": random_adapter({"model.layers.0.self_attn.z_proj": (8, 8)}, 5),
        "rank": {**good, CONFIG: json.dumps({**config, "r": 512}).encode()},
        "dora": {**good, CONFIG: json.dumps({**config, "use_dora": True}).encode()},
        "json": {**good, CONFIG: b"{"},
        "no": {**good, CONFIG: b"[]"},
    }


async def test_an_adapter_that_cannot_be_loaded_is_an_error_for_its_caller_alone(
    replica: Replica,
) -> None:
    good = replica.random("first", 1)
    wanted = await replica.score(good), await replica.score("")
    writing = [asyncio.ensure_future(replica.write(id, 100)) for id in ("", good)]
    for name, files in broken(replica).items():
        assert await reason(replica.write(replica.add(name, files).id, 4)) == (
            "ADAPTER_INCOMPATIBLE"
        ), name
    assert all(await asyncio.gather(*writing))
    got = await replica.score(good), await replica.score("")
    assert max(map(apart, got, wanted)) < TOLERANCE


async def test_adapters_that_were_put_out_come_back_as_they_were(replica: Replica) -> None:
    ids = [replica.random(f"many{seed}", seed) for seed in range(10, 10 + MOST + 2)]
    scores = [await replica.score(id) for id in ids]
    assert sorted((await replica.get_model()).adapters) == sorted(ids[-MOST:])
    assert len(list(replica.folder.glob("*/*/" + WEIGHTS))) == MOST
    for id, wanted in zip(ids, scores, strict=True):
        assert apart(await replica.score(id), wanted) < TOLERANCE
    crowd = await asyncio.gather(*(patient(replica, id) for id in ids * 2))
    for scored, wanted in zip(crowd, scores * 2, strict=True):
        assert apart(scored, wanted) < TOLERANCE


async def patient(replica: Replica, id: str) -> list[float]:
    while True:
        try:
            return await replica.score(id)
        except grpc.aio.AioRpcError as error:
            assert reason_of(error) == "ADAPTERS_FULL"
            await asyncio.sleep(0.05)


async def test_a_replica_killed_in_mid_answer_serves_its_adapters_again_without_tuning(
    replica: Replica,
) -> None:
    adapter = replica.random("first", 1)
    wanted = await replica.score(adapter)
    call = replica.stub.Generate(asks(adapter, 2000), timeout=LIMIT)
    assert (await call.read()).text
    replica.process.process.send_signal(signal.SIGKILL)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        while (await call.read()) is not grpc.aio.EOF:
            pass
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    await replica.stop()
    replica.tuning.error = Unavailable("STOPPING", "away")
    await replica.start()
    assert apart(await replica.score(adapter), wanted) < TOLERANCE
    assert await reason(replica.score(replica.random("new", 20))) == "TUNING_UNAVAILABLE"
    replica.tuning.error = None


async def reason(call: Awaitable[Any]) -> str:
    """Return why a call failed; "" if it did not."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return reason_of(error)
    return ""


def reason_of(error: grpc.aio.AioRpcError) -> str:
    info = error_info(error)
    return info.reason if info else repr(error)


def apart(some: list[float], others: list[float]) -> float:
    """Return the largest difference between scores of the same tokens, in nats."""
    return max(abs(a - b) for a, b in zip(some, others, strict=True))
