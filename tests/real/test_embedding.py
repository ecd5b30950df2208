import asyncio
import gzip
import json
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from tworoads.v1 import embedding_pb2 as pb
from tworoads.v1.embedding_pb2_grpc import (
    EmbeddingServiceStub,
    add_EmbeddingServiceServicer_to_server,
)

from services.embedding.__main__ import NAME
from services.embedding.batcher import Batcher, Kind
from services.embedding.model import PACKAGED, SentenceTransformerModel, find, identity_hash
from services.embedding.service import MAX_CODE_POINTS, EmbeddingService
from services.runtime.channel import connect
from services.runtime.errors import error_info
from services.runtime.server import running
from services.runtime.settings import ServerSettings

QUERY, DOCUMENT = pb.EMBED_KIND_QUERY, pb.EMBED_KIND_DOCUMENT
QUESTION = "How many days of leave may be carried over?"
PASSAGES = [
    "Up to five days of annual leave may be carried into the next year.",
    "The canteen on the second floor opens at half past eleven.",
]
TEXTS = [
    QUESTION,
    *PASSAGES,
    "a",
    " ",
    "Grüße aus Zürich, 東京 and \N{PILE OF POO}!",
    "[SEP] are words [MASK] too",
    "one two three " * 500,
]


@pytest.fixture(scope="module")
def model() -> SentenceTransformerModel:
    return SentenceTransformerModel(PACKAGED, "float32")


@pytest.fixture(scope="module")
def offline() -> SentenceTransformer:
    return SentenceTransformer(str(find(PACKAGED)), device="cpu", local_files_only=True)


