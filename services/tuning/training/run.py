"""One training, from its plan to its result. Runs in the process that `child` starts."""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback
from trl.trainer.sft_config import SFTConfig

from services.runtime import disk
from services.runtime.processor import this_processor
from services.tuning.job import Options
from services.tuning.training.batches import Tokens, batch_tokens, batches, read, sample, schedule
from services.tuning.training.checkpoints import newest, saving, write_json
from services.tuning.training.reporting import Reporter
from services.tuning.training.sft import AnswerTrainer
from services.tuning.training.trainer import read_plan

CPU_BATCH_TOKENS = 1024  # at most
GPU_BATCH_TOKENS = (2048, 16384)  # at least and at most, by memory
EVALUATE_STEPS = 100  # of a long epoch, between two evaluations
HELD_OUT_MOST = 256  # examples that an evaluation takes
PATIENCE = 2  # evaluations without a better loss
WARMUP_SHARE = 0.05
ACTIVATIONS = 60  # numbers kept for the gradients, per token, layer and hidden unit (measured)
MEMORY_SHARE = 0.5  # of the free memory, that these may take


def train(folder: Path, say: Callable[[dict[str, Any]], None], start: float) -> None:
    """Train as FOLDER/plan.json says; `start` is when that began, on the monotonic clock.

    Goes on from the newest checkpoint. Raises TrainingFailed.
    """
    plan, options = read_plan(folder)
    gpu = torch.cuda.is_available()
    if not gpu:
        os.nice(10)  # answers go before training
        torch.set_num_threads(plan["threads"])
    examples = read(folder / "training.jsonl")
    model = _model(plan["model"], _dtype(plan["dtype"], gpu), options.quantized)
    most = _gpu_batch_tokens(model) if gpu else CPU_BATCH_TOKENS
    trained = [example for example in examples if not example.held_out]
    held_out = [example for example in examples if example.held_out]
    groups = batches(trained, batch_tokens(trained, most))
    held_out_groups = batches(sample(held_out, HELD_OUT_MOST, options.seed), most)
    order = schedule(len(groups), options.epochs, options.seed)
    checkpoints = folder / "checkpoints"
    last, facts = newest(checkpoints) or (None, {"seconds": 0.0})
    reporter = Reporter(say, plan["checkpoint_seconds"], start, facts["seconds"])
    trainer = AnswerTrainer(
        groups,
        order,
        held_out_groups,
        reporter,
        model=model,
        args=SFTConfig(
            **arguments(checkpoints, options, len(groups), len(order), bool(held_out), gpu),
            gradient_checkpointing=gpu or _crowded(model, groups),
        ),
        processing_class=AutoTokenizer.from_pretrained(plan["model"]),
        peft_config=LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,  # type: ignore[arg-type]
            target_modules=list(options.targets) or "all-linear",
            bias="none",
            task_type="CAUSAL_LM",
        ),
        callbacks=[reporter, *([EarlyStoppingCallback(PATIENCE)] if held_out else [])],
    )
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    with saving():
        _save(trainer, folder / "adapter")
    probes = [trainer.log_probabilities(example) for example in examples if example.probe]
    reporter.report(trainer.state)
    result = {
        "held_out_loss": trainer.state.best_metric if held_out else None,
        "seconds": reporter.seconds,
        "probes": probes,
    }
    with saving():
        write_json(folder / "result.json", result)


def arguments(
    checkpoints: Path, options: Options, batches: int, steps: int, held_out: bool, gpu: bool
) -> dict[str, Any]:
    """Return the settings of trl's SFTConfig: `batches` an epoch, `steps` in all."""
    every = math.ceil(batches / max(1, round(batches / EVALUATE_STEPS)))
    return {
        "output_dir": str(checkpoints),
        "num_train_epochs": 1,  # the order of the batches has them all
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": math.ceil(WARMUP_SHARE * steps),
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "seed": options.seed % 2**32,
        "eval_strategy": "steps" if held_out else "no",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "load_best_model_at_end": held_out,
        "restore_callback_states_from_checkpoint": True,
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not gpu,
        "bf16": gpu,
        "dataloader_pin_memory": gpu,
    }


def _model(folder: str, dtype: torch.dtype, quantized: bool) -> Any:
    quantization: dict[str, Any] = {}
    if quantized:
        from transformers import BitsAndBytesConfig

        quantization["device_map"] = {"": 0}
        quantization["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, **quantization
    )


def _dtype(wanted: Any, gpu: bool) -> torch.dtype:
    """Return what the frozen weights are in. The adapter's are float32 while they are trained."""
    if gpu:
        return torch.float32 if wanted == "float32" else torch.bfloat16
    return torch.bfloat16 if this_processor().dtype(wanted) == "bfloat16" else torch.float32


def _gpu_batch_tokens(model: Any) -> int:
    """Return how many tokens a batch may have, most activations being computed again."""
    free, _ = torch.cuda.mem_get_info()
    config = model.config.get_text_config()
    each = 2 * config.hidden_size * (config.num_hidden_layers + 2 * ACTIVATIONS)
    room = MEMORY_SHARE * (free - model.get_memory_footprint())
    least, most = GPU_BATCH_TOKENS
    return int(min(max(room / each, least), most))


def _crowded(model: Any, groups: Sequence[Sequence[Tokens]]) -> bool:
    """Say whether what the gradients need would take too much of a CPU's memory."""
    config = model.config.get_text_config()
    tokens = max(len(group) * len(group[-1]) for group in groups)
    each = ACTIVATIONS * config.hidden_size * config.num_hidden_layers * model.dtype.itemsize
    return bool(tokens * each > MEMORY_SHARE * _free_memory())


def _free_memory() -> float:
    """Return the bytes that this process may still take, as far as the system says."""
    free = math.inf
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # it says "max" without a limit
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return free


def _save(trainer: AnswerTrainer, folder: Path) -> None:
    """Write the adapter, whole or not at all, in the type that it was computed in."""
    model: Any = trainer.model
    config = model.peft_config["default"]
    dtype = model.get_base_model().dtype
    weights = {
        name: weight.detach().to("cpu", dtype).contiguous()
        for name, weight in get_peft_model_state_dict(model).items()
    }
    fields = config.to_dict() | {
        "base_model_name_or_path": "",  # a path of this machine, to others nothing
        "inference_mode": True,
        "lora_alpha": int(config.lora_alpha) if config.lora_alpha % 1 == 0 else config.lora_alpha,
        "target_modules": sorted(config.target_modules),
    }
    half = folder.with_name("adapter.half")
    for old in (half, folder):
        shutil.rmtree(old, ignore_errors=True)
    half.mkdir()
    save_file(weights, half / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(fields, indent=2, sort_keys=True, default=str)
    (half / "adapter_config.json").write_text(text)
    for path in half.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    half.rename(folder)
    disk.sync(folder.parent)
