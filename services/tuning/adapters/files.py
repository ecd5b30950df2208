"""The files of an adapter: whether generation can serve them, whoever wrote them."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from services.runtime.errors import InvalidInput, NotReady
from services.tuning.adapters.base_model import BaseModel

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
NAMES = (WEIGHTS, CONFIG)
MOST_CONFIG = 1024 * 1024  # bytes
MOST_HEADER = 8 * 1024 * 1024  # bytes; a tensor takes about 150
MOST_ALPHA = 1024
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
BYTES = {"F32": 4, "F16": 2, "BF16": 2}  # of one number
BLOCK = 4 * 1024 * 1024  # numbers that are looked at together

# What peft writes that changes nothing in how vLLM computes (vllm/lora/peft_helper.py), or that is
# checked by name below. Everything else must be off: later versions of peft add new kinds of LoRA.
HARMLESS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}
# The others change the base model's weights when peft loads the adapter.
SERVED_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")


def most_bytes(base: BaseModel, max_rank: int) -> int:
    """Return the size of the largest adapter_model.safetensors that could be served."""
    numbers = max_rank * sum(out + into for out, into in base.layers.values())
    return MOST_HEADER + BYTES["F32"] * numbers


def check(folder: Path, base: BaseModel, max_rank: int) -> tuple[int, float, tuple[str, ...]]:
    """Return rank, alpha and the names of the adapted layers of the adapter in `folder`. Blocks.

    Raises InvalidInput (FILE_MISSING, FILE_TOO_LARGE, CONFIG_INVALID, DORA_REFUSED, BIAS_REFUSED,
    RANK_OUT_OF_RANGE, TARGETS_INVALID, SAFETENSORS_INVALID) and NotReady (BASE_MODEL_MISMATCH) if
    layers or their shapes are not those of `base`.
    """
    for name, most in ((WEIGHTS, most_bytes(base, max_rank)), (CONFIG, MOST_CONFIG)):
        if not (folder / name).is_file():
            raise InvalidInput("FILE_MISSING", f"an adapter has a file {name}")
        if (folder / name).stat().st_size > most:
            raise InvalidInput("FILE_TOO_LARGE", f"{name} has at most {most} bytes for this model")
    config = _config(folder / CONFIG)
    rank, alpha = _rank(config, max_rank), _alpha(config)
    names = _targets(config, base)
    header = _header(folder / WEIGHTS)
    adapted = _layers(header, base, rank)
    for path in adapted:
        if names is not None and not any(_names(name, path) for name in names):
            raise InvalidInput("TARGETS_INVALID", f"there are weights for {path}, no target")
    _check_numbers(folder / WEIGHTS, header)
    return rank, alpha, tuple(sorted({path.rpartition(".")[2] for path in adapted}))


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        raise _bad_config("is not JSON in UTF-8") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise _bad_config("is not the configuration of a LoRA (peft_type)")
    if config.get("use_dora"):
        raise InvalidInput("DORA_REFUSED", "generation cannot serve DoRA: train without use_dora")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        raise InvalidInput("BIAS_REFUSED", "generation cannot serve biases: train without them")
    for key in sorted(config.keys() - HARMLESS):
        if config[key]:
            raise _bad_config(f"sets {key[:80]!r}, which generation cannot serve")
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):  # regular expressions, and strangers' would run in the engine
            raise _bad_config(f"sets {key!r}: all layers have one rank and one alpha here")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in SERVED_INITS:
        raise _bad_config(f"has init_lora_weights {init[:80]!r}, which changes the base model")
    if not isinstance(config.get("use_rslora", False), bool):
        raise _bad_config("has a use_rslora that is neither true nor false")
    return config


def _rank(config: Mapping[str, Any], max_rank: int) -> int:
    rank = config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= max_rank:
        raise InvalidInput(
            "RANK_OUT_OF_RANGE", f"the rank (r) must be from 1 to {max_rank}", limit=str(max_rank)
        )
    return rank


def _alpha(config: Mapping[str, Any]) -> float:
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha <= MOST_ALPHA:
        raise _bad_config(f"has no lora_alpha above 0 to {MOST_ALPHA}")
    return float(alpha)


def _targets(config: Mapping[str, Any], base: BaseModel) -> list[str] | None:
    """Return the names of the adapted layers; None if a pattern stands there, which is not run:
    the weights themselves say which layers they are for."""
    names = config.get("target_modules")
    if isinstance(names, str):
        return None
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise InvalidInput("TARGETS_INVALID", "target_modules is a list of the layers' names")
    if len(names) > len(base.layers):
        raise InvalidInput("TARGETS_INVALID", "there are more targets than layers")
    known = set(base.targets)
    for name in names:
        if name not in known and not any(_names(name, path) for path in base.layers):
            raise InvalidInput("TARGETS_INVALID", f"the model has no layers called {name!r}")
    return names


def _names(name: str, path: str) -> bool:
    """Say whether a target's name means the layer at `path`, as peft takes it."""
    return path == name or path.endswith("." + name)


