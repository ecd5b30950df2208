"""LoRA on a CPU, operation by operation, against vLLM's own on the same weights."""

import random
from collections.abc import Callable, Iterator

import pytest
import torch
import vllm.platforms
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper import get_punica_wrapper
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms.interface import UnspecifiedPlatform

from services.generation import plugin
from services.generation.grouped_lora import GroupedLora

SLOTS = 5
HIGHEST = 16
RANKS = (16, 4, 13, 8)  # of the adapters in the first slots; the last slot is empty
INPUTS = 64
OUTPUTS = {"qkv": (96, 32, 32), "one": (80,)}
VOCABULARY = 200
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7}  # of the largest number
TYPES = tuple(ROUNDING)
MIXES: dict[str, Callable[[int], list[int]]] = {  # the slots of so many rows; -1 is no adapter
    "one adapter": lambda rows: [1] * rows,
    "one adapter, every other row": lambda rows: [2 if row % 2 else -1 for row in range(rows)],
    "one adapter, the last rows": lambda rows: [
        0 if row > rows // 2 else -1 for row in range(rows)
    ],
    "two adapters in turn": lambda rows: [row % 2 for row in range(rows)],
    "four adapters in turn": lambda rows: [row % 4 for row in range(rows)],
    "four adapters, in runs": lambda rows: [4 * row // rows for row in range(rows)],
    "four adapters and none, anyhow": lambda rows: random.Random(1).choices(range(-1, 4), k=rows),
    "an empty slot": lambda rows: [4 if row % 2 else 3 for row in range(rows)],
}


class Stacked:
    """The weights of a layer as vLLM keeps them."""

    def __init__(self, outputs: tuple[int, ...], dtype: torch.dtype, inputs: int = INPUTS) -> None:
        self.outputs = outputs
        self.a = tuple(torch.zeros(SLOTS, 1, HIGHEST, inputs, dtype=dtype) for _ in outputs)
        self.b = tuple(torch.zeros(SLOTS, 1, o, HIGHEST, dtype=dtype) for o in outputs)

    def fill(self, slot: int, rank: int, left_out: int | None = None) -> None:
        """Write into a slot as vLLM does, with inference mode on; `left_out` is a slice."""
        with torch.inference_mode():
            for i, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
                a[slot] = 0
                b[slot] = 0
                if i != left_out:
                    a[slot, 0, :rank].copy_(torch.randn(rank, a.size(-1)) / 8)
                    b[slot, 0, :, :rank].copy_(torch.randn(b.size(-2), rank) / 8)


@pytest.fixture(autouse=True)
def same_numbers() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():  # as the engine's steps
        yield


def filled(outputs: tuple[int, ...], dtype: torch.dtype, inputs: int = INPUTS) -> Stacked:
    with torch.inference_mode(False):
        stacked = Stacked(outputs, dtype, inputs)
    for slot, rank in enumerate(RANKS):
        stacked.fill(slot, rank, left_out=1 if slot == 3 else None)
    return stacked


def ready(
    kind: type[PunicaWrapperBase], slots: list[int], requests: list[int], prefill: bool = True
) -> PunicaWrapperBase:
    """Return a wrapper that knows the slots of the rows."""
    wrapper = kind(4096, 4096, "cpu")
    # The id of an adapter is its slot + 1; 0 is none.
    ids = [tuple(slot + 1 for slot in of_rows) for of_rows in (slots, requests)]
    mapping = LoRAMapping(*ids, is_prefill=prefill)
    wrapper.update_metadata(mapping, list(range(1, SLOTS + 1)), SLOTS + 1, VOCABULARY)
    return wrapper


def exact(y: torch.Tensor, x: torch.Tensor, stacked: Stacked, slots: list[int]) -> torch.Tensor:
    """Return in float64 what is to come out."""
    pieces = torch.split(y.double(), stacked.outputs, 1)
    sums = []
    for piece, a, b in zip(pieces, stacked.a, stacked.b, strict=True):
        added = torch.zeros_like(piece)
        for row, slot in enumerate(slots):
            if slot >= 0:
                added[row] = x[row].double() @ a[slot, 0].double().t() @ b[slot, 0].double().t()
        sums.append(piece + added)
    return torch.cat(sums, 1)


def check(
    got: torch.Tensor,
    stock: torch.Tensor,
    before: torch.Tensor,
    right: torch.Tensor,
    slots: list[int],
) -> None:
    """Rows with an adapter are stock's, and right, but for the rounding; others are as before."""
    adapted = torch.tensor(slots) >= 0
    assert torch.equal(got[~adapted], before[~adapted])
    if not adapted.any():
        return
    got, stock, right = got[adapted].double(), stock[adapted].double(), right[adapted]
    rounding = ROUNDING[before.dtype] * right.abs().max()
    assert (got - stock).abs().max() <= 2 * rounding
    assert (got - right).abs().max() <= rounding
    assert not torch.allclose(right, before[adapted].double())  # what is compared is not nothing


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("layer", OUTPUTS)
@pytest.mark.parametrize("rows", [1, 2, 7, 33, 400])
@pytest.mark.parametrize("mix", MIXES)
def test_a_linear_layer_adds_what_stock_vllm_adds(
    mix: str, rows: int, layer: str, dtype: torch.dtype
) -> None:
    stacked = filled(OUTPUTS[layer], dtype)
    slots = MIXES[mix](rows)
    x, before = (
        torch.randn(rows, INPUTS).to(dtype),
        torch.randn(rows, sum(stacked.outputs)).to(dtype),
    )
    for prefill in (True, False):
        results = []
        for kind in (GroupedLora, PunicaWrapperCPU):
            y = before.clone()
            wrapper = ready(kind, slots, slots, prefill)
            wrapper.add_lora_linear(y, x, stacked.a, stacked.b, 1.0, stacked.outputs)
            results.append(y)
        if any(slot in range(4) for slot in slots):
            check(*results, before, exact(before, x, stacked, slots), slots)
        else:
            assert torch.equal(results[0], before)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_layer_of_a_real_model_adds_what_stock_vllm_adds(dtype: torch.dtype) -> None:
    stacked = filled((576, 192, 192), dtype, inputs=576)
    slots = MIXES["four adapters and none, anyhow"](40)
    x, before = torch.randn(40, 576).to(dtype), torch.randn(40, 960).to(dtype)
    results = []
    for kind in (GroupedLora, PunicaWrapperCPU):
        y = before.clone()
        ready(kind, slots, slots).add_lora_linear(y, x, stacked.a, stacked.b, 1.0, stacked.outputs)
        results.append(y)
    check(*results, before, exact(before, x, stacked, slots), slots)


def test_rows_without_an_adapter_stay_as_they_are_when_every_slot_is_full() -> None:
    stacked = filled(OUTPUTS["qkv"], torch.float32)
    stacked.fill(SLOTS - 1, 16)
    x, before = torch.randn(6, INPUTS), torch.randn(6, 160)
    for slots in ([-1] * 6, [-1, 0, -1, 4, -1, -1]):
        y = before.clone()
        wrapper = ready(GroupedLora, slots, slots)
        wrapper.add_lora_linear(y, x, stacked.a, stacked.b, 1.0, stacked.outputs)
        unadapted = torch.tensor(slots) < 0
        assert torch.equal(y[unadapted], before[unadapted])
        torch.testing.assert_close(y, exact(before, x, stacked, slots).float())


@pytest.mark.parametrize("rows", [1, 400])
def test_an_adapter_that_replaces_another_in_its_slot_is_used_at_once(rows: int) -> None:
    stacked = filled(OUTPUTS["qkv"], torch.float32)
    slots = [1] * rows
    wrapper = ready(GroupedLora, slots, slots)
    x, before = torch.randn(rows, INPUTS), torch.randn(rows, 160)
    for rank in (4, 16, 2):
        stacked.fill(1, rank)
        y = before.clone()
        wrapper.add_lora_linear(y, x, stacked.a, stacked.b, 1.0, stacked.outputs)
        torch.testing.assert_close(y, exact(before, x, stacked, slots).float())
    with torch.inference_mode():
        for weights in (*stacked.a, *stacked.b):  # as reset_lora does
            weights[1] = 0
    y = before.clone()
    wrapper.add_lora_linear(y, x, stacked.a, stacked.b, 1.0, stacked.outputs)
    assert torch.equal(y, before)


@pytest.mark.parametrize("rows", [4, 800])
def test_an_adapter_of_broken_numbers_harms_its_own_rows_alone(rows: int) -> None:
    stacked = filled(OUTPUTS["qkv"], torch.float32)
    with torch.inference_mode():
        stacked.a[0][2] = torch.nan
        stacked.b[0][2] = torch.inf
    slots = [(-1, 2, 0, 1)[row % 4] for row in range(rows)]
    x, before = torch.randn(rows, INPUTS), torch.randn(rows, 160)
    y = before.clone()
    wrapper = ready(GroupedLora, slots, slots)
    wrapper.add_lora_linear(y, x, stacked.a, stacked.b, 1.0, stacked.outputs)
    broken = torch.tensor(slots) == 2
    right = exact(before, x, stacked, slots)
    torch.testing.assert_close(y[~broken], right[~broken].float())
    assert y[broken][:, :96].isnan().all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_logits_get_what_stock_vllm_adds_by_request(scale: float, dtype: torch.dtype) -> None:
    stacked = filled((VOCABULARY,), dtype)
    requests = [0, -1, 2, 1, 0]
    x, before = torch.randn(5, INPUTS).to(dtype), torch.randn(5, VOCABULARY + 8).to(dtype)
    results = []
    for kind in (GroupedLora, PunicaWrapperCPU):
        y = before.clone()
        wrapper = ready(kind, [0, 0, 0, -1, -1, 2, 1, 0], requests)
        wrapper.add_lora_logits(y, x, stacked.a[0], stacked.b[0], scale)
        results.append(y)
    assert torch.equal(results[0][:, VOCABULARY:], before[:, VOCABULARY:])
    known = [y[:, :VOCABULARY] for y in (*results, before)]
    check(*known, exact(known[2], x * scale, stacked, requests), requests)


def test_logits_of_a_prompt_are_adapted_only_if_all_requests_have_the_adapter() -> None:
    stacked = filled((VOCABULARY,), torch.float32)
    x, before = torch.randn(9, INPUTS), torch.randn(9, VOCABULARY)
    for requests, slots in (([1, 1], [1] * 9), ([1, -1], [-1] * 9), ([1, 0], [-1] * 9)):
        y = before.clone()
        wrapper = ready(GroupedLora, [1] * 9, requests)
        wrapper.add_lora_logits(y, x, stacked.a[0], stacked.b[0], 1.0)
        torch.testing.assert_close(y, exact(before, x, stacked, slots).float())


@pytest.mark.parametrize("add_inputs", [True, False])
def test_embeddings_and_sharded_layers_get_what_stock_vllm_adds(add_inputs: bool) -> None:
    stacked = filled(OUTPUTS["qkv"], torch.float32)
    slots = [0, 2, 2, 1, 0]
    x, before = torch.randn(5, INPUTS), torch.randn(5, 160)
    h = torch.randn(5, HIGHEST)
    results = []
    for kind in (GroupedLora, PunicaWrapperCPU):
        wrapper = ready(kind, slots, slots)
        narrow = torch.zeros(3, 5, HIGHEST)
        wrapper.add_shrink(narrow, x, stacked.a, 0.5)
        y, embedded = before.clone(), before[:, :96].clone()
        wrapper.add_expand(y, narrow, stacked.b, stacked.outputs, add_inputs=add_inputs)
        wrapper.add_lora_embedding(embedded, h, stacked.b[0], add_inputs=add_inputs)
        results.append((narrow, y, embedded))
    torch.testing.assert_close(*results)


def test_fewer_rows_than_the_batch_has_are_refused() -> None:
    stacked = filled(OUTPUTS["one"], torch.float32)
    wrapper = ready(GroupedLora, [0] * 4, [0])
    with pytest.raises(ValueError, match="3 rows, where the batch has 4"):
        wrapper.add_lora_linear(
            torch.zeros(3, 80), torch.zeros(3, INPUTS), stacked.a, stacked.b, 1.0, (80,)
        )


def test_the_plugin_puts_it_to_use_on_a_cpu_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plugin.group_lora()
    assert isinstance(get_punica_wrapper(16, max_batches=4, device="cpu"), GroupedLora)
    monkeypatch.setattr(vllm.platforms, "_current_platform", UnspecifiedPlatform())
    plugin.group_lora()
    assert "get_punica_wrapper" not in vars(UnspecifiedPlatform)
