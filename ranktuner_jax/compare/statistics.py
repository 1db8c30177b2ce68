"""Intervals over seeds and questions, p-values that agree with them, and Holm's adjustment."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy.optimize
import scipy.special
from numpy.typing import ArrayLike

from ranktuner_jax import evals

__all__ = ["difference_interval", "holm", "p_value", "share_interval", "t_interval"]

LEAST_P = 1e-9
"""Smaller p-values are given as this one."""

LEAST_CONFIDENCE = 1e-3
"""An interval that holds 0 even at this confidence has a p-value of 1."""


def t_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Student's t interval for the mean of one value a seed.

    Args:
      values: [S] one value a seed, at least two.
      confidence: Share of such intervals that are to contain the mean.

    Returns:
      The lower and the upper end.

    Example:
      >>> low, high = t_interval([1.0, 2.0, 3.0])
      >>> round(low, 3), round(high, 3)
      (-0.484, 4.484)
    """
    x = np.asarray(values, np.float64)
    half = _t(x.size - 1, confidence) * x.std(ddof=1) / math.sqrt(x.size)
    return float(x.mean() - half), float(x.mean() + half)


def share_interval(
    values: Sequence[ArrayLike], *, crossed: bool, confidence: float = 0.95
) -> tuple[float, float]:
    r"""An interval for the mean score over seeds and questions like these.

    Seeds and questions are both drawn at random. The interval is the least that holds two others:

    1. Over seeds. If each seed has questions of its own (nested), its mean varies with both, and
       this is Student's t over the means. If all seeds answer the same Q questions (crossed), no
       difference between seeds shows what is due to the questions. The model is then

           x_sq = μ + a_s + b_q + e_sq

       with a, b and e random, and the variance of the mean is estimated from the mean squares of
       seeds, questions and residual:

           V = (MS_S + max(MS_Q − MS_E, 0)) / (S Q),
           MS_S = Q Σ_s (x̄_s − x̄)² / (S − 1),   MS_Q = S Σ_q (x̄_q − x̄)² / (Q − 1),
           MS_E = Σ_sq (x_sq − x̄_s − x̄_q + x̄)² / ((S − 1)(Q − 1)).

       The half width is t √V with Satterthwaite's degrees of freedom, of whose terms Hillis keeps
       that of the seeds, (S Q V)² / (MS_S² / (S − 1)); and never less than that of t over the
       means.
    2. Over questions, given these seeds: `evals.mean_interval` of all values (nested) or of the Q
       means over seeds (crossed). With one seed this is all there is. Seeds that agree by chance,
       as where hardly any answer differs, thus do not give an empty interval.

    Simulated at 95 % for differences, 2,000 times for each of 72 comparisons (six populations of
    questions, from all alike to nearly all hard or easy; no, small and large variance of the seeds;
    no effect, one effect on all questions, one that varies, one question in 25 gained), beside
    Student's t over the means of the seeds alone:

                               this interval                          t alone
            seeds  questions           least      mean     width        least      mean      < 93 %
    nested      3         50          95.4 %    98.9 %      1.04       14.9 %    91.4 %           6
                3        100          95.2 %    98.4 %      1.04       27.5 %    92.2 %           3
                3        200          95.0 %    98.2 %      1.03       48.5 %    93.1 %           3
                5         50          94.5 %    98.0 %      1.05       24.0 %    92.0 %           7
                5        100          94.2 %    97.5 %      1.05       43.3 %    92.7 %           3
                5        200          94.8 %    97.3 %      1.05       66.2 %    93.9 %           3
                8         50          94.7 %    97.4 %      1.06       34.1 %    92.1 %          11
                8        100          94.3 %    96.9 %      1.05       59.8 %    93.4 %           5
                8        200          94.4 %    96.8 %      1.05       84.0 %    94.5 %           3
    crossed     3         50          96.0 %    99.6 %      1.15        9.8 %    81.0 %          21
                3        100          95.1 %    99.2 %      1.08       16.2 %    82.7 %          18
                3        200          94.5 %    98.6 %      1.04       19.1 %    83.8 %          19
                5         50          95.0 %    99.5 %      1.60        7.1 %    79.7 %          27
                5        100          94.4 %    99.1 %      1.27        9.0 %    80.1 %          26
                5        200          94.2 %    98.4 %      1.07       11.7 %    81.3 %          26
                8         50          95.0 %    99.6 %      2.23        7.0 %    77.6 %          33
                8        100          94.7 %    99.2 %      1.52       11.1 %    78.5 %          30
                8        200          94.1 %    98.5 %      1.13       11.6 %    79.7 %          30

    "< 93 %" counts the comparisons of 72 that t covers less often. "width" is relative to t where t
    covers: the median comparison.

    Args:
      values: For each seed its questions' values in [0, 1]; [S, Q] if crossed.
      crossed: Whether all seeds answer the same questions, in the same order.
      confidence: Share of such intervals that are to contain the mean.

    Returns:
      The lower and the upper end, in [0, 1].

    Raises:
      ValueError: If a value is not in [0, 1], or seeds that share their questions have different
        numbers of them.

    Example:
      >>> seeds = [[1.0, 0.0, 1.0, 1.0] * 10, [1.0, 0.0, 0.0, 1.0] * 10]
      >>> [round(end, 2) for end in share_interval(seeds[:1], crossed=True)]
      [0.6, 0.86]
      >>> [round(end, 2) for end in share_interval([*seeds, seeds[0]], crossed=True)]
      [0.31, 1.0]

    References:
      Satterthwaite, An Approximate Distribution of Estimates of Variance Components, 1946.
      Dorfman, Berbaum and Metz, Receiver Operating Characteristic Rating Analysis, 1992, where
      readers and cases stand in place of seeds and questions.
      Hillis, A Comparison of Denominator Degrees of Freedom Methods for Multiple Observer ROC
      Analysis, 2007.
    """
    x = [np.asarray(of_seed, np.float64) for of_seed in values]
    if crossed and len({of_seed.size for of_seed in x}) > 1:
        raise ValueError(
            "expected as many values in every seed, which answer the same questions: got "
            f"{sorted({of_seed.size for of_seed in x})}"
        )
    pooled = np.mean(x, axis=0) if crossed else np.concatenate(x)
    low, high = evals.mean_interval(pooled, confidence)
    if len(x) > 1:
        means = [float(of_seed.mean()) for of_seed in x]
        over_seeds = [t_interval(means, confidence)]
        if crossed:
            over_seeds.append(_crossed_interval(np.stack(x), confidence))
        low = min(low, *(interval[0] for interval in over_seeds))
        high = max(high, *(interval[1] for interval in over_seeds))
    return max(0.0, low), min(1.0, high)


