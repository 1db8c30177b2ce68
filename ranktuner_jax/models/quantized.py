"""Matrices of 4 or 8 bits a number, in blocks that each have a scale."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import struct

from ranktuner_jax.models.linear import linear

if TYPE_CHECKING:
    from jaxtyping import Array, DTypeLike, Float, Int8, UInt8

__all__ = ["BLOCK", "NF4", "TYPES", "Quantized", "quantize", "quantized_linear"]

TYPES = ("nf4", "int8")
BLOCK = 64

# Dettmers et al., QLoRA, arXiv:2305.14314, appendix E: quantiles of the normal distribution, with
# zero among them, divided by the largest.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class Quantized(struct.PyTreeNode):
    """A matrix `[*outputs, *inputs]`, in blocks of `BLOCK` numbers along the last axis.

    Attributes:
      codes: int8, the numbers divided by their block's scale; or uint8, indices into `NF4`, two to
        a byte, the first in its low bits.
      scales: Of each block.
    """

    codes: Int8[Array, "*rows I"] | UInt8[Array, "*rows I/2"]
    scales: Float[Array, "*rows I/BLOCK"]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * BLOCK)

    def dequantize(self, dtype: DTypeLike) -> Float[Array, "*rows I"]:
        """The matrix, rounded to a type.

        Example:
          >>> row = jnp.linspace(-1, 1, 64)
          >>> float(jnp.abs(quantize(row, "int8").dequantize("float32") - row).max()) < 0.5 / 127
          True
        """
        codes = self.codes
        if codes.dtype == jnp.uint8:
            second = jax.lax.broadcasted_iota(jnp.uint8, (*codes.shape, 2), codes.ndim)
            pairs = (codes[..., None] >> (4 * second)) & 15
            # Indices of 4 bits are always in bounds, which spares checking each.
            codes = jnp.array(NF4).at[pairs].get(mode="promise_in_bounds")
        blocks = codes.reshape(*self.scales.shape, BLOCK).astype(jnp.float32)
        return (blocks * self.scales[..., None]).reshape(self.shape).astype(dtype)


@functools.partial(jax.jit, static_argnames="kind")
def quantize(matrix: Float[Array, "*rows I"], kind: str) -> Quantized:
    """Rounds each number of a matrix to the nearest code of its block.

    Args:
      matrix: The matrix; `I` is a multiple of `BLOCK`.
      kind: One of `TYPES`. `int8` has 255 codes at equal distances, `nf4` those of `NF4`; the
        largest number of a block, by magnitude, is exact up to rounding.

    Example:
      >>> two = quantize(jnp.array([[0.5] * 32 + [-1.0] * 32]), "nf4")
      >>> two.codes.shape, two.scales
      ((1, 32), Array([[1.]], dtype=float32))
    """
    blocks = matrix.astype(jnp.float32).reshape(*matrix.shape[:-1], -1, BLOCK)
    largest = jnp.abs(blocks).max(axis=-1)
    # Of a block of zeros all codes are those of zero.
    unit = blocks / jnp.where(largest == 0, 1, largest)[..., None]
    if kind == "int8":
        codes = jnp.round(127 * unit).astype(jnp.int8)
        return Quantized(codes.reshape(matrix.shape), largest / 127)
    assert kind == "nf4", kind
    indices = jnp.zeros(unit.shape, jnp.uint8)
    for low, high in itertools.pairwise(NF4):
        indices += (unit > (low + high) / 2).astype(jnp.uint8)
    pairs = indices.reshape(*matrix.shape[:-1], -1, 2)
    return Quantized(pairs[..., 0] | (pairs[..., 1] << 4), largest)


def quantized_linear(
    x: Float[Array, "B T I"], kernel: Quantized, outputs: int
) -> Float[Array, "B T O"]:
    """What `linear` computes with the dequantised matrix, which takes no part in the gradient.

    The matrix exists in full while the product is computed: the backward pass dequantises it again
    and keeps only its codes, whatever else it keeps.

    Args:
      x: Activations.
      kernel: The matrix, whose leading axes, together of size `O`, are the outputs.
      outputs: `O`.
    """

    def product(x: Array, kernel: Quantized) -> Array:
        return linear(x, kernel.dequantize(x.dtype).reshape(outputs, -1))

    return jax.checkpoint(product, prevent_cse=False)(x, kernel)
