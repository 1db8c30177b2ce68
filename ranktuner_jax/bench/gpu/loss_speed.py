"""Time and memory of the losses in bfloat16."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from ranktuner_jax.bench.gpu.case import Case
from ranktuner_jax.bench.loss import jax_cases, jax_row
from ranktuner_jax.bench.row import (
    Row,
    random_inputs,
    setting,
    supervise,
    time_rows,
    useful_flops,
)

__all__ = ["cases", "speed_cases"]

# Tokens, width, vocabulary: a model of 8B, and one of 1.7B.
SHAPES = {
    False: ((8192, 4096, 151_936), (16_384, 2048, 151_936)),
    True: ((64, 16, 257), (128, 8, 257)),
}
REPEATS = 10
NAMES = (
    *("three matmuls, unchunked", "dense CE", "fused CE"),
    *("fused RankTuner", "fused RankTuner, exact"),
)


def cases(small: bool) -> Iterator[Case]:
    """The losses of `ranktuner bench loss` that a large shape leaves memory for."""
    found = jax_cases(None)
    rows = {name: functools.partial(jax_row, name, found[name]) for name in NAMES}
    return speed_cases(rows, small)


def speed_cases(rows: Mapping[str, Callable[..., Row]], small: bool) -> Iterator[Case]:
    """Each loss at each shape, every token supervised.

    Args:
      rows: Makes the row of inputs, masks and a dtype.
      small: Whether shapes are small.
    """
    for shape in SHAPES[small]:
        inputs = random_inputs(*shape)
        masks = {1.0: supervise(shape[0], 1.0)}
        for name, make in rows.items():
            measure = functools.partial(_measure, make, inputs, masks, shape)
            yield Case(setting(shape, "bfloat16"), name, "bfloat16", measure)


def _measure(
    make: Callable[..., Row],
    inputs: tuple[np.ndarray, ...],
    masks: dict[float, np.ndarray],
    shape: tuple[int, int, int],
) -> dict[str, float | None]:
    row = make(inputs, masks, "bfloat16")
    time_rows([row], REPEATS)
    return {
        "median_s": row.median(1.0),
        "fastest_s": min(row.seconds[1.0]),
        "temp_bytes": row.temp_bytes,
        "peak_bytes": row.peak_bytes,
        "flops_per_s": useful_flops(*shape) / row.median(1.0),
    }
