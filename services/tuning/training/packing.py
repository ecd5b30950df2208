"""Computes a batch without padding, and the beginning that its prompts share only once.

The examples lie one after the other in a single row, after the tokens that all prompts begin with
(the system's words), so that the linear layers, which take most of the time, see each token once.
Attention alone sees the examples apart. Losses and gradients are those of the padded batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from services.tuning.training.batches import Tokens

ATTENTION = "packed"  # the name that models know `attend` by
UNKNOWN = (
    "sliding_window",
    "softcap",
    "s_aux",
    "position_bias",
)  # kinds of attention not done here


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a row of `shared` + sum(own lengths) tokens belong.

    rows, longest: shape of the padded batch of own tokens. spread: for each place of the padded
    batch, an own token, its example's last one where there is padding. gather: for each own token
    its place. real: 1 for places that are no padding, [rows * longest, 1, 1]. mask: what an own
    token may attend to, [longest, shared + longest].
    """

    shared: int
    rows: int
    longest: int
    spread: Tensor
    gather: Tensor
    real: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Packed:
    """A batch. ids, positions: [1, tokens]. before: the places that the answers' tokens are
    predicted at; answer: these tokens. size: tokens of the examples, shared ones counted each
    time."""

    ids: Tensor
    positions: Tensor
    layout: Layout
    before: Tensor
    answer: Tensor
    size: int


def pack(examples: Sequence[Tokens]) -> Packed:
    """Lay out a batch."""
    shared = _shared([example.prompt for example in examples])
    texts = [[*example.prompt[shared:], *example.answer] for example in examples]
    ids = list(examples[0].prompt[:shared])
    positions = list(range(shared))
    spread: list[int] = []
    gather: list[int] = []
    real: list[int] = []
    before: list[int] = []
    longest = max(map(len, texts))
    for row, (example, text) in enumerate(zip(examples, texts, strict=True)):
        start, length = len(ids) - shared, len(text)
        spread += [start + min(i, length - 1) for i in range(longest)]
        gather += range(row * longest, row * longest + length)
        real += [1] * length + [0] * (longest - length)
        last = len(ids) + len(example.prompt) - shared - 1
        before += range(last, last + len(example.answer))
        ids += text
        positions += range(shared, shared + length)
    earlier = torch.ones(longest, shared, dtype=torch.bool)
    mask = torch.cat([earlier, torch.ones(longest, longest, dtype=torch.bool).tril()], 1)
    layout = Layout(
        shared,
        len(examples),
        longest,
        torch.tensor(spread),
        torch.tensor(gather),
        torch.tensor(real)[:, None, None],
        mask,
    )
    answer = torch.tensor([token for example in examples for token in example.answer])
    return Packed(
        torch.tensor([ids]),
        torch.tensor([positions]),
        layout,
        torch.tensor(before),
        answer,
        sum(map(len, examples)),
    )


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention over a packed row, as transformers calls it: [1, heads, tokens, width] each.

    Raises NotImplementedError for a kind of attention that is not done here.
    """
    if layout is None or dropout or any(others.get(name) is not None for name in UNKNOWN):
        raise NotImplementedError("this kind of attention")
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    outputs = []
    if layout.shared:
        q, k, v = (x[:, :, : layout.shared] for x in (query, key, value))
        first = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        outputs.append(first[0].transpose(0, 1))
    queries = _own(query, layout)
    keys, values = (
        torch.cat([x[:, :, : layout.shared].expand(layout.rows, -1, -1, -1), _own(x, layout)], 2)
        for x in (key, value)
    )
    rest = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=layout.mask, scale=scaling
    )
    outputs.append(_move(rest.transpose(1, 2).flatten(0, 1), layout.gather, layout.spread, layout))
    return torch.cat(outputs)[None], None


def _own(x: Tensor, layout: Layout) -> Tensor:
    """Return what is not shared, padded: [rows, heads, longest, width]."""
    own = _move(x[0, :, layout.shared :].transpose(0, 1), layout.spread, layout.gather)
    return own.view(layout.rows, layout.longest, *own.shape[1:]).transpose(1, 2)


def _move(x: Tensor, to: Tensor, back: Tensor, layout: Layout | None = None) -> Tensor:
    real = layout.real if layout else None
    return cast(Tensor, _Move.apply(x, to, back, real))  # type: ignore[no-untyped-call]


class _Move(torch.autograd.Function):
    """Selects rows. No real token goes to two places, so the gradients come back by a selection
    too, not by a sum; `real` is 0 where that would bring back one that is not the place's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to: Tensor, back: Tensor, real: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, real)
        return x.index_select(0, to)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        back, real = ctx.saved_tensors
        gradient = gradients[0].index_select(0, back)
        return gradient if real is None else gradient * real.to(gradient.dtype), None, None, None


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with; the last one of each does not count, for it
    predicts the answer's first."""
    first = prompts[0]
    most = min(map(len, prompts)) - 1
    for i in range(most):
        if any(prompt[i] != first[i] for prompt in prompts):
            return i
    return most
