"""The search for each method's learning rate: one grid and one budget for all of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ranktuner_jax.compare.outcome import Outcome
from ranktuner_jax.compare.variants import Variant

__all__ = ["best_rates", "default_rates", "mean_scores", "widened"]


def default_rates(rate: float) -> list[float]:
    """A grid around the rate of a config, about three to a decade each side.

    Example:
      >>> default_rates(1e-4)
      [3.3e-05, 0.0001, 0.0003]
    """
    return [_rounded(rate / 3), rate, _rounded(rate * 3)]


def mean_scores(
    outcomes: Iterable[Outcome], variant: Variant, primary: str
) -> dict[float, tuple[float, float]]:
    """By learning rate, the mean primary score and the mean plain NLL of a method's search."""
    found: dict[float, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        if (outcome.method, outcome.normalize, outcome.role) == (
            variant.method,
            variant.normalize,
            "search",
        ):
            found[outcome.rate].append(outcome)
    return {
        rate: (
            _mean([_mean(outcome.scores[primary]) for outcome in of_rate]),
            _mean([outcome.metrics["nll"] for outcome in of_rate]),
        )
        for rate, of_rate in sorted(found.items())
    }


def best_rates(
    outcomes: Sequence[Outcome], variants: Sequence[Variant], primary: str
) -> dict[str, float]:
    """The rate with the highest mean primary score, by the variant's name.

    Of equal scores, the one with the lower plain NLL: all may be 0 or 1.
    """
    best = {}
    for variant in variants:
        scores = mean_scores(outcomes, variant, primary)
        # A mean NLL that is not a number is of a run that diverged.
        best[variant.name] = max(
            scores, key=lambda rate: (scores[rate][0], -np.nan_to_num(scores[rate][1], nan=np.inf))
        )
    return best


def widened(rates: Sequence[float], best: Mapping[str, float]) -> list[float]:
    """The grid with one more rate at each end where a method's best lies; the same if at none.

    Example:
      >>> widened([1e-4, 3e-4, 1e-3], {"sft": 3e-4, "dft": 1e-3})
      [0.0001, 0.0003, 0.001, 0.0033]
      >>> widened([1e-4, 3e-4, 1e-3], {"sft": 3e-4})
      [0.0001, 0.0003, 0.001]
    """
    grid = list(rates)
    if len(grid) < 2:
        return grid
    if rates[0] in best.values():
        grid.insert(0, _rounded(rates[0] ** 2 / rates[1]))
    if rates[-1] in best.values():
        grid.append(_rounded(rates[-1] ** 2 / rates[-2]))
    return grid


def _rounded(rate: float) -> float:
    """To two digits."""
    return round(rate, 1 - math.floor(math.log10(rate)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
