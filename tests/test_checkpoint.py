import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from services.generation.prepare import prepare
from services.generation.processor import environment, executor
from services.runtime.checkpoint import Unfit, check, context_length, fingerprint
from services.runtime.processor import DType, Processor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps({"max_position_embeddings": 2048}))
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    (checkpoint / "tokenizer_config.json").write_text("{}")
    return checkpoint


def test_a_plain_checkpoint_is_taken_where_it_is(folder: Path, tmp_path: Path) -> None:
    assert prepare(str(folder), tmp_path / "out") == folder.resolve()
    assert not (tmp_path / "out").exists()


def test_a_hub_model_keeps_its_revision_once_it_was_downloaded(
    folder: Path, tmp_path: Path
) -> None:
    downloaded = tmp_path / "out" / "org--name--0a1b2c"
    downloaded.parent.mkdir()
    folder.rename(downloaded)
    assert prepare("org/name", tmp_path / "out") == downloaded.resolve()
    assert prepare("org/name@0a1b2c", tmp_path / "out") == downloaded.resolve()
    longer = tmp_path / "out" / "org--name-instruct--0d"
    shutil.copytree(downloaded, longer)
    os.utime(longer, (2e9, 2e9))
    assert prepare("org/name", tmp_path / "out") == downloaded.resolve()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", "{", "not JSON"),
        ("config.json", '{"auto_map": {"AutoModel": "evil.Model"}}', "auto_map"),
        ("tokenizer_config.json", '{"auto_map": {}}', "auto_map"),
        ("model.safetensors", None, "no weights"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "other.safetensors"}}', "lacks"),
    ],
)
def test_refuses_what_is_incomplete_or_brings_code(
    folder: Path, tmp_path: Path, file: str, content: str | None, message: str
) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(Unfit, match=message):
        check(folder)
    with pytest.raises(Unfit, match=message):
        prepare(str(folder), tmp_path / "out")


@pytest.mark.parametrize("model", ["no-such-package", "pytest", ""])
def test_a_package_without_a_model_is_refused_and_leaves_nothing(
    model: str, tmp_path: Path
) -> None:
    with pytest.raises(Unfit):
        prepare(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_fingerprint_changes_with_what_makes_the_answer(folder: Path) -> None:
    before = fingerprint(folder)
    assert len(before) == 64
    (folder / "README.md").write_text("words")
    assert fingerprint(folder) == before
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with_template = fingerprint(folder)
    (folder / "model.safetensors").write_bytes(b"Weights")
    assert len({before, with_template, fingerprint(folder)}) == 3


def test_the_context_is_what_the_model_can_do_at_most(folder: Path) -> None:
    assert context_length(folder, 4096) == 2048
    assert context_length(folder, 1000) == 1000


@pytest.mark.parametrize(
    ("gpu", "flags", "wanted", "dtype"),
    [
        (False, {"avx2"}, "auto", "float32"),
        (False, {"avx2", "avx512_bf16"}, "auto", "bfloat16"),
        (False, {"avx2", "amx_bf16"}, "auto", "bfloat16"),
        (False, {"avx2"}, "bfloat16", "bfloat16"),
        (True, set(), "auto", "auto"),
        (True, set(), "float16", "float16"),
    ],
)
def test_the_type_of_the_weights_follows_the_processor(
    gpu: bool, flags: set[str], wanted: DType, dtype: str
) -> None:
    assert Processor(gpu, 2, frozenset(flags)).dtype(wanted) == dtype


def test_a_cpu_computes_in_one_process_with_all_its_cores() -> None:
    cpu, gpu = Processor(False, 6, frozenset()), Processor(True, 6, frozenset())
    assert (executor(cpu, "auto"), executor(cpu, "mp")) == ("uni", "mp")
    assert (executor(gpu, "auto"), executor(gpu, "uni")) == (None, "uni")
    assert environment(cpu, "uni", 0, 2)["OMP_NUM_THREADS"] == "6"
    assert environment(cpu, "uni", 3, 2)["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in environment(cpu, "mp", 0, 2)
    assert "OMP_NUM_THREADS" not in environment(gpu, None, 0, 2)
    for processor in (cpu, gpu):
        assert environment(processor, "uni", 0, 2)["VLLM_PLUGINS"] == "tworoads"


PARENT = """
import multiprocessing, time
from services.generation import plugin

def child(pipe):
    plugin.register()
    pipe.send("tied")
    time.sleep(600)

if __name__ == "__main__":
    plugin.register()  # does nothing here
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=child, args=(theirs,))
    process.start()
    assert ours.recv() == "tied"
    print(process.pid, flush=True)
    time.sleep(600)
"""


def test_a_process_of_the_engine_dies_with_the_one_that_started_it(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    assert parent.stdout is not None
    with parent:
        child = os.pidfd_open(int(parent.stdout.readline()))
        assert select.select([child], [], [], 0)[0] == []
        parent.send_signal(signal.SIGKILL)
        assert select.select([child], [], [], 10)[0] == [child]
    os.close(child)
