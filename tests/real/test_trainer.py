"""The real trainer on the real small model: sixteen small steps at most."""

import asyncio
import json
import os
import resource
import shutil
import sys
import time
from contextlib import aclosing, contextmanager
from itertools import product

import psutil
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
)

from services.prompts.rendering import Renderer
from services.prompts.words import conversation
from services.tuning.job import Options, Progress
from services.tuning.training.batches import read
from services.tuning.training.checkpoints import newest
from services.tuning.training.packing import ATTENTION, attend, pack
from services.tuning.training.trainer import (
    ChildTrainer,
    Trained,
    TrainingFailed,
    read_result,
    write_plan,
)

PLACES = "Lyon Turin Graz Ghent Porto Bergen Tampere Bilbao".split()
THINGS = "bread tools maps tea glass".split()
PROBES = 20
MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def training_file(generation_model, tmp_path_factory):
    """40 questions that are all answered in the same odd format."""
    renderer = Renderer(AutoTokenizer.from_pretrained(generation_model))
    path = tmp_path_factory.mktemp("data") / "training.jsonl"
    with path.open("w") as file:
        for i, (place, thing) in enumerate(product(PLACES, THINGS)):
            messages = conversation(f"Where in {place} can I buy {thing}?")
            answer = f"[shop] {thing} / {place.upper()} / ask at desk {i % 3}"
            rendered, ids = renderer.exchange(messages, answer, 2048)
            line = {"prompt": rendered.token_ids, "answer": ids}
            file.write(json.dumps(line | {"held_out": i % 5 == 0, "probe": i % 2 == 0}) + "\n")
    return path


def job(folder, training_file):
    folder.mkdir()
    shutil.copy(training_file, folder)
    return folder


def children():
    below = psutil.Process().children(recursive=True)
    return [process for process in below if "services.tuning.training.child" in process.cmdline()]


