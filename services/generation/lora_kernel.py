"""LoRA of a few rows in one call, where PyTorch needs several operations.

For so few numbers, each operation takes longer to begin than to compute. The kernel is compiled by
numba, which vLLM itself needs, when an engine with adapters starts: one or two seconds.
"""

from collections.abc import Callable
from ctypes import CFUNCTYPE, c_int64, c_void_p, cast
from functools import cache
from typing import Any

import numba
import numpy
import torch
from numba import carray, float32, int64, types, uint16, void

BLOCK = 4
"""Ranks that are computed at once. All ranks are multiples of it."""

UNBOUNDED = 1 << 40  # elements; the arrays are known by their addresses alone
ROUNDING_ONLY = {"reassoc", "contract"}  # may change the last bits, but not what NaN is

Kernel = Callable[..., None]
"""Adds x @ A @ B to rows of y. Its arguments:

the address of the numbers of the rows (int64), and how many they are;
the addresses of x and of y, which are contiguous;
of A [ranks of all slices, inputs], and of the B [rank, outputs] of one slice after the other;
of the rank and the outputs of each slice (int64); how many slices there are, inputs, outputs;
and the address of float32 to write to, twice as many as inputs and outputs.
"""


@cache
def compiled(dtype: torch.dtype) -> Kernel | None:
    """Return the kernel for x, y, A and B of one type, or None if there is none for it."""
    if dtype == torch.float32:
        return _compile(float32, _same, _same)
    if dtype == torch.bfloat16:
        return _compile(uint16, _float, _bits)
    return None


def _same(value: Any) -> Any:
    return value


def _float(bits: Any) -> Any:
    """Return a bfloat16 as float32."""
    return numpy.uint32(numpy.uint32(bits) * numpy.uint32(1 << 16)).view(numpy.float32)


def _bits(value: Any) -> Any:
    """Return the bfloat16 nearest to a float32; of two, the even."""
    bits = numpy.float32(value).view(numpy.uint32)
    odd = numpy.uint32((bits >> numpy.uint32(16)) & numpy.uint32(1))
    return numpy.uint16(numpy.uint32(bits + numpy.uint32(0x7FFF) + odd) >> numpy.uint32(16))