@pytest.fixture
async def embedding(model: SentenceTransformerModel) -> AsyncIterator[EmbeddingServiceStub]:
    settings = ServerSettings(listen="127.0.0.1:0", grace_seconds=0)
    async with (
        Batcher(model, max_tokens=2048, max_texts=256) as batcher,
        running(settings, [NAME]) as server,
        connect(f"127.0.0.1:{server.port}", NAME) as channel,
    ):
        service = EmbeddingService(model, batcher)
        await server.serve(lambda s: add_EmbeddingServiceServicer_to_server(service, s))
        yield EmbeddingServiceStub(channel)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the packaged model, to be changed."""
    return Path(shutil.copytree(find(PACKAGED), tmp_path / "model"))


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


async def embed(
    stub: EmbeddingServiceStub, texts: list[str], kind: pb.EmbedKind.ValueType
) -> np.ndarray:
    response = await stub.Embed(pb.EmbedRequest(texts=texts, kind=kind))
    return np.array([vector.values for vector in response.vectors], dtype=np.float32)


async def test_vectors_have_unit_length_and_the_dimension_it_says(
    embedding: EmbeddingServiceStub,
) -> None:
    said = (await embedding.GetModel(pb.EmbeddingServiceGetModelRequest())).model
    vectors = await embed(embedding, TEXTS, DOCUMENT)
    assert vectors.shape == (len(TEXTS), said.dimension) == (len(TEXTS), 384)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)


async def test_a_question_is_nearer_to_its_passage(embedding: EmbeddingServiceStub) -> None:
    question = (await embed(embedding, [QUESTION], QUERY))[0]
    right, wrong = await embed(embedding, PASSAGES, DOCUMENT) @ question
    assert right > 0.6 > 0.2 > wrong


async def test_64_callers_at_once_get_what_sentence_transformers_gives(
    embedding: EmbeddingServiceStub, offline: SentenceTransformer
) -> None:
    texts = [f"question {i}: " + " ".join(["what"] * (i % 13)) for i in range(64)]
    answers = await asyncio.gather(*(embed(embedding, [text], QUERY) for text in texts))
    expected = offline.encode_query(texts, normalize_embeddings=True)
    np.testing.assert_allclose(np.concatenate(answers), expected, atol=1e-5)


def same_as_offline(folder: Path) -> None:
    model = SentenceTransformerModel(str(folder), "float32")
    offline = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    texts = [*TEXTS, "word " * (MAX_CODE_POINTS // 5)]
    queries = model.encode(Kind.QUERY, texts)
    expected = offline.encode_query(texts, normalize_embeddings=True)
    np.testing.assert_allclose(queries, expected, atol=1e-5)
    documents = model.encode(Kind.DOCUMENT, texts)
    expected = offline.encode_document(texts, normalize_embeddings=True)
    np.testing.assert_allclose(documents, expected, atol=1e-5)


def test_both_kinds_equal_sentence_transformers() -> None:
    same_as_offline(find(PACKAGED))


def test_prompts_equal_sentence_transformers(folder: Path) -> None:
    edit(
        folder / "config_sentence_transformers.json",
        prompts={"query": "Represent this question: ", "passage": "The passage: "},
    )
    same_as_offline(folder)
    model = SentenceTransformerModel(str(folder), "float32")
    query, document = (model.encode(kind, [QUESTION])[0] for kind in Kind)
    assert np.dot(query, document) < 0.99


def test_a_default_prompt_left_out_of_the_mean_equals_sentence_transformers(folder: Path) -> None:
    edit(
        folder / "config_sentence_transformers.json",
        prompts={"task": "Compare: "},
        default_prompt_name="task",
    )
    edit(folder / "1_Pooling/config.json", include_prompt=False)
    same_as_offline(folder)


def test_bfloat16_keeps_the_direction(model: SentenceTransformerModel) -> None:
    lower = SentenceTransformerModel(PACKAGED, "bfloat16")
    pairs = [m.encode(Kind.DOCUMENT, TEXTS) for m in (model, lower)]
    assert (np.array(pairs[0]) * np.array(pairs[1])).sum(axis=1).min() >= 0.999


async def test_what_goes_beyond_the_most_tokens_does_not_reach_the_vector(
    embedding: EmbeddingServiceStub,
) -> None:
    long = "leave days " * 500
    vectors = await embed(embedding, [long + "canteen", long + "lift"], DOCUMENT)
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)


async def test_the_tokenizer_counts_as_the_model_does_without_cutting(
    embedding: EmbeddingServiceStub, offline: SentenceTransformer
) -> None:
    request = pb.EmbeddingServiceGetModelRequest(include_tokenizer=True)
    response = await embedding.GetModel(request)
    tokenizer = Tokenizer.from_str(gzip.decompress(response.tokenizer).decode())
    assert tokenizer.encode(QUESTION).ids == offline.tokenizer(QUESTION)["input_ids"]
    assert len(tokenizer.encode("word " * 1000).ids) == 1002
    assert response.model.max_tokens == 256


async def test_more_texts_than_fit_are_refused_and_the_others_answered(
    embedding: EmbeddingServiceStub,
) -> None:
    calls = [embed(embedding, ["word " * 20] * 100, DOCUMENT) for _ in range(3)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    refused = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
    assert [error.code() for error in refused] == [grpc.StatusCode.RESOURCE_EXHAUSTED]
    info = error_info(refused[0])
    assert info is not None and info.reason == "QUEUE_FULL"


def test_the_hash_follows_what_makes_a_vector_and_nothing_else(folder: Path) -> None:
    before = identity_hash(folder)
    assert before == identity_hash(find(PACKAGED))
    (folder / "README.md").write_text("changed")
    (folder / "onnx").mkdir()
    (folder / "onnx/config.json").write_text("{}")
    assert identity_hash(folder) == before
    seen = {before}
    for name in ("config.json", "1_Pooling/config.json", "config_sentence_transformers.json"):
        edit(folder / name, changed=True)
        seen.add(identity_hash(folder))
    for name in ("tokenizer.json", "model.safetensors"):
        with (folder / name).open("ab") as file:
            file.write(b" ")
        seen.add(identity_hash(folder))
    assert len(seen) == 6


def test_a_model_that_names_foreign_code_is_refused(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    modules = json.loads((folder / "modules.json").read_text())
    modules[2]["type"] = "evil.Evil"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformerModel(str(folder))
    assert not ran.exists()


async def started(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.embedding", *arguments, stderr=asyncio.subprocess.PIPE
    )


async def port_of(process: asyncio.subprocess.Process) -> int:
    assert process.stderr
    async for line in process.stderr:
        message = json.loads(line)["message"]
        if " serves on port " in message:
            return int(message.rpartition(" ")[2])
    raise AssertionError("it ended before it served")


async def test_sigterm_answers_the_calls_that_run_and_stops_within_seconds() -> None:
    process = await started()
    try:
        async with asyncio.timeout(120):
            port = await port_of(process)
        async with connect(f"127.0.0.1:{port}", NAME) as channel:
            stub = EmbeddingServiceStub(channel)
            await embed(stub, [QUESTION], QUERY)
            running = asyncio.create_task(embed(stub, ["word " * 99] * 32, DOCUMENT))
            await embed(stub, [QUESTION], QUERY)
            process.send_signal(signal.SIGTERM)
            assert (await running).shape == (32, 384)
        async with asyncio.timeout(25):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_model_that_is_not_there_ends_the_service_with_a_sentence() -> None:
    process = await started("--model", "nobody/nothing")
    async with asyncio.timeout(120):
        _, errors = await process.communicate()
    assert process.returncode == 1
    assert b"cannot load the model nobody/nothing" in errors
    assert b"Traceback" not in errors
