"""Adapters that nobody trained: random matrices in the files that peft writes."""

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from tests.fake_tuning import CONFIG, WEIGHTS

PREFIX = "base_model.model."


def layers(model: Path, *targets: str) -> dict[str, tuple[int, int]]:
    """Return the (out, in) of every linear layer of a checkpoint with one of these names."""
    shapes: dict[str, tuple[int, int]] = {}
    with safe_open(model / "model.safetensors", "np") as file:
        for key in file.keys():  # noqa: SIM118 - it is no dict
            path = key.removesuffix(".weight")
            if path.rsplit(".", 1)[-1] in targets:
                out, into = file.get_slice(key).get_shape()
                shapes[path] = (out, into)
    return shapes


def random_adapter(
    shapes: dict[str, tuple[int, int]], seed: int, rank: int = 8, scale: float = 0.1
) -> dict[str, bytes]:
    """Return the files of an adapter of these layers; alpha is the rank."""
    random = np.random.default_rng(seed)
    tensors = {}
    for path, (out, into) in shapes.items():
        a = random.normal(size=(rank, into)) / np.sqrt(into)
        b = random.normal(size=(out, rank)) * scale
        tensors[f"{PREFIX}{path}.lora_A.weight"] = a.astype(np.float32)
        tensors[f"{PREFIX}{path}.lora_B.weight"] = b.astype(np.float32)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({path.rsplit(".", 1)[-1] for path in shapes}),
        "bias": "none",
    }
    return {WEIGHTS: save(tensors), CONFIG: json.dumps(config).encode()}
