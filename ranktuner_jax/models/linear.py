"""A matrix product whose sums are float32 in both directions, whatever its operands are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float

__all__ = ["linear"]


def linear(x: Float[Array, "B T I"], kernel: Float[Array, "O I"]) -> Float[Array, "B T O"]:
    """`x @ kernel.T`, multiplied in the dtype of `x` and summed in float32.

    Unlike in a plain product, the kernel's gradient is not rounded to the dtype of `x`
    on its way to the parameter, and all three products have operands of one type, which
    16-bit matrix units need, a CPU's included (a plain product's transpose multiplies
    float32 by bfloat16).

    Args:
      x: Activations.
      kernel: Parameters, outputs first, in their own dtype.

    Returns:
      The product, in the dtype of `x`.

    Example:
      >>> linear(jnp.ones((1, 2, 3), jnp.bfloat16), jnp.ones((4, 3))).dtype
      dtype(bfloat16)
    """
    # Inside shard_map a replicated kernel meets the device's own rows. The cast is explicit,
    # since a custom gradient must have the type of its primal.
    axes = tuple(_varying(x) - _varying(kernel))
    return _linear(x, jax.lax.pcast(kernel, axes, to="varying") if axes else kernel)


def _varying(x: Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


@jax.custom_vjp
def _linear(x: Array, kernel: Array) -> Array:
    # Two dimensions a side: XLA:CPU copies the transpose of a product with a batch axis.
    y = _dot(x.reshape(-1, x.shape[-1]), kernel.astype(x.dtype), 1, 1, x.dtype)
    return y.reshape(*x.shape[:-1], -1)


def _dot(a: Array, b: Array, i: int, j: int, dtype: jnp.dtype) -> Array:
    dims = (((i,), (j,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32).astype(dtype)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _linear(x, kernel), (x, kernel)


def _backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    rows, grads = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    dx = _dot(grads, kernel.astype(x.dtype), 1, 0, x.dtype).reshape(x.shape)
    if x.dtype.itemsize == 2:
        # Contracted over both axes, which XLA:CPU turns into the transpose that its
        # 16-bit kernels need, five times faster than the product without it.
        dims = (((0, 1), (0, 1)), ((), ()))
        dk = jax.lax.dot_general(g, x, dims, preferred_element_type=jnp.float32)
        return dx, dk.astype(kernel.dtype)
    return dx, _dot(grads, rows, 0, 0, kernel.dtype)


_linear.defvjp(_forward, _backward)
