"""What is known of the base model, and which adapters are refused for it."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from services.runtime.checkpoint import Unfit, fingerprint
from services.runtime.errors import InvalidInput, NotReady, ServiceError
from services.tuning.adapters import files as adapter_files
from services.tuning.adapters.base_model import BaseModel, load
from tests.small_adapter import (
    HIDDEN,
    MAX_RANK,
    PREFIX,
    RANK,
    WIDE,
    checkpoint_tensors,
    small_base,
    tensors,
    write_adapter,
)

Q = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    return small_base(tmp_path / "tiny-model")


def test_the_linear_layers_of_a_checkpoint_are_those_of_its_decoder(base: BaseModel) -> None:
    assert dict(base.layers) == {
        "model.layers.0.self_attn.q_proj": (HIDDEN, HIDDEN),
        "model.layers.0.mlp.up_proj": (WIDE, HIDDEN),
        "model.layers.1.self_attn.q_proj": (HIDDEN, HIDDEN),
        "model.layers.1.mlp.up_proj": (WIDE, HIDDEN),
    }
    assert base.parameters == sum(tensor.size for tensor in checkpoint_tensors().values())
    assert (base.id, base.context_length) == ("tiny-model", 512)
    assert base.hash == fingerprint(base.folder)
    assert load(base.folder, "by-name", 100).id == "by-name"
    assert load(base.folder, "", 100).context_length == 100


def test_a_checkpoint_in_several_files_is_read_whole(base: BaseModel) -> None:
    whole = checkpoint_tensors()
    (base.folder / "model.safetensors").unlink()
    names = {key: f"part-{i % 2}.safetensors" for i, key in enumerate(whole)}
    for name in set(names.values()):
        save_file({k: v for k, v in whole.items() if names[k] == name}, base.folder / name)
    (base.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    again = load(base.folder, "", 4096)
    assert (again.layers, again.parameters) == (base.layers, base.parameters)


def test_a_damaged_checkpoint_or_one_without_layers_is_unfit(base: BaseModel) -> None:
    file = base.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(Unfit):
        load(base.folder, "", 4096)
    save_file({"embed.weight": np.ones((2, 2), np.float32)}, file)
    with pytest.raises(Unfit):
        load(base.folder, "", 4096)


def test_targets_are_names_of_linear_layers(base: BaseModel) -> None:
    base.check_targets([])
    base.check_targets(["q_proj", "up_proj"])
    for wrong in (["k_proj"], ["lm_head"], ["embed_tokens"], [""], ["q_proj"] * 33):
        with pytest.raises(InvalidInput) as error:
            base.check_targets(wrong)
        assert error.value.reason == "TARGETS_INVALID"


def bfloat16(folder: Path, value: int = 0x3F80) -> None:
    """Write the weights again, as bfloat16 of these bits."""
    header, data = {}, b""
    for key, tensor in tensors().items():
        begin = len(data)
        data += struct.pack("<H", value) * tensor.size
        shape = list(tensor.shape)
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    path = folder / adapter_files.WEIGHTS
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_an_adapter_as_peft_writes_it_is_taken(base: BaseModel, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    taken = (RANK, 8.0, ("q_proj", "up_proj"))
    assert adapter_files.check(folder, base, MAX_RANK) == taken
    bfloat16(folder)
    assert adapter_files.check(folder, base, MAX_RANK) == taken
    half = {key: value.astype(np.float16) for key, value in tensors().items() if Q in key}
    folder = write_adapter(
        tmp_path / "b",
        half,
        use_rslora=True,
        target_modules="all-linear",
        init_lora_weights="gaussian",
        lora_alpha=0.5,
    )
    assert adapter_files.check(folder, base, MAX_RANK) == (RANK, 0.5, ("q_proj",))


CONFIGS = [
    (dict(peft_type="IA3"), "CONFIG_INVALID"),
    (dict(use_dora=True), "DORA_REFUSED"),
    (dict(bias="all"), "BIAS_REFUSED"),
    (dict(bias="lora_only"), "BIAS_REFUSED"),
    (dict(lora_bias=True), "BIAS_REFUSED"),
    (dict(r=0), "RANK_OUT_OF_RANGE"),
    (dict(r=MAX_RANK + 1), "RANK_OUT_OF_RANGE"),
    (dict(r=-1), "RANK_OUT_OF_RANGE"),
    (dict(r=True), "RANK_OUT_OF_RANGE"),
    (dict(r="4"), "RANK_OUT_OF_RANGE"),
    (dict(r=10**30), "RANK_OUT_OF_RANGE"),
    (dict(r=None), "RANK_OUT_OF_RANGE"),
    (dict(r=RANK + 1), "CONFIG_INVALID"),  # in range, but the weights have another
    (dict(lora_alpha=0), "CONFIG_INVALID"),
    (dict(lora_alpha=float("nan")), "CONFIG_INVALID"),
    (dict(lora_alpha=float("inf")), "CONFIG_INVALID"),
    (dict(lora_alpha=10**400), "CONFIG_INVALID"),
    (dict(lora_alpha=None), "CONFIG_INVALID"),
    (dict(use_rslora="yes"), "CONFIG_INVALID"),
    (dict(modules_to_save=["lm_head"]), "CONFIG_INVALID"),
    (dict(rank_pattern={"q_proj": 2}), "CONFIG_INVALID"),
    (dict(alpha_pattern={"(a+)+$": 2}), "CONFIG_INVALID"),
    (dict(layer_replication=[[0, 2]]), "CONFIG_INVALID"),
    (dict(trainable_token_indices=[1]), "CONFIG_INVALID"),
    (dict(init_lora_weights="pissa"), "CONFIG_INVALID"),
    (dict(kind_of_a_later_peft={"rank": 2}), "CONFIG_INVALID"),
    (dict(target_modules=["q_proj", "lm_head"]), "TARGETS_INVALID"),
    (dict(target_modules=["q_proj"]), "TARGETS_INVALID"),  # and weights for another
    (dict(target_modules=[]), "TARGETS_INVALID"),
    (dict(target_modules=[1]), "TARGETS_INVALID"),
    (dict(target_modules=None), "TARGETS_INVALID"),
    (dict(target_modules=["q_proj"] * 1000), "TARGETS_INVALID"),
]


@pytest.mark.parametrize(("changes", "reason"), CONFIGS)
def test_configurations_that_generation_cannot_serve_are_refused(
    changes: dict, reason: str, base: BaseModel, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "a", **changes)
    with pytest.raises(InvalidInput) as error:
        adapter_files.check(folder, base, MAX_RANK)
    assert error.value.reason == reason


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"\xff\xfe{}", b"[" * 100_000, b'{"r": ' + b"9" * 5000 + b"}"]
)
def test_a_configuration_that_is_no_json_object_is_refused(
    text: bytes, base: BaseModel, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / adapter_files.CONFIG).write_bytes(text)
    with pytest.raises(InvalidInput) as error:
        adapter_files.check(folder, base, MAX_RANK)
    assert error.value.reason == "CONFIG_INVALID"


def with_tensors(*without: str, **changed: np.ndarray) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        kept = {key: value for key, value in tensors().items() if key not in without}
        save_file(kept | changed, folder / adapter_files.WEIGHTS)

    return change


def header(size: int, rest: bytes = b"{}") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / adapter_files.WEIGHTS).write_bytes(struct.pack("<Q", size) + rest)

    return change


def cut(to: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / adapter_files.WEIGHTS
        path.write_bytes(path.read_bytes()[:to])

    return change


NAN = np.full((RANK, HIDDEN), np.nan, np.float32)
INF = np.full((RANK, HIDDEN), np.inf, np.float16)
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"

WEIGHTS = [
    (cut(0), "SAFETENSORS_INVALID"),
    (cut(7), "SAFETENSORS_INVALID"),
    (cut(100), "SAFETENSORS_INVALID"),
    (cut(-1), "SAFETENSORS_INVALID"),
    (header(2**63), "SAFETENSORS_INVALID"),
    (header(2**64 - 1), "SAFETENSORS_INVALID"),
    (header(2), "SAFETENSORS_INVALID"),  # in order, but no weights
    (header(100_000, b"[" * 100_000), "SAFETENSORS_INVALID"),
    (with_tensors(A), "SAFETENSORS_INVALID"),
    (with_tensors(B), "SAFETENSORS_INVALID"),
    (with_tensors(**{A: NAN}), "SAFETENSORS_INVALID"),
    (with_tensors(**{A: INF}), "SAFETENSORS_INVALID"),
    (lambda folder: bfloat16(folder, 0x7F80), "SAFETENSORS_INVALID"),
    (lambda folder: bfloat16(folder, 0xFFC0), "SAFETENSORS_INVALID"),
    (with_tensors(**{A: np.ones((RANK, HIDDEN), np.int8)}), "SAFETENSORS_INVALID"),
    (with_tensors(**{A: np.ones((RANK, HIDDEN), np.float64)}), "SAFETENSORS_INVALID"),
    (with_tensors(**{f"{Q}.lora_magnitude_vector": np.ones(8)}), "SAFETENSORS_INVALID"),
    (with_tensors(**{f"{PREFIX}lm_head.weight": np.ones((2, 2))}), "SAFETENSORS_INVALID"),
    (with_tensors(**{A: np.ones((RANK, WIDE), np.float32)}), "BASE_MODEL_MISMATCH"),
    (with_tensors(**{B: np.ones((WIDE, RANK), np.float32)}), "BASE_MODEL_MISMATCH"),
    (with_tensors(**{A: np.ones(HIDDEN, np.float32)}), "BASE_MODEL_MISMATCH"),
    (
        with_tensors(**{f"{PREFIX}model.layers.2.mlp.up_proj.lora_A.weight": NAN}),
        "BASE_MODEL_MISMATCH",
    ),
    (
        with_tensors(**{f"{PREFIX}lm_head.lora_A.weight": np.ones((RANK, HIDDEN), np.float32)}),
        "BASE_MODEL_MISMATCH",
    ),
    (with_tensors(**{A: np.ones((RANK - 1, HIDDEN), np.float32)}), "CONFIG_INVALID"),
    (with_tensors(**{B: np.ones((HIDDEN, RANK + 1), np.float32)}), "CONFIG_INVALID"),
    (with_tensors(**{A: np.ones((0, HIDDEN), np.float32)}), "CONFIG_INVALID"),
    (lambda folder: (folder / adapter_files.WEIGHTS).unlink(), "FILE_MISSING"),
    (lambda folder: (folder / adapter_files.CONFIG).unlink(), "FILE_MISSING"),
    (header(2, b"{}" + bytes(9 * 1024 * 1024)), "FILE_TOO_LARGE"),
]


@pytest.mark.parametrize(("change", "reason"), WEIGHTS)
def test_weights_that_are_damaged_or_of_another_model_are_refused(
    change: Callable[[Path], None], reason: str, base: BaseModel, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "a")
    change(folder)
    with pytest.raises(ServiceError) as error:
        adapter_files.check(folder, base, MAX_RANK)
    kind = NotReady if reason == "BASE_MODEL_MISMATCH" else InvalidInput
    assert (error.value.reason, type(error.value)) == (reason, kind)
