"""Pass@k against enumeration; intervals against simulated benchmarks."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import scipy.stats

from ranktuner_jax.evals.statistics import mean_interval, paired_difference, pass_at_k

QUESTIONS = (30, 40, 200, 500)
METRICS = ((1, 1), (4, 1), (4, 4), (16, 1), (16, 4), (16, 16))  # samples, k


def spread(a: float, b: float) -> np.ndarray:
    """[1000] equally likely difficulties that stand for a Beta distribution."""
    return scipy.stats.beta.ppf((np.arange(1000) + 0.5) / 1000, a, b)


# The chance that a sample is correct, for each of the equally likely questions of a population.
POPULATIONS = {
    "even": spread(1, 1),
    "bimodal": spread(0.1, 0.1),
    "bimodal, mostly hard": spread(0.1, 0.3),
    "all alike": spread(20, 20),
    "hard": spread(1, 49),
    "hard, a few easy": spread(0.05, 2.45),
    "easy, a few hard": spread(0.485, 0.015),
    "one in 25 certain": np.repeat([0.02, 1.0], [24, 1]),
    "one in 25 impossible": np.repeat([0.5, 0.0], [24, 1]),
}
# What a second evaluation shares with the first, and the share of questions that it gains.
PAIRS = (("same model", 0.0), ("other model", 0.0), ("other samples", 0.04), ("same samples", 0.04))


class Cell(NamedTuple):
    """How often an interval covered the truth, and its width in each simulation."""

    name: str
    questions: int
    covered: int
    widths: np.ndarray


@functools.cache
def enumerated(samples: int, correct: int, k: int) -> Fraction:
    draws = list(itertools.combinations([True] * correct + [False] * (samples - correct), k))
    return Fraction(sum(any(draw) for draw in draws), len(draws))


def simulated_means(
    interval: Callable[[np.ndarray], tuple[float, float]], simulations: int
) -> Iterator[Cell]:
    rng = np.random.default_rng(0)
    for (name, population), (samples, k), n in itertools.product(
        POPULATIONS.items(), METRICS, QUESTIONS
    ):
        by_correct = np.array([float(enumerated(samples, c, k)) for c in range(samples + 1)])
        truth = np.mean(1 - (1 - population) ** k)
        chance = rng.choice(population, (simulations, n))
        ends = np.array([interval(row) for row in by_correct[rng.binomial(samples, chance)]])
        yield cell(f"{name}, pass@{k} of {samples}", n, truth, ends)


def simulated_differences(
    interval: Callable[[np.ndarray, np.ndarray], tuple[float, ...]], simulations: int
) -> Iterator[Cell]:
    rng = np.random.default_rng(0)
    for (name, population), (samples, k), (kind, gained), n in itertools.product(
        POPULATIONS.items(), METRICS, PAIRS, QUESTIONS
    ):
        by_correct = np.array([float(enumerated(samples, c, k)) for c in range(samples + 1)])
        truth = gained * np.mean((1 - population) ** k)
        before = rng.choice(population, (simulations, n))
        after = rng.choice(population, (simulations, n)) if kind == "other model" else before
        b = by_correct[rng.binomial(samples, before)]
        a = b if kind == "same samples" else by_correct[rng.binomial(samples, after)]
        a = np.where(rng.random((simulations, n)) < gained, 1.0, a)
        ends = np.array([interval(*rows)[-2:] for rows in zip(a, b, strict=True)])
        yield cell(f"{name}, {kind}, pass@{k} of {samples}", n, truth, ends)


def cell(name: str, questions: int, truth: float, ends: np.ndarray) -> Cell:
    # The truth is exact up to rounding, and may lie on the end of an interval, as 0 and 1 do.
    covered = (ends[:, 0] <= truth + 1e-12) & (truth - 1e-12 <= ends[:, 1])
    return Cell(name, questions, int(covered.sum()), ends[:, 1] - ends[:, 0])


def missed(cells: Iterator[Cell], simulations: int) -> list[tuple[str, int, float]]:
    """Cells that an interval of 93 % coverage would reach only once in 100,000 simulations."""
    least = scipy.stats.binom.ppf(1e-5, simulations, 0.93)
    return [(c.name, c.questions, c.covered / simulations) for c in cells if c.covered < least]


def normal_interval(values: np.ndarray) -> tuple[float, float]:
    """The interval of many a table of results: two standard errors on each side."""
    half = 2 * values.std() / values.size**0.5
    return values.mean() - half, values.mean() + half


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_correct_sample(samples: int) -> None:
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        assert pass_at_k(samples, correct, k) == float(enumerated(samples, correct, k))


@pytest.mark.parametrize(
    ("correct", "k"), [(1, 1), (1, 9_999), (5_000, 5_000), (3, 100), (9_999, 1), (10_000, 10_000)]
)
def test_pass_at_k_keeps_its_digits_with_ten_thousand_samples(correct: int, k: int) -> None:
    samples = 10_000
    none = Fraction(1)
    for i in range(k):
        none *= Fraction(max(0, samples - correct - i), samples - i)
        if not none:
            break
    assert pass_at_k(samples, correct, k) == float(1 - none)


def test_pass_at_k_has_no_bias() -> None:
    p, samples, k = Fraction(1, 7), 6, 4
    mean = sum(
        math.comb(samples, c) * p**c * (1 - p) ** (samples - c) * enumerated(samples, c, k)
        for c in range(samples + 1)
    )
    assert mean == 1 - (1 - p) ** k
    ours = [pass_at_k(samples, c, k) for c in range(samples + 1)]
    chances = scipy.stats.binom.pmf(np.arange(samples + 1), samples, float(p))
    assert np.dot(ours, chances) == pytest.approx(float(mean), rel=1e-12)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_refuses_a_k_that_the_samples_cannot_tell(k: int) -> None:
    with pytest.raises(ValueError, match=f"1 <= k <= samples, got k={k} with 4 samples; draw more"):
        pass_at_k(4, 2, k)


@pytest.mark.parametrize("correct", [-1, 5])
def test_pass_at_k_refuses_an_impossible_count(correct: int) -> None:
    with pytest.raises(ValueError, match=f"0 <= correct <= samples: got {correct} of 4"):
        pass_at_k(4, correct, 1)


@pytest.mark.parametrize(("correct", "total"), [(0, 30), (1, 1), (3, 7), (64, 256), (500, 500)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_right_or_wrong_values_give_the_interval_of_agresti_and_coull(
    correct: int, total: int, confidence: float
) -> None:
    z = scipy.stats.norm.isf((1 - confidence) / 2)
    trials = total + z**2
    share = (correct + z**2 / 2) / trials
    half = z * np.sqrt(share * (1 - share) / trials)
    expected = max(0.0, share - half), min(1.0, share + half)
    values = np.arange(total) < correct
    np.testing.assert_allclose(mean_interval(values, confidence), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("correct", "total"), [(0, 30), (1, 30), (64, 256), (131, 500), (30, 30)])
def test_right_or_wrong_values_give_an_interval_that_contains_wilsons(
    correct: int, total: int
) -> None:
    low, high = mean_interval(np.arange(total) < correct)
    wilson = scipy.stats.binomtest(correct, total).proportion_ci(method="wilson")
    assert low <= wilson.low + 1e-12
    assert wilson.high <= high + 1e-12


@pytest.mark.parametrize("n", [30, 40, 200, 500])
def test_right_or_wrong_values_cover_every_mean(n: int) -> None:
    # Exact: every count of correct answers with its binomial probability.
    ends = np.array([mean_interval(np.arange(n) < correct) for correct in range(n + 1)])
    for mean in np.linspace(0.0005, 0.9995, 1999):
        chances = scipy.stats.binom.pmf(np.arange(n + 1), n, mean)
        assert chances[(ends[:, 0] <= mean) & (mean <= ends[:, 1])].sum() >= 0.93


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("n", [1, 2, 30])
def test_equal_values_do_not_give_an_empty_interval(value: float, n: int) -> None:
    low, high = mean_interval([value] * n)
    assert 0 <= low <= value <= high <= 1
    assert high - low > 1 / n**1.5 / 2


def test_values_that_differ_less_give_a_narrower_interval() -> None:
    def width(values: list[float]) -> float:
        low, high = mean_interval(values)
        return high - low

    assert width([0.25, 0.75] * 100) < 0.6 * width([0.0, 1.0] * 100)


def test_mean_intervals_cover_what_they_promise() -> None:
    assert missed(simulated_means(mean_interval, 400), 400) == []


def test_paired_intervals_cover_what_they_promise() -> None:
    assert missed(simulated_differences(paired_difference, 100), 100) == []


def test_the_simulations_catch_an_interval_that_is_too_narrow() -> None:
    assert len(missed(simulated_means(normal_interval, 50), 50)) > 10
    paired = simulated_differences(lambda a, b: normal_interval(a - b), 50)
    assert len(missed(paired, 50)) > 10


@pytest.mark.drill
def test_intervals_cover_93_percent_in_four_thousand_simulations() -> None:
    for cells in (
        list(simulated_means(mean_interval, 4000)),
        list(simulated_differences(paired_difference, 4000)),
    ):
        for n in QUESTIONS:
            coverage = [c.covered / 4000 for c in cells if c.questions == n]
            print(f"{n} questions: coverage {min(coverage):.3f} at least, of {len(coverage)}")
        assert [c[:3] for c in cells if c.covered < 0.93 * 4000] == []


def test_a_difference_is_positive_where_the_first_is_better() -> None:
    better, worse = np.repeat([1.0, 0.0], [60, 40]), np.repeat([1.0, 0.0], [30, 70])
    difference, low, high = paired_difference(better, worse)
    assert difference == pytest.approx(0.3)
    assert 0 < low < difference < high
    opposite, opposite_low, opposite_high = paired_difference(worse, better)
    np.testing.assert_allclose(
        [opposite, opposite_low, opposite_high], [-difference, -high, -low], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("n", [30, 500])
def test_equal_evaluations_still_allow_a_rare_difference(n: int) -> None:
    difference, low, high = paired_difference([1.0] * n, [1.0] * n)
    # An improvement on a share of 3/n of the questions is missed by n of them once in 20 times.
    assert difference == 0
    assert low < -3 / n
    assert high > 3 / n


def test_pairing_narrows_the_interval_of_a_difference(rng: np.random.Generator) -> None:
    a = (rng.random(200) < 0.5).astype(float)
    b = np.where(rng.random(200) < 0.05, 1 - a, a)
    _, low, high = paired_difference(a, b)
    _, shuffled_low, shuffled_high = paired_difference(a, rng.permutation(b))
    assert high - low < 0.5 * (shuffled_high - shuffled_low)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], r"n >= 1: got shape \(0,\)"),
        ([[0.5]], r"n >= 1: got shape \(1, 1\)"),
        ([0.5, 1.5], "for each question: got 1.5"),
        ([0.5, -0.5], "for each question: got -0.5"),
        ([math.nan], "for each question: got nan"),
    ],
)
def test_values_that_are_not_shares_per_question_are_refused(
    values: list[float], message: str
) -> None:
    for call in (mean_interval, lambda x: paired_difference([0.5], x)):
        with pytest.raises(ValueError, match=message):
            call(values)


def test_evaluations_of_different_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="of the same questions: got 2 and 3 values"):
        paired_difference([0.0, 1.0], [0.0, 1.0, 1.0])


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_a_confidence_that_is_not_a_share_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match=f"between 0 and 1, got {confidence}"):
        mean_interval([0.5], confidence)
