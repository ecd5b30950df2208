"""LoRA on a CPU by adapter and layer, where vLLM copies A and B for every token.

The plugin has vLLM make a `GroupedLora`; nothing else knows of it. Which rows belong to which
adapter is worked out when the batch changes. Many rows of an adapter are one GEMM, few are one call
of a kernel. A layer's adapters are kept a second time, in the order in which the weights are used
and without the padding to the highest rank, until vLLM changes the originals. A row without an
adapter is never touched; vLLM's own adds to it what is in the last slot.
"""

from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from services.generation.lora_kernel import BLOCK, compiled

FEW = 1 << 21  # multiplications up to which the kernel's one thread is faster than a GEMM


class GroupedLora(PunicaWrapperCPU):
    """What vLLM's layers call. A slot is an adapter's place in the stacked weights of a layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tokens = Batch([])
        self._requests = Batch([])
        self._layers: dict[int, Layer] = {}
        self._scratch = torch.empty(2 * FEW // BLOCK)
        if "lora_config" in kwargs:  # now, and not when the first request waits for it
            compiled(kwargs["lora_config"].lora_dtype)

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Take the slots of the rows of the steps to come."""
        super().update_metadata(*args, **kwargs)
        self._tokens = Batch(self.token_lora_indices.tolist())
        self._requests = Batch(self.sampler_indices.tolist())

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add x @ A @ B * scale to y, whose columns are the slices side by side."""
        if self._tokens.groups:
            self._layer(lora_a_stacked, lora_b_stacked).add(self._tokens, y, x, scale)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Add x @ A @ B * scale to the logits y, a row for each request.

        For the log-probabilities of a prompt there is a row for each of its tokens instead, and
        nothing says whose prompt it is: they stay as they are unless all requests have one adapter.
        """
        batch = self._requests
        if batch.uniform and x.size(0) != batch.size:
            batch = Batch(batch.slots[:1] * x.size(0))
        if batch.groups and x.size(0) == batch.size:
            layer = self._layer(lora_a_stacked, lora_b_stacked)
            layer.add(batch, y[:, : lora_b_stacked.size(-2)], x, scale)

    def _layer(self, a: Any, b: Any) -> "Layer":
        layer = self._layers.get(id(a))
        if layer is None:
            layer = self._layers[id(a)] = Layer(a, b, self._scratch)
        return layer

    def add_lora_embedding(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """Add x @ B to the embeddings y, where x is what the A have for the tokens."""
        # Hardly an adapter has any, and to see that takes a tenth of adding nothing.
        if any(lora_b_stacked[slot].any() for slot in self._tokens.groups):
            super().add_lora_embedding(y, x, lora_b_stacked, add_inputs, **kwargs)

    # What vLLM makes the other operations of: those of embeddings and of layers that are sharded.

    def _apply_shrink(
        self, y: torch.Tensor, x: torch.Tensor, w_t_all: torch.Tensor, scale: float
    ) -> None:
        for slot, rows in self._tokens.groups.items():
            a = w_t_all[slot, 0]
            y[rows.chosen] = (x[rows.chosen].to(a.dtype) @ a.t()).to(y.dtype) * scale

    def _apply_expand(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        w_t_all: torch.Tensor,
        y_offset: int,
        y_slice_size: int,
        add_inputs: bool = True,
    ) -> None:
        y = y[:, y_offset : y_offset + y_slice_size]
        for slot, rows in self._tokens.groups.items():
            b = w_t_all[slot, 0]
            added = (x[rows.chosen].to(b.dtype) @ b.t()).to(y.dtype)
            y[rows.chosen] = y[rows.chosen] + added if add_inputs else added

    def _expand_prefill(
        self, y: torch.Tensor, x: torch.Tensor, w_t_all: torch.Tensor, add_inputs: bool
    ) -> None:
        self._apply_expand(y, x, w_t_all, 0, y.size(1), add_inputs)

    _expand_decode = _expand_prefill


class Rows(NamedTuple):
    """Rows of one slot."""

    size: int
    numbers: torch.Tensor
    address: int
    chosen: slice | torch.Tensor
    """What to index with: a slice if it is one run of rows, which needs no copy."""


class Batch:
    """Which rows belong to which slot, from the slot of each row; -1 is none."""

    def __init__(self, slots: list[int]) -> None:
        self.slots = slots
        self.size = len(slots)
        self.uniform = len(set(slots)) == 1
        """All rows have the same adapter, or none."""
        runs: dict[int, list[range]] = {}
        start = 0
        for slot, run in groupby(slots):
            stop = start + len(list(run))
            if slot >= 0:
                runs.setdefault(slot, []).append(range(start, stop))
            start = stop
        self.groups = {slot: _rows(of_slot) for slot, of_slot in runs.items()}


def _rows(runs: list[range]) -> Rows:
    numbers = torch.tensor([row for run in runs for row in run])
    one = slice(runs[0].start, runs[0].stop)
    chosen = one if len(runs) == 1 else numbers
    return Rows(len(numbers), numbers, numbers.data_ptr(), chosen)


class Layer:
    """The adapters of one layer.

    The stacked weights are for each slice of the outputs A [slots, 1, highest rank, inputs] and
    B [slots, 1, outputs, highest rank].
    """

    def __init__(
        self,
        a: torch.Tensor | tuple[torch.Tensor, ...],
        b: torch.Tensor | tuple[torch.Tensor, ...],
        scratch: torch.Tensor,
    ) -> None:
        self._known_by = a  # as long as it is kept, no other object has its id
        self._scratch = scratch
        self._a = a if isinstance(a, tuple) else (a,)
        self._b = b if isinstance(b, tuple) else (b,)
        self._weights = (*self._a, *self._b)
        self._version = -1
        self._adapters: dict[int, Adapter | None] = {}

    def add(self, batch: Batch, y: torch.Tensor, x: torch.Tensor, scale: float) -> None:
        """Add to each row of y what the row's adapter makes of that of x."""
        if x.size(0) < batch.size:  # the kernel goes by addresses
            raise ValueError(f"{x.size(0)} rows, where the batch has {batch.size}")
        # vLLM writes into the stacked weights, and PyTorch counts what is written into a tensor.
        version = sum([weights._version for weights in self._weights])
        if version != self._version:
            self._version = version
            self._adapters = {}
        for slot, rows in batch.groups.items():
            if slot not in self._adapters:
                self._adapters[slot] = Adapter.of(self._a, self._b, slot, self._scratch)
            if adapter := self._adapters[slot]:
                adapter.add(y, x, rows, scale)


class Adapter:
    """What the adapter of one slot adds to one layer."""

    @classmethod
    def of(
        cls,
        a: tuple[torch.Tensor, ...],
        b: tuple[torch.Tensor, ...],
        slot: int,
        scratch: torch.Tensor,
    ) -> "Adapter | None":
        """Copy it from the stacked weights. Return None if it adds nothing."""
        slices = [_trimmed(a_i[slot, 0], b_i[slot, 0].t()) for a_i, b_i in zip(a, b, strict=True)]
        return cls(slices, scratch) if any(len(a) for a, _ in slices) else None

    def __init__(
        self, slices: list[tuple[torch.Tensor, torch.Tensor]], scratch: torch.Tensor
    ) -> None:
        """Take A [rank, inputs] and B [rank, outputs] of each slice, ranks in whole blocks."""
        shapes = [(b.size(0), b.size(1)) for _, b in slices]
        self._ranks = [rank for rank, _ in shapes]
        self._outputs = [outputs for _, outputs in shapes]
        self._a = torch.cat([a for a, _ in slices])
        self._dtype = self._a.dtype
        together = torch.cat([b.flatten() for _, b in slices])
        pieces = torch.split(together, [rank * outputs for rank, outputs in shapes])
        self._b = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        self._shapes = torch.tensor(shapes)
        self._scratch = scratch
        inputs, self._width = self._a.size(1), sum(self._outputs)
        # The scratch is enough for two rows of inputs and outputs, however low the rank.
        multiplied = max(self._a.numel() + together.numel(), BLOCK * (inputs + self._width))
        self._few = FEW // multiplied
        self._kernel = compiled(self._dtype)
        self._arguments = (
            *(self._a.data_ptr(), together.data_ptr(), self._shapes.data_ptr()),
            *(len(shapes), inputs, self._width, scratch.data_ptr()),
        )

    def add(self, y: torch.Tensor, x: torch.Tensor, rows: Rows, scale: float) -> None:
        """Add to the rows of y what it makes of those of x."""
        if (
            rows.size <= self._few
            and self._kernel is not None
            and x.dtype == y.dtype == self._dtype
            and x.is_contiguous()
            and y.is_contiguous()
            and y.size(1) == self._width
            and scale == 1
        ):
            addresses = (x.data_ptr(), y.data_ptr())
            self._kernel(rows.address, rows.size, *addresses, *self._arguments)
            return
        h = torch.mm(x[rows.chosen].to(self._dtype), self._a.t())
        if scale != 1:
            h *= scale
        into = y[rows.chosen]
        pieces = torch.split(into, self._outputs, 1), torch.split(h, self._ranks, 1)
        for y_i, h_i, b_i in zip(*pieces, self._b, strict=True):
            if y.dtype == h.dtype:
                y_i.addmm_(h_i, b_i)
            else:
                y_i += torch.mm(h_i, b_i)
        if not isinstance(rows.chosen, slice):
            y[rows.chosen] = into


def _trimmed(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B, with a row for each rank, without the last ones that add nothing.

    Zeros make up whole blocks.
    """
    used = (a.any(1) & b.any(1)).nonzero()
    rank = int(used[-1]) + 1 if len(used) else 0
    more = (0, 0, 0, -rank % BLOCK)
    return pad(a[:rank], more), pad(b[:rank], more)
