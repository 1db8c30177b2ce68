"""The search for each method's learning rate: one grid and one budget for all of them."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from ranktuner_jax.compare.outcome import Outcome
from ranktuner_jax.compare.variants import Variant

__all__ = ["Rate", "best_rates", "default_rates", "searched", "widened"]


def default_rates(rate: float) -> list[float]:
    """A grid around the rate of a config: a third of it, itself, and three times as much.

    Example:
      >>> default_rates(1e-4)
      [3.3e-05, 0.0001, 0.0003]
    """
    return [_rounded(rate / 3), rate, _rounded(rate * 3)]


@dataclasses.dataclass(frozen=True)
class Rate:
    """A learning rate that was searched.

    Attributes:
      rate: The rate.
      score: The mean primary score of its runs.
      nll: Their mean plain NLL; infinite if one of them diverged.
      runs: How many there are.
    """

    rate: float
    score: float
    nll: float
    runs: int


def searched(outcomes: Iterable[Outcome], method: str, normalize: str, primary: str) -> list[Rate]:
    """The rates that a method was searched at, in increasing order."""
    found: dict[float, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        if (outcome.method, outcome.normalize, outcome.role) == (method, normalize, "search"):
            found[outcome.rate].append(outcome)
    rates = []
    for rate, runs in sorted(found.items()):
        nll = _mean([run.metrics["nll"] for run in runs])
        score = _mean([_mean(run.scores[primary]) for run in runs])
        rates.append(Rate(rate, score, nll if math.isfinite(nll) else math.inf, len(runs)))
    return rates


def best_rates(
    outcomes: Sequence[Outcome], variants: Sequence[Variant], primary: str
) -> dict[str, float]:
    """The rate with the highest mean primary score, by the variant's name.

    Of equal scores, the one with the lower plain NLL: all may be 0 or 1.
    """
    return {
        variant.name: max(
            searched(outcomes, variant.method, variant.normalize, primary),
            key=lambda one: (one.score, -one.nll),
        ).rate
        for variant in variants
    }


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
