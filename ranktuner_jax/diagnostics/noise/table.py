"""How much noise is in the top 10 % of a score: over all tokens, and within a sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ranktuner_jax.evals.statistics import mean_interval

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["MEASURES", "TOP", "Draw", "Measure", "any_in_top", "chance_in_top", "measure"]

# The share of tokens that counts as the top.
TOP = 0.1

MEASURES: dict[str, tuple[str, str]] = {
    "tok_prec": ("TOK PREC@10%", "share of noise among the tokens in the top 10 % of all tokens"),
    "tok_rec": ("TOK REC@10%", "share of the noise that is in the top 10 % of all tokens"),
    "seq_prec": (
        "in seq. PREC",
        "share of noise in the top 10 % of a polluted sequence, mean over these sequences",
    ),
    "seq_rec": (
        "in seq. REC",
        "share of a sequence's noise in its own top 10 %, mean over polluted sequences",
    ),
    "hit_mean": (
        "HIT mean",
        "share of polluted sequences whose noise has a mean above the sequence's 90th percentile",
    ),
    "hit_any": (
        "HIT any",
        "share of polluted sequences with a noise token in the sequence's own top 10 %",
    ),
    "hit_span": (
        "HIT span",
        "share of polluted sequences with more than half of their noise in the top 10 % of all "
        "tokens",
    ),
    "after": (
        "after",
        "share of the supervised tokens among the 8 after a span that are in the top 10 % of all "
        "tokens",
    ),
}
"""The measures, each with its heading and what it is."""

_OVER_TOKENS = ("tok_prec", "tok_rec", "after")
_OVER_SEQUENCES = ("seq_prec", "seq_rec", "hit_mean", "hit_any", "hit_span")


@dataclass(frozen=True)
class Draw:
    """The tokens of all sequences after one draw of the noise.

    Attributes:
      sequence: The number of each token's sequence, from 0, rising, [N].
      noise: True where a token is noise, [N].
      after: True for the tokens that follow a span and are reported apart, [N].
    """

    sequence: Int[np.ndarray, " N"]
    noise: Bool[np.ndarray, " N"]
    after: Bool[np.ndarray, " N"]


@dataclass(frozen=True)
class Measure:
    """One number of the table, a share in [0, 1]; NaN for "after" if nothing follows any span.

    Attributes:
      value: Its mean over the draws.
      low: The lower end of the 95 % interval, over sequences like these.
      high: The upper end.
      seeds: Its value in each draw.
    """

    value: float
    low: float
    high: float
    seeds: tuple[float, ...]


def chance_in_top(
    score: Float[np.ndarray, " N"], weights: Float[np.ndarray, " N"] | None = None
) -> Float[np.ndarray, " N"]:
    """Each token's chance to be in the top 10 % if ties are broken at random.

    Tokens above the threshold have 1, those below 0. Those tied at the threshold share what is left
    of the 10 %, which need not be a whole number of tokens.

    Args:
      score: The score of each token.
      weights: How often each token counts; once by default.

    Returns:
      The chances, whose weighted mean is 0.1.

    Example:
      >>> chance_in_top(np.array([3.0] + [2.0] * 4 + [1.0] * 15)).tolist()[:6]
      [1.0, 0.25, 0.25, 0.25, 0.25, 0.0]
    """
    ranking = _Ranking(score)
    return ranking.chance(ranking.threshold(np.ones(len(score)) if weights is None else weights))


def any_in_top(score: Float[np.ndarray, " N"], noise: Bool[np.ndarray, " N"]) -> float:
    """The chance that some noise is in the top 10 % if ties are broken at random.

    Of 10 % that is not a whole number of tokens, the fraction is the chance of one more.

    Example:
      >>> any_in_top(np.zeros(20), np.arange(20) < 3)  # Two of 20 are drawn, 3 of which are noise.
      0.2842...
    """
    best = score[noise].max()
    tied, noisy = int(np.sum(score == best)), int(np.sum(score[noise] == best))
    above = int(np.sum(score > best))
    slots = min(max(TOP * len(score) - above, 0.0), float(tied))
    fewer = math.floor(slots)
    misses = [
        math.comb(tied - noisy, drawn) / math.comb(tied, drawn)
        for drawn in (fewer, math.ceil(slots))
    ]
    return 1 - misses[0] + (slots - fewer) * (misses[0] - misses[1])


def measure(
    draws: Sequence[Draw],
    scores: Sequence[Float[np.ndarray, " N"]],
    weights: Float[np.ndarray, "resamples sequences"],
) -> dict[str, Measure]:
    """All measures of a score.

    The intervals are over sequences: noise is drawn again for each seed, but the sequences are the
    same, so that more seeds do not narrow an interval beyond what the sequences allow. Measures
    over tokens have Rubin's Bayesian bootstrap, which gives each sequence a random weight, in all
    draws alike; those over sequences have `mean_interval` of each sequence's mean over the draws.

    Args:
      draws: The draws.
      scores: The score of each token, for each draw.
      weights: The weights of the bootstrap, exponential with mean 1.

    Returns:
      The measures by their names in `MEASURES`.
    """
    points, resampled = [], []
    by_sequence: dict[int, list[list[float]]] = {}
    for draw, score in zip(draws, scores, strict=True):
        ranking = _Ranking(score)
        of_tokens = _OverTokens(draw, ranking)
        point = of_tokens(np.ones(weights.shape[1]))
        resampled.append([of_tokens(row) for row in weights])
        chance = ranking.chance(ranking.threshold(np.ones(len(score))))
        found = _of_sequences(draw, score, chance)
        points.append([*point, *np.mean(list(found.values()), axis=0)])
        for sequence, values in found.items():
            by_sequence.setdefault(sequence, []).append(values)
    means = np.mean(resampled, axis=0)
    ends = np.quantile(means, [0.025, 0.975], axis=0).T.tolist()
    # A sequence counts once, however many draws polluted it.
    of_each = np.array([np.mean(values, axis=0) for values in by_sequence.values()])
    ends += [list(mean_interval(values)) for values in of_each.T]
    values = [*np.mean(points, axis=0)[: len(_OVER_TOKENS)], *of_each.mean(axis=0)]
    made = {
        name: Measure(float(value), low, high, tuple(map(float, seeds)))
        for name, value, (low, high), seeds in zip(
            (*_OVER_TOKENS, *_OVER_SEQUENCES), values, ends, np.transpose(points), strict=True
        )
    }
    return {name: made[name] for name in MEASURES}


class _Ranking:
    """Tokens sorted by falling score, those with one score in a group."""

    def __init__(self, score: Float[np.ndarray, " N"]) -> None:
        _, self.group, sizes = np.unique(-score, return_inverse=True, return_counts=True)
        self._order = np.argsort(self.group, kind="stable")
        self._stops = np.cumsum(sizes)

    def threshold(self, weights: Float[np.ndarray, " N"]) -> tuple[int, float]:
        """The group in which the top 10 % ends, and which share of it is in."""
        total = np.cumsum(weights[self._order])
        wanted = TOP * total[-1]
        group = int(self.group[self._order[np.searchsorted(total, wanted)]])
        above = total[self._stops[group - 1] - 1] if group else 0.0
        return group, float((wanted - above) / (total[self._stops[group] - 1] - above))

    def chance(
        self, threshold: tuple[int, float], chosen: Int[np.ndarray, " M"] | slice = slice(None)
    ) -> Float[np.ndarray, " M"]:
        """The chances of chosen tokens to be in the top."""
        group, share = threshold
        return np.where(self.group[chosen] < group, 1.0, share * (self.group[chosen] == group))


class _OverTokens:
    """The measures over all tokens, for any weights of the sequences."""

    def __init__(self, draw: Draw, ranking: _Ranking) -> None:
        self._sequence, self._ranking = draw.sequence, ranking
        self._sets = [np.flatnonzero(chosen) for chosen in (draw.noise, draw.after)]

    def __call__(self, weights: Float[np.ndarray, " sequences"]) -> list[float]:
        of_tokens = weights[self._sequence]
        threshold = self._ranking.threshold(of_tokens)
        (noise, all_noise), (after, all_after) = (
            (of_tokens[tokens] @ self._ranking.chance(threshold, tokens), of_tokens[tokens].sum())
            for tokens in self._sets
        )
        # A span at the end of its sequence has nothing after it.
        return [
            noise / (TOP * of_tokens.sum()),
            noise / all_noise,
            after / all_after if all_after else math.nan,
        ]


def _of_sequences(
    draw: Draw, score: Float[np.ndarray, " N"], chance: Float[np.ndarray, " N"]
) -> dict[int, list[float]]:
    """The measures of each polluted sequence, by its number."""
    found = {}
    for sequence in np.unique(draw.sequence[draw.noise]).tolist():
        here = slice(*np.searchsorted(draw.sequence, [sequence, sequence + 1]))
        own, noise = score[here].astype(np.float64), draw.noise[here]
        inside = chance_in_top(own)[noise]
        found[sequence] = [
            min(1.0, float(inside.sum() / (TOP * len(own)))),
            float(inside.mean()),
            float(own[noise].mean() > np.quantile(own, 1 - TOP)),
            any_in_top(own, noise),
            float(chance[here][noise].mean() > 0.5),
        ]
    return found
