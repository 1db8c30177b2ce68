"""Checksums of arrays on the devices, since Orbax does not detect flipped bits."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, Shaped, UInt32

__all__ = ["by_name", "checksums", "json_checksum", "nest"]


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, such as "params.layers.q.value"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def nest(path: Sequence[Any], leaf: Any) -> Any:
    """A tree of nested dicts with a single leaf at the given path."""
    for key in reversed(path):
        leaf = {jax.tree_util.keystr((key,), simple=True): leaf}
    return leaf


def checksums(arrays: Any) -> dict[str, int]:
    """A checksum of the bits of each array by name, independent of its sharding."""
    # One at a time: on CPUs each takes as much memory as its array.
    return {name: int(_sum_bits(array)) for name, array in by_name(arrays).items()}


@jax.jit
def _sum_bits(array: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    # The factor of each element depends on its index and is odd, hence invertible modulo 2^32:
    # changed elements and swapped elements change the sum.
    factor = jnp.ones(array.shape, jnp.uint32)
    for axis in range(array.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        factor += index * np.uint32(2 * pow(2654435761, axis + 1, 2**31))
    return jnp.sum(bits.astype(jnp.uint32) * factor, dtype=jnp.uint32)


def json_checksum(run: Mapping[str, Any], data: Mapping[str, Any]) -> int:
    """A checksum of the parts saved as JSON."""
    return zlib.crc32(json.dumps([run, data], sort_keys=True).encode())