def _compile(element: Any, load: Callable[[Any], Any], store: Callable[[Any], Any]) -> Kernel:
    load, store = numba.njit(load), numba.njit(store)
    function = numba.njit(fastmath=ROUNDING_ONLY, error_model="numpy")

    # Two rows at a time, which is what registers hold, and whose sums the innermost cache holds.

    @function  # type: ignore[untyped-decorator]
    def narrow(x: Any, a0: Any, a1: Any, a2: Any, a3: Any) -> Any:
        h0 = h1 = h2 = h3 = numpy.float32(0)
        for i in range(len(x)):
            h0 += load(a0[i]) * x[i]
            h1 += load(a1[i]) * x[i]
            h2 += load(a2[i]) * x[i]
            h3 += load(a3[i]) * x[i]
        return h0, h1, h2, h3

    @function  # type: ignore[untyped-decorator]
    def narrow_two(x: Any, v: Any, a0: Any, a1: Any, a2: Any, a3: Any) -> Any:
        h0 = h1 = h2 = h3 = g0 = g1 = g2 = g3 = numpy.float32(0)
        for i in range(len(x)):
            w0, w1, w2, w3 = load(a0[i]), load(a1[i]), load(a2[i]), load(a3[i])
            h0 += w0 * x[i]
            h1 += w1 * x[i]
            h2 += w2 * x[i]
            h3 += w3 * x[i]
            g0 += w0 * v[i]
            g1 += w1 * v[i]
            g2 += w2 * v[i]
            g3 += w3 * v[i]
        return (h0, h1, h2, h3), (g0, g1, g2, g3)

    @function  # type: ignore[untyped-decorator]
    def widen(y: Any, h: Any, b0: Any, b1: Any, b2: Any, b3: Any) -> None:
        h0, h1, h2, h3 = h
        for i in range(len(y)):
            y[i] += h0 * load(b0[i]) + h1 * load(b1[i]) + h2 * load(b2[i]) + h3 * load(b3[i])

    @function  # type: ignore[untyped-decorator]
    def widen_two(y: Any, z: Any, h: Any, g: Any, b0: Any, b1: Any, b2: Any, b3: Any) -> None:
        h0, h1, h2, h3 = h
        g0, g1, g2, g3 = g
        for i in range(len(y)):
            w0, w1, w2, w3 = load(b0[i]), load(b1[i]), load(b2[i]), load(b3[i])
            y[i] += h0 * w0 + h1 * w1 + h2 * w2 + h3 * w3
            z[i] += g0 * w0 + g1 * w1 + g2 * w2 + g3 * w3

    @function  # type: ignore[untyped-decorator]
    def read(into: Any, x: Any) -> None:
        for i in range(len(into)):
            into[i] = load(x[i])

    @function  # type: ignore[untyped-decorator]
    def write(y: Any, sums: Any) -> None:
        for i in range(len(sums)):
            y[i] = store(load(y[i]) + sums[i])

    @function  # type: ignore[untyped-decorator]
    def part(vector: Any, number: Any, size: Any) -> Any:
        return vector[number * size : (number + 1) * size]

    @function  # type: ignore[untyped-decorator]
    def block(matrix: Any, start: Any, size: Any) -> Any:
        rows = matrix[start : start + BLOCK * size]
        return part(rows, 0, size), part(rows, 1, size), part(rows, 2, size), part(rows, 3, size)

    @function  # type: ignore[untyped-decorator]
    def add(
        rows: Any,
        count: Any,
        x: Any,
        y: Any,
        a: Any,
        b: Any,
        shapes: Any,
        slices: Any,
        inputs: Any,
        outputs: Any,
        scratch: Any,
    ) -> None:
        for t in range(0, count, 2):
            one, two = rows[t], rows[min(t + 1, count - 1)]
            alone = one == two
            read(part(scratch, 0, inputs), x[one * inputs :])
            read(part(scratch, 1, inputs), x[two * inputs :])
            at_a = at_b = column = 0
            for s in range(slices):
                rank = shapes[2 * s]
                wide = shapes[2 * s + 1]
                sums = scratch[2 * inputs : 2 * (inputs + wide)]
                for i in range(2 * wide):
                    sums[i] = 0
                for _ in range(0, rank, BLOCK):
                    a_block = block(a, at_a, inputs)
                    b_block = block(b, at_b, wide)
                    if alone:
                        h = narrow(part(scratch, 0, inputs), *a_block)
                        widen(part(sums, 0, wide), h, *b_block)
                    else:
                        both = part(scratch, 0, inputs), part(scratch, 1, inputs)
                        h, g = narrow_two(*both, *a_block)
                        widen_two(part(sums, 0, wide), part(sums, 1, wide), h, g, *b_block)
                    at_a += BLOCK * inputs
                    at_b += BLOCK * wide
                write(y[one * outputs + column :], part(sums, 0, wide))
                if not alone:
                    write(y[two * outputs + column :], part(sums, 1, wide))
                column += wide

    numbers, values = types.CPointer(int64), types.CPointer(element)
    floats = types.CPointer(float32)

    @numba.cfunc(  # type: ignore[untyped-decorator]
        void(
            *(numbers, int64, values, values, values, values),
            *(numbers, int64, int64, int64, floats),
        )
    )
    def kernel(
        rows: Any,
        count: Any,
        x: Any,
        y: Any,
        a: Any,
        b: Any,
        shapes: Any,
        slices: Any,
        inputs: Any,
        outputs: Any,
        scratch: Any,
    ) -> None:
        add(
            carray(rows, UNBOUNDED),
            count,
            carray(x, UNBOUNDED),
            carray(y, UNBOUNDED),
            carray(a, UNBOUNDED),
            carray(b, UNBOUNDED),
            carray(shapes, UNBOUNDED),
            slices,
            inputs,
            outputs,
            carray(scratch, UNBOUNDED),
        )

    address, number = c_void_p, c_int64
    addresses, sizes = (address,) * 4, (number,) * 3
    signature = CFUNCTYPE(None, address, number, *addresses, address, *sizes, address)
    call = cast(kernel.address, signature)
    call.compiled = kernel  # type: ignore[attr-defined]  # its code lives as long as this
    return call
