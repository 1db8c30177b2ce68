"""Over which shard_map axes a value varies: what `check_vma=True` keeps account of."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeVar

import jax
from jax import lax

_T = TypeVar("_T")


def varying_axes(tree: Any) -> frozenset[str]:
    """The mesh axes over which any leaf varies; empty outside shard_map.

    With `check_vma=False`, and in pmap, JAX keeps no account and this is empty too.
    """
    axes = [jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree)]
    return frozenset[str]().union(*axes)


def mark_varying(tree: _T, axes: Collection[str]) -> _T:
    """The same values, typed as varying over `axes` too.

    Loop carries need it where zeros meet local values. The transpose of the mark is
    the sum over `axes` of the gradient of what was replicated.
    """

    def mark(leaf: Any) -> Any:
        missing = tuple(sorted(frozenset(axes) - varying_axes(leaf)))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, tree)
