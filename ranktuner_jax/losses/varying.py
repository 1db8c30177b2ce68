"""The shard_map axes over which a value varies, as `check_vma=True` tracks them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeVar

import jax
from jax import lax

_T = TypeVar("_T")


def varying_axes(tree: Any) -> frozenset[str]:
    """The mesh axes over which any leaf varies; empty outside shard_map.

    With `check_vma=False`, and in pmap, JAX does not track them and this is empty too.
    """
    axes = [jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree)]
    return frozenset[str]().union(*axes)


def mark_varying(tree: _T, axes: Collection[str]) -> _T:
    """The same values, typed as varying over `axes` too.

    Loop carries need it where zeros are combined with local values. Its transpose sums
    the gradient of replicated values over `axes`.
    """

    def mark(leaf: Any) -> Any:
        missing = tuple(sorted(frozenset(axes) - varying_axes(leaf)))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, tree)
