"""One loss to be timed, and what it is timed on."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["Row", "random_inputs", "setting", "supervise", "time_rows", "useful_flops"]


@dataclasses.dataclass
class Row:
    """One loss: how to run it for each fraction of supervised positions.

    Attributes:
      name: The loss.
      calls: Runs it and waits for it, by the fraction.
      temp_bytes: XLA's temporary memory; None for torch.
      peak_bytes: All memory besides the inputs, the gradients included; None if it is not known.
      seconds: Time of each repeat.
    """

    name: str
    calls: Mapping[float, Callable[[], Any]]
    temp_bytes: int | None = None
    peak_bytes: int | None = None
    seconds: dict[float, list[float]] = dataclasses.field(default_factory=dict)

    def median(self, share: float) -> float:
        """The median time at a fraction."""
        return statistics.median(self.seconds[share])


def time_rows(rows: Sequence[Row], repeats: int) -> None:
    """Times all rows, in turn."""
    for row in rows:  # Warm up: the first runs allocate memory.
        for call in row.calls.values():
            call()
    for _ in range(repeats):
        for row in rows:
            for share, call in row.calls.items():
                start = time.perf_counter()
                call()
                row.seconds.setdefault(share, []).append(time.perf_counter() - start)


def random_inputs(size: int, features: int, vocab: int) -> tuple[np.ndarray, ...]:
    """Hidden states [N, D] and an unembedding [V, D] in float32, and int32 labels [N]."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((size, features), np.float32)
    unembed = rng.standard_normal((vocab, features), np.float32) / np.float32(features**0.5)
    return hidden, unembed, rng.integers(0, vocab, size, np.int32)


def supervise(size: int, share: float) -> np.ndarray:
    """A mask [N] whose supervised positions are spread evenly, like prompts and completions.

    Example:
      >>> supervise(4, 0.5).tolist()
      [False, True, False, True]
    """
    return np.floor(np.arange(1, size + 1) * share) > np.floor(np.arange(size) * share)


def setting(shape: Sequence[int], dtype: str) -> str:
    """What the losses of a table have in common.

    Example:
      >>> setting((8, 4, 32), "float32")
      'value and both gradients, N 8, D 4, V 32, float32'
    """
    size, features, vocab = shape
    return f"value and both gradients, N {size}, D {features}, V {vocab}, {dtype}"


def useful_flops(size: int, features: int, vocab: int) -> float:
    """FLOP of the three matrix products that a loss and its two gradients need."""
    return 6.0 * size * features * vocab
