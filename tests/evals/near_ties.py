"""Greedy completions of two programs, which may part only where two tokens are all but equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ranktuner_jax.evals import Completion

# What float32 programs that sum in different orders may choose differently.
_LEAST_GAP = 1e-4


def near_ties(
    written: Sequence[Completion],
    wanted: Sequence[Completion],
    prompts: Sequence[Sequence[int]],
    logits_after: Callable[[Sequence[int]], np.ndarray],
) -> list[tuple[int, int, float]]:
    """The completions that differ: their index, where, and the gap of the two top logits there.

    Raises:
      AssertionError: If it is a gap that no rounding explains.
    """
    found = []
    for i, (ours, theirs) in enumerate(zip(written, wanted, strict=True)):
        if ours == theirs:
            continue
        pairs = zip(ours.tokens, theirs.tokens, strict=False)
        shorter = min(len(ours.tokens), len(theirs.tokens))
        at = next((step for step, (a, b) in enumerate(pairs) if a != b), shorter)
        second, first = np.sort(logits_after([*prompts[i], *theirs.tokens[:at]]))[-2:]
        assert first - second < _LEAST_GAP, (i, at, first - second, ours, theirs)
        found.append((i, at, float(first - second)))
    print(f"{len(found)} of {len(written)} part at a near tie (index, step, gap): {found}")
    return found
