"""FLOPs of a matrix product, in the forms that XLA gives it."""

from __future__ import annotations

import math
import re

from ranktuner_jax.plan.instructions import Computation, Instruction

__all__ = ["product_flops"]


def product_flops(computation: Computation, one: Instruction) -> float:
    """FLOPs of a matrix product; TPUs have convolutions in their place."""
    if one.opcode == "dot":
        lhs = computation.inputs(one)[0].arrays[0]
        match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
        axes = [int(axis) for axis in match[1].split(",") if axis] if match else []
        return 2.0 * one.arrays[0].size * math.prod(lhs.shape[axis] for axis in axes)
    if one.opcode == "convolution":
        return _convolution_flops(computation, one)
    return 0.0


def _convolution_flops(computation: Computation, one: Instruction) -> float:
    """FLOPs of a convolution, of which most are matrix products in another form."""
    lhs, rhs = (operand.arrays[0].shape for operand in computation.inputs(one)[:2])
    match = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    window = re.search(r"window=\{([^}]*)\}", one.attributes)
    assert match is not None
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    out = one.arrays[0].shape
    size = 1.0
    for label, length in zip(match[3], out, strict=True):
        if not label.isdigit():
            size *= length
            continue
        # A batch axis is a window that meets each entry once: only real entries are multiplied.
        axis, entries, places = int(label), lhs[match[1].index(label)], rhs[match[2].index(label)]
        along = {name: value.split("x")[axis] for name, value in fields.items()}
        size *= _overlaps(length, entries, places, along)
    return 2.0 * size * rhs[match[2].index("i")]


def _overlaps(out: int, lhs: int, rhs: int, fields: dict[str, str]) -> int:
    """Pairs of an output and a place of the window that meet an entry and not padding."""
    stride, dilation = int(fields.get("stride", 1)), int(fields.get("lhs_dilate", 1))
    spread, low = int(fields.get("rhs_dilate", 1)), int(fields.get("pad", "0_0").split("_")[0])
    places = (o * stride + k * spread - low for o in range(out) for k in range(rhs))
    return sum(place % dilation == 0 and 0 <= place // dilation < lhs for place in places)
