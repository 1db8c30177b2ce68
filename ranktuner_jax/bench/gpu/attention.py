"""The attention that training chooses on this device, in bfloat16, beside XLA's in float32."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ranktuner_jax.bench.gpu.case import Case
from ranktuner_jax.models.attention import TokenPositions, attend, choose_implementation

__all__ = ["cases"]

# Rows, tokens, heads of queries, of keys and values, their size; the window.
SHAPE = {False: ((2, 2048, 16, 8, 128), 512), True: ((2, 64, 4, 2, 16), 8)}


def cases(small: bool) -> Iterator[Case]:
    """Rows of several conversations, with and without a window."""
    shape, window = SHAPE[small]
    kind = choose_implementation("auto", length=shape[1], dtype=jnp.bfloat16, mesh=None)
    for size in (None, window):
        yield Case(
            f"output and gradients in bfloat16, {shape[0]} rows of {shape[1]}, beside float32",
            f"{kind}, window {size}" if size else f"{kind}, no window",
            "bfloat16",
            functools.partial(_compare, kind, shape, (size,)),
        )


def _compare(kind: str, shape: Sequence[int], windows: tuple[int | None]) -> dict[str, float]:
    rows, length, heads, kv_heads, dim = shape
    rng = np.random.default_rng(0)

    def normal(heads: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((rows, length, heads, dim)), jnp.bfloat16)

    q, k, v, cotangent = normal(heads), normal(kv_heads), normal(kv_heads), normal(heads)
    # Three conversations and padding, of different lengths in each row.
    segments = np.sort(rng.integers(0, 4, (rows, length)), axis=1)[:, ::-1].astype(np.int32)
    starts = np.array([[row.tolist().index(segment) for segment in row] for row in segments])
    tokens = TokenPositions(
        jnp.asarray(np.arange(length, dtype=np.int32) - starts, jnp.int32), jnp.asarray(segments)
    )

    def attended(kind: str, dtype: Any) -> list[np.ndarray]:
        def mix(q: Any, k: Any, v: Any) -> Any:
            return attend(q, k, v, tokens, tokens, windows=windows, implementation=kind)

        with jax.default_matmul_precision("highest"):
            inputs = (x.astype(dtype) for x in (q, k, v))
            out, pull = jax.vjp(mix, *inputs)
            found = (out, *pull(cotangent.astype(dtype)))
        return [np.asarray(x, np.float64) for x in found]

    pairs = zip(attended(kind, jnp.bfloat16), attended("xla", jnp.float32), strict=True)
    errors = [float(np.abs(ours - right).max() / np.abs(right).max()) for ours, right in pairs]
    # Weights and outputs are rounded to 2^-9 each, in sums of terms that partly cancel.
    return {
        "output error": errors[0],
        "output allowed": 1e-2,
        "gradient error": max(errors[1:]),
        "gradient allowed": 2e-2,
    }