def _header(path: Path) -> dict[str, Any]:
    """Return dtype, shape and place of each tensor, as the library found them to be in order."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MOST_HEADER:
            raise _bad_weights(f"has a header of more than {MOST_HEADER} bytes")
        header = file.read(size)
    try:
        with safe_open(path, framework="numpy"):  # the sizes, the types, nothing missing or over
            pass
        tensors: dict[str, Any] = json.loads(header)
    except (SafetensorError, ValueError, OSError) as error:
        raise _bad_weights(f"is damaged: {error}") from None
    tensors.pop("__metadata__", None)
    if not tensors:
        raise _bad_weights("has no weights")
    return tensors


def _layers(header: Mapping[str, Any], base: BaseModel, rank: int) -> set[str]:
    """Return the paths of the adapted layers, each of which has both matrices."""
    halves: dict[str, set[str]] = {"A": set(), "B": set()}
    for key, tensor in header.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise _bad_weights(f"has {key[:200]!r}, and only lora_A and lora_B may be there")
        path, half = match.groups()
        if path not in base.layers:
            raise NotReady("BASE_MODEL_MISMATCH", f"{base.id} has no layer {path[:200]!r} to adapt")
        if tensor["dtype"] not in BYTES:
            raise _bad_weights(f"has the type {tensor['dtype']}; there are {', '.join(BYTES)}")
        out, into = base.layers[path]
        shape = tensor["shape"]
        found = shape if half == "A" else shape[::-1]
        if len(found) != 2 or found[1] != (into if half == "A" else out):
            raise NotReady(
                "BASE_MODEL_MISMATCH",
                f"{key} has the shape {shape}, which does not suit {out} x {into} of {base.id}",
            )
        if found[0] != rank:
            raise _bad_config(f"says rank {rank}, and {key} has rank {found[0]}")
        halves[half].add(path)
    if lone := halves["A"] ^ halves["B"]:
        raise _bad_weights(f"has only one of lora_A and lora_B for {min(lone)}")
    return halves["A"]


def _check_numbers(path: Path, header: Mapping[str, Any]) -> None:
    """Refuse what is not finite: one such number makes every answer of the adapter nonsense."""
    with path.open("rb") as file:
        data = 8 + int.from_bytes(file.read(8), "little")
        for key, tensor in header.items():
            begin, end = tensor["data_offsets"]
            file.seek(data + begin)
            left = (end - begin) // BYTES[tensor["dtype"]]
            while left:
                count = min(left, BLOCK)
                if not _finite(file, tensor["dtype"], count):
                    raise _bad_weights(f"has numbers that are not finite in {key}")
                left -= count


def _finite(file: BinaryIO, dtype: str, count: int) -> bool:
    if dtype == "BF16":  # numpy does not know it: all bits of the exponent are set in inf and NaN
        exponents = np.fromfile(file, "<u2", count) & 0x7F80
        return not bool(np.any(exponents == 0x7F80))
    numbers = np.fromfile(file, "<f4" if dtype == "F32" else "<f2", count)
    return bool(np.all(np.isfinite(numbers)))


def _bad_config(what: str) -> InvalidInput:
    return InvalidInput("CONFIG_INVALID", f"{CONFIG} {what}")


def _bad_weights(what: str) -> InvalidInput:
    return InvalidInput("SAFETENSORS_INVALID", f"{WEIGHTS} {what}")
