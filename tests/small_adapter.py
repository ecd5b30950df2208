"""A checkpoint of two tiny layers, and adapters for it as peft writes them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from services.prompts.words import Message, Part
from services.tuning.adapters.base_model import BaseModel, load
from services.tuning.job import Manifest, Options, Probe, TokenScore

HIDDEN, WIDE, VOCABULARY = 8, 12, 32
RANK = 4
MAX_RANK = 8
PREFIX = "base_model.model."


def checkpoint_tensors() -> dict[str, np.ndarray]:
    tensors = {
        "model.embed_tokens.weight": np.ones((VOCABULARY, HIDDEN), np.float32),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
        "lm_head.weight": np.ones((VOCABULARY, HIDDEN), np.float32),
    }
    for layer in (0, 1):
        path = f"model.layers.{layer}"
        tensors[f"{path}.self_attn.q_proj.weight"] = np.ones((HIDDEN, HIDDEN), np.float32)
        tensors[f"{path}.mlp.up_proj.weight"] = np.ones((WIDE, HIDDEN), np.float32)
        tensors[f"{path}.input_layernorm.weight"] = np.ones(HIDDEN, np.float32)
    return tensors


def small_base(folder: Path) -> BaseModel:
    """Write the checkpoint to a new folder and load it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    save_file(checkpoint_tensors(), folder / "model.safetensors")
    return load(folder, "", 4096)


def tensors(rank: int = RANK, seed: int = 0, into: int = HIDDEN) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    made: dict[str, np.ndarray] = {}
    for layer in (0, 1):
        for name, out in (("self_attn.q_proj", HIDDEN), ("mlp.up_proj", WIDE)):
            path = f"{PREFIX}model.layers.{layer}.{name}"
            made[f"{path}.lora_A.weight"] = random.normal(size=(rank, into)).astype(np.float32)
            made[f"{path}.lora_B.weight"] = random.normal(size=(out, rank)).astype(np.float32)
    return made


def config(**changes: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 8,
        "target_modules": ["up_proj", "q_proj"],
        "bias": "none",
        "lora_dropout": 0.05,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "rank_pattern": {},
        "task_type": "CAUSAL_LM",
        "megatron_core": "megatron.core",
        "kind_of_a_later_peft": None,
    } | changes


def write_adapter(
    folder: Path, weights: Mapping[str, np.ndarray] | None = None, **changes: Any
) -> Path:
    """Write an adapter to a new folder; `changes` are those of its configuration."""
    folder.mkdir(parents=True)
    save_file(dict(tensors() if weights is None else weights), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config(**changes)))
    return folder


def manifest(base: BaseModel, name: str = "house-style") -> Manifest:
    return Manifest(name, base.id, base.hash, "v1", "", "", Options(rank=RANK), ())


def probes(count: int = 16) -> list[Probe]:
    return [
        Probe(
            messages=(Message("user", (Part(f"Question {number}?"),)),),
            continuation="An answer.",
            tokens=(TokenScore(7, -0.5), TokenScore(2, -0.25)),
            prompt_hash="ab" * 32,
        )
        for number in range(count)
    ]
