"""Pass@k of a question, and 95 % intervals over questions, each with samples of its own."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["mean_interval", "paired_difference", "pass_at_k"]


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that at least one of `k` samples of a question is correct, estimated without bias.

    Of all ways to draw `k` of the samples without replacement, this is the share that holds a
    correct one, 1 - C(samples - correct, k) / C(samples, k). With k = 1 it is the mean over the
    samples, with k = samples it is 1 if any sample is correct and 0 otherwise. The binomials are
    integers and only their ratio is rounded, so no number of samples loses digits.

    Args:
      samples: Samples drawn for the question, at least 1.
      correct: How many of them are correct.
      k: Samples that a user would draw, from 1 to `samples`.

    Raises:
      ValueError: If `k` or `correct` is out of its range.

    Example:
      >>> pass_at_k(samples=4, correct=1, k=2)
      0.5

    References:
      Chen et al., Evaluating Large Language Models Trained on Code, arXiv:2107.03374, 2021.
    """
    if not 0 <= correct <= samples:
        raise ValueError(f"expected 0 <= correct <= samples: got {correct} of {samples}")
    if not 1 <= k <= samples:
        raise ValueError(
            f"pass@k: expected 1 <= k <= samples, got k={k} with {samples} samples; "
            "draw more samples or lower k"
        )
    draws = math.comb(samples, k)
    return (draws - math.comb(samples - correct, k)) / draws


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    r"""An interval for the mean over questions like these: drawn from the same population.

    Each question has one value in [0, 1], such as its pass@1 or pass@k, from any number of samples.
    Samples of one question depend on each other, so what counts is the number of questions, n.
    The interval is that of Agresti and Coull,

        center ± z sqrt(center (1 - center) / (m + z²)),  center = (m x̄ + z²/2) / (m + z²),

    with the mean x̄ and, in place of n, the number of right-or-wrong values whose mean would be as
    certain as that of these values:

        m = n μ (1 - μ) / σ².

    μ and σ² are the mean and variance of the values together with z²/2 zeros and z²/2 ones, without
    which m would be infinite and the interval empty if all values were equal.

    Right-or-wrong values have m = n. Their interval has the center of Wilson's and contains it. Far
    from 0 and 1 the two agree to three digits; near 0 and 1 this one is wider, since there Wilson's
    covers as little as 84 %.

    Simulated at 95 %, 4,000 times for each of 54 benchmarks (difficulties even, bimodal, all alike,
    nearly all hard or easy; 1, 4 and 16 samples; pass@1 and pass@k):

        questions   least coverage   mean coverage   width relative to Wilson's with m
               30           94.7 %          97.4 %                                1.06
               40           94.2 %          97.2 %                                1.06
              200           94.2 %          96.1 %                                1.03
              500           93.4 %          95.6 %                                1.01

    Args:
      values: [n] one value per question.
      confidence: Share of such intervals that are to contain the mean, between 0 and 1.

    Returns:
      The lower and the upper end, in [0, 1].

    Raises:
      ValueError: If there are no values, or if one is not in [0, 1], or `confidence` is not
        between 0 and 1.

    Example:
      >>> low, high = mean_interval([0.25] * 20 + [1.0] * 10)
      >>> round(low, 2), round(high, 2)
      (0.37, 0.63)
      >>> low, high = mean_interval([0.0] * 30)
      >>> low, round(high, 3)
      (0.0, 0.135)

    References:
      Agresti and Coull, Approximate Is Better than "Exact" for Interval Estimation of Binomial
      Proportions, 1998.
    """
    x = _per_question(values)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number between 0 and 1, got {confidence}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    added = z**2
    mu = (x.sum() + added / 2) / (x.size + added)
    variance = (np.square(x).sum() + added / 2) / (x.size + added) - mu**2
    m = x.size * mu * (1 - mu) / variance
    center = (m * x.mean() + added / 2) / (m + added)
    half = z * math.sqrt(center * (1 - center) / (m + added))
    return max(0.0, float(center - half)), min(1.0, float(center + half))


def paired_difference(
    a: ArrayLike, b: ArrayLike, confidence: float = 0.95
) -> tuple[float, float, float]:
    """How much higher the mean of `a` is than that of `b` on questions like these.

    Both are evaluations of the same questions in the same order. How hard a question is cancels in
    its difference, so differences are seen that the intervals of the two means would hide. The
    interval is `mean_interval` of the differences, scaled from [-1, 1] to [0, 1] and back. It is
    never empty: if no question differs it is about ±z²/n, ±0.12 with 30 questions and ±0.008 with
    500, because so few questions cannot rule out that some others differ.

    Simulated at 95 %, 4,000 times for each of 216 pairs (the benchmarks of `mean_interval`; a model
    sampled twice, unrelated models, one question in 25 gained), beside Student's t:

        questions   least coverage   mean coverage   pairs for which t covers < 93 %
               30           95.7 %          99.4 %                            86
               40           94.9 %          99.3 %                            83
              200           94.3 %          97.9 %                            48
              500           94.3 %          97.0 %                            32

    The price is width: where t does cover, this is 2.1 times as wide with 30 questions and 1.2
    times with 500.

    Args:
      a: [n] one value in [0, 1] per question.
      b: [n] the same for the other evaluation.
      confidence: Share of such intervals that are to contain the difference, between 0 and 1.

    Returns:
      The mean of `a - b`, and the lower and upper end of its interval, in [-1, 1].

    Raises:
      ValueError: If the two do not have one value in [0, 1] for each of the same questions, or
        `confidence` is not between 0 and 1.

    Example:
      >>> difference, low, high = paired_difference([1, 1, 1, 0] * 20, [1, 0, 1, 0] * 20)
      >>> round(difference, 2), round(low, 2), round(high, 2)
      (0.25, 0.14, 0.35)
    """
    x, y = _per_question(a), _per_question(b)
    if x.shape != y.shape:
        raise ValueError(
            f"expected two evaluations of the same questions: got {x.size} and {y.size} values"
        )
    low, high = mean_interval((1 + x - y) / 2, confidence)
    return float(np.mean(x - y)), 2 * low - 1, 2 * high - 1


def _per_question(values: ArrayLike) -> np.ndarray:
    """The values, [n] float64; anything else than one in [0, 1] per question is refused."""
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or not x.size:
        raise ValueError(f"expected one value per question, [n] with n >= 1: got shape {x.shape}")
    outside = x[~((x >= 0) & (x <= 1))]
    if outside.size:
        raise ValueError(f"expected a value in [0, 1] for each question: got {outside[0]}")
    return x