def difference_interval(
    a: Sequence[ArrayLike], b: Sequence[ArrayLike], *, crossed: bool, confidence: float = 0.95
) -> tuple[float, float]:
    """An interval for how much higher the mean score `a` is than `b`, paired by seed and question.

    It is `share_interval` of the differences, scaled from [-1, 1] to [0, 1] and back; with one
    seed, that is `evals.paired_difference`.

    Args:
      a: For each seed its questions' values in [0, 1].
      b: The same for the other method, with the same seeds and questions.
      crossed: Whether all seeds answer the same questions.
      confidence: Share of such intervals that are to contain the difference.

    Returns:
      The lower and the upper end, in [-1, 1].

    Example:
      >>> better, worse = [[1, 1, 1, 0] * 20, [1, 1, 0, 1] * 20], [[1, 0, 1, 0] * 20] * 2
      >>> [round(end, 2) for end in difference_interval(better[:1], worse[:1], crossed=True)]
      [0.14, 0.35]
    """
    halves = [
        (1 + np.asarray(x, np.float64) - np.asarray(y, np.float64)) / 2
        for x, y in zip(a, b, strict=True)
    ]
    low, high = share_interval(halves, crossed=crossed, confidence=confidence)
    return 2 * low - 1, 2 * high - 1


def p_value(interval: Callable[[float], tuple[float, float]]) -> float:
    """The p-value that belongs to an interval: 1 − the least confidence at which it holds 0.

    It is below 0.05 exactly where the 95 % interval leaves 0 out.

    Args:
      interval: Returns the interval at a confidence; wider at a higher one.

    Returns:
      A number from `LEAST_P` to 1.

    Example:
      >>> from scipy.stats import ttest_1samp
      >>> values = [0.5, 1.0, 1.5, 0.2]
      >>> round(p_value(lambda confidence: t_interval(values, confidence)), 6)
      0.067886
      >>> float(round(ttest_1samp(values, 0).pvalue, 6))
      0.067886
    """

    def inside(log_p: float) -> float:
        low, high = interval(-math.expm1(log_p))
        return max(low, -high)

    least, most = math.log(LEAST_P), math.log1p(-LEAST_CONFIDENCE)
    if inside(least) > 0:
        return LEAST_P
    if inside(most) <= 0:
        return 1.0
    return math.exp(scipy.optimize.brentq(inside, least, most, xtol=1e-12))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: those below α are false in one family of tests with chance ≤ α.

    Example:
      >>> holm([0.04, 0.01, 0.03])
      [0.06, 0.03, 0.06]

    References:
      Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979.
    """
    adjusted, running = [0.0] * len(p_values), 0.0
    for place, index in enumerate(np.argsort(p_values)):
        running = max(running, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = running
    return adjusted


def _crossed_interval(x: np.ndarray, confidence: float) -> tuple[float, float]:
    """Of [S, Q] values, by the mean squares of seeds, questions and residual."""
    (seeds, questions), mean = x.shape, float(x.mean())
    of_seed, of_question = x.mean(1, keepdims=True), x.mean(0, keepdims=True)
    ms_seeds = questions * of_seed.var(ddof=1)
    extra = 0.0
    if questions > 1:
        rest = np.square(x - of_seed - of_question + mean).sum()
        ms_rest = rest / ((seeds - 1) * (questions - 1))
        extra = max(float(seeds * of_question.var(ddof=1) - ms_rest), 0.0)
    # Seeds that agree to the last digit leave the questions, and a normal distribution.
    df = (seeds - 1) * (1 + extra / ms_seeds) ** 2 if ms_seeds > 1e-20 else math.inf
    half = _t(df, confidence) * math.sqrt((ms_seeds + extra) / x.size)
    return mean - half, mean + half


def _t(df: float, confidence: float) -> float:
    # Of `scipy.special`, which is 40 times as fast as `scipy.stats.t`: p-values call it often.
    return float(-scipy.special.stdtrit(df, (1 - confidence) / 2))