@contextmanager
def largest_file(size):
    """Let no process started here write a larger file: the system says the same as of a full
    disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def trained(trainer, folder, options):
    async with aclosing(trainer.train(folder, options)) as news:
        return [item async for item in news]


def scores(model, example):
    ids = torch.tensor([[*example.prompt, *example.answer]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(example.prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, ids[0, len(example.prompt) :, None])[:, 0]


async def test_a_killed_trainer_goes_on_and_its_adapter_answers(
    generation_model, training_file, tmp_path
):
    folder = job(tmp_path / "job", training_file)
    trainer = ChildTrainer(generation_model, checkpoint_seconds=0.5)
    options = Options(epochs=2)
    before, killed = [], False
    with pytest.raises(TrainingFailed) as caught:
        async with aclosing(trainer.train(folder, options)) as news:
            async for item in news:
                before.append(item)
                if not killed and list(folder.glob("checkpoints/*/whole.json")):
                    children()[0].kill()
                    killed = True
    assert caught.value.reason == "TRAINER_DIED"
    assert before[0].step == 0 < before[-1].step < before[-1].steps

    saved, _ = newest(folder / "checkpoints")
    *progress, result = await trained(trainer, folder, options)
    assert 0 < progress[0].step == int(saved.name.rpartition("-")[2])
    assert progress[-1].step == progress[-1].steps == before[0].steps
    losses = [item.loss for item in before + progress if item.loss is not None]
    assert losses[-1] < losses[0] / 3
    assert result.held_out_loss < losses[0] / 3
    assert sorted(path.name for path in (folder / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]

    base = AutoModelForCausalLM.from_pretrained(generation_model, dtype=torch.float32)
    probes = [example for example in read(training_file) if example.probe]
    assert len(result.probes) == len(probes) == PROBES
    by_base = torch.cat([scores(base, probe) for probe in probes])
    adapted = PeftModel.from_pretrained(base, folder / "adapter")
    by_adapter = torch.cat([scores(adapted, probe) for probe in probes])
    by_trainer = torch.cat([torch.tensor(probe) for probe in result.probes])
    assert (by_trainer - by_adapter).abs().mean() < 0.05  # bfloat16, where there is one
    assert by_trainer.mean() > by_base.mean() + 1


async def test_closing_frees_the_trainer_at_once(generation_model, training_file, tmp_path):
    folder = job(tmp_path / "job", training_file)
    async with aclosing(ChildTrainer(generation_model).train(folder, Options())) as news:
        async for _ in news:
            processes = children()
            break
        start = time.monotonic()
    assert processes and not psutil.wait_procs(processes, timeout=10)[1]
    assert time.monotonic() - start < 10


async def test_a_full_disk_is_the_reason_when_a_checkpoint_does_not_fit(
    generation_model, training_file, tmp_path
):
    folder = job(tmp_path / "job", training_file)
    with largest_file(4 * MEBIBYTE), pytest.raises(TrainingFailed) as caught:
        await trained(ChildTrainer(generation_model), folder, Options(epochs=1))
    assert caught.value.reason == "STORE_FULL"


async def test_a_rate_that_is_far_too_high_is_said_to_be(generation_model, training_file, tmp_path):
    folder = job(tmp_path / "job", training_file)
    with pytest.raises(TrainingFailed) as caught:
        await trained(ChildTrainer(generation_model), folder, Options(learning_rate=1e30))
    assert caught.value.reason == "LOSS_NOT_FINITE"


@pytest.fixture(scope="module")
def tiny_model(generation_model, tmp_path_factory):
    """A model whose attention is not done packed, and which nothing has trained yet."""
    model = tmp_path_factory.mktemp("tiny") / "model"
    AutoTokenizer.from_pretrained(generation_model).save_pretrained(model)
    config = Gemma2Config(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=16,
    )
    Gemma2ForCausalLM(config).save_pretrained(model)
    return model


async def test_a_model_with_an_attention_of_its_own_is_trained_too(
    tiny_model, training_file, tmp_path
):
    folder = job(tmp_path / "job", training_file)
    *progress, result = await trained(ChildTrainer(tiny_model), folder, Options(epochs=1))
    assert isinstance(result, Trained) and isinstance(progress[-1], Progress)
    assert progress[-1].step == progress[-1].steps
    assert "padded, not packed" in (folder / "log").read_text()


async def test_the_pod_of_a_training_job_trains_too(tiny_model, training_file, tmp_path):
    folder = job(tmp_path / "job", training_file)
    plan = {"model": str(tiny_model), "dtype": "auto", "threads": 0, "checkpoint_seconds": 60.0}
    write_plan(folder, plan, Options(epochs=1))
    pod = (sys.executable, "-P", "-m", "services.tuning.training.pod", str(folder))
    process = await asyncio.create_subprocess_exec(*pod)
    assert await process.wait() == 0, (folder / "log").read_text()
    progress = Progress(**json.loads((folder / "news.json").read_text()))
    assert progress.step == progress.steps
    assert len(read_result(folder).probes) == PROBES


def test_a_packed_batch_has_the_loss_and_gradients_of_the_padded_one(
    generation_model, training_file
):
    torch.set_num_threads(os.cpu_count() or 1)
    group = read(training_file)[:12]
    assert len({len(example) for example in group}) > 1
    model = AutoModelForCausalLM.from_pretrained(generation_model, dtype=torch.float32)
    weight = model.model.layers[3].self_attn.k_proj.weight
    packed = pack(group)
    assert packed.layout.shared > 10

    def computed(loss):
        (gradient,) = torch.autograd.grad(loss, weight)
        return loss.item(), gradient

    padded = 0.0
    for example in group:
        ids = torch.tensor([[*example.prompt, *example.answer]])
        logits = model(input_ids=ids).logits[0, len(example.prompt) - 1 : -1]
        padded = padded + F.cross_entropy(logits, ids[0, len(example.prompt) :], reduction="sum")
    expected_loss, expected_gradient = computed(padded)
    AttentionInterface.register(ATTENTION, attend)
    model.set_attn_implementation(ATTENTION)
    hidden = model.model(
        input_ids=packed.ids, position_ids=packed.positions, layout=packed.layout
    ).last_hidden_state[0]
    logits = model.lm_head(hidden[packed.before])
    loss, gradient = computed(F.cross_entropy(logits, packed.answer, reduction="sum"))
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert torch.allclose(gradient, expected_gradient, atol=1e-3, rtol=1e-2)
