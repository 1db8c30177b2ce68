"""The measures, against random breaking of ties and plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from ranktuner_jax.diagnostics.noise.table import (
    MEASURES,
    Draw,
    any_in_top,
    chance_in_top,
    measure,
)

ONES = np.ones((2, 40))


def draw_top(score: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The top tenth with ties broken at random; a fraction of a token is the chance of one more."""
    wanted = 0.1 * len(score)
    size = int(wanted) + (rng.random() < wanted % 1)
    shuffled = rng.permutation(len(score))
    ranked = sorted(shuffled.tolist(), key=lambda token: -score[token])
    return np.isin(np.arange(len(score)), ranked[:size])


def random_draw(rng: np.random.Generator, sequences: int = 40) -> tuple[Draw, np.ndarray]:
    """Sequences of 10 to 29 tokens, half of them with a span of 3 noise tokens; coarse scores."""
    lengths = rng.integers(10, 30, sequences)
    noise = [np.zeros(length, bool) for length in lengths]
    after = [np.zeros(length, bool) for length in lengths]
    for i in range(0, sequences, 2):
        start = int(rng.integers(lengths[i] - 3))
        noise[i][start : start + 3] = True
        after[i][start + 3 : start + 11] = True
    draw = Draw(
        np.repeat(np.arange(sequences), lengths), np.concatenate(noise), np.concatenate(after)
    )
    return draw, np.round(rng.normal(size=lengths.sum()) + 1.5 * draw.noise, 1)


@pytest.mark.parametrize("size", [7, 25, 40])
def test_chances_are_the_frequencies_of_random_tie_breaking(
    rng: np.random.Generator, size: int
) -> None:
    score = rng.integers(0, 4, size).astype(float)
    noise = np.arange(size) % 5 == 0
    tops = np.array([draw_top(score, rng) for _ in range(8000)])
    # Five standard errors of a frequency.
    np.testing.assert_allclose(tops.mean(axis=0), chance_in_top(score), atol=5 * 0.5 / 8000**0.5)
    some = (tops & noise).any(axis=1).mean()
    assert abs(some - any_in_top(score, noise)) < 5 * 0.5 / 8000**0.5


def test_a_weight_of_two_is_a_token_that_is_there_twice(rng: np.random.Generator) -> None:
    score = rng.integers(0, 6, 50).astype(float)
    weights = rng.integers(1, 4, 50)
    repeated = chance_in_top(np.repeat(score, weights))
    np.testing.assert_allclose(np.repeat(chance_in_top(score, weights), weights), repeated)


def test_the_measures_are_what_plain_loops_count(rng: np.random.Generator) -> None:
    draw, coarse = random_draw(rng)
    score = coarse + rng.random(len(coarse)) / 100  # Without ties.
    ranked = np.argsort(-score)
    size = 0.1 * len(score)
    top = np.zeros(len(score))
    top[ranked[: int(size)]] = 1
    top[ranked[int(size)]] = size % 1
    expected: dict[str, list[float]] = {name: [] for name in MEASURES}
    for sequence in range(0, 40, 2):
        tokens = [t for t in range(len(score)) if draw.sequence[t] == sequence]
        spoiled = [t for t in tokens if draw.noise[t]]
        ordered = sorted(tokens, key=lambda t: -score[t])
        slots = 0.1 * len(tokens)
        inside = [max(0.0, min(1.0, slots - ordered.index(t))) for t in spoiled]
        expected["seq_prec"].append(sum(inside) / slots)
        expected["seq_rec"].append(sum(inside) / len(spoiled))
        percentile = np.percentile([score[t] for t in tokens], 90)
        expected["hit_mean"].append(sum(score[t] for t in spoiled) / len(spoiled) > percentile)
        expected["hit_any"].append(max(inside))
        expected["hit_span"].append(2 * sum(top[t] for t in spoiled) > len(spoiled))
    expected["tok_prec"] = [top[draw.noise].sum() / size]
    expected["tok_rec"] = [top[draw.noise].sum() / draw.noise.sum()]
    expected["after"] = [top[draw.after].sum() / draw.after.sum()]
    for name, found in measure([draw], [score], ONES).items():
        assert found.value == pytest.approx(np.mean(expected[name])), name
        assert found.seeds == pytest.approx((found.value,))
    assert 0 < np.mean(expected["hit_mean"]) < 1
    assert 0 < np.mean(expected["hit_span"]) < 1


def test_a_constant_score_is_at_chance_and_the_noise_itself_at_the_ceiling(
    rng: np.random.Generator,
) -> None:
    draw, _ = random_draw(rng)
    rate = draw.noise.mean()
    assert rate < 0.1
    chance = measure([draw], [np.ones(len(draw.noise))], ONES)
    assert chance["tok_prec"].value == pytest.approx(rate)
    for name in ("tok_rec", "seq_rec", "after"):
        assert chance[name].value == pytest.approx(0.1)
    assert chance["hit_mean"].value == chance["hit_span"].value == 0
    ceiling = measure([draw], [draw.noise.astype(float)], ONES)
    assert ceiling["tok_prec"].value == pytest.approx(rate / 0.1)
    for name in ("tok_rec", "hit_any", "hit_span"):
        assert ceiling[name].value == pytest.approx(1)


def test_an_interval_is_over_sequences_and_more_draws_of_them_do_not_narrow_it(
    rng: np.random.Generator,
) -> None:
    draw, score = random_draw(rng)
    weights = rng.exponential(size=(300, 40))
    once = measure([draw], [score], weights)
    often = measure([draw] * 4, [score] * 4, weights)
    for name in MEASURES:
        assert once[name].low < once[name].value < once[name].high
        assert (often[name].low, often[name].high) == pytest.approx(
            (once[name].low, once[name].high)
        )


def test_intervals_contain_the_truth_although_the_tokens_of_a_span_go_together() -> None:
    """All noise of a sequence is in the top or none is: 80 sequences, not 320 tokens, count."""
    rng = np.random.default_rng(1)
    noise = np.tile(np.arange(50) < 4, 80)
    draw = Draw(np.repeat(np.arange(80), 50), noise, noise)
    held = narrow = 0
    for _ in range(200):
        score = rng.random(4000)
        high = np.repeat(rng.random(80) < 0.4, 50) & noise
        score[noise] = -1.0
        score[high] = 2.0
        found = measure([draw], [score], rng.exponential(size=(100, 80)))["tok_rec"]
        held += found.low <= 0.4 <= found.high
        of_tokens = 1.96 * (0.24 / 320) ** 0.5
        narrow += abs(found.value - 0.4) <= of_tokens
    assert held >= 180
    assert narrow < 160  # An interval over tokens would be too narrow by half.


def test_what_nothing_follows_has_no_measure_of_it(rng: np.random.Generator) -> None:
    draw, score = random_draw(rng)
    found = measure([Draw(draw.sequence, draw.noise, np.zeros_like(draw.after))], [score], ONES)
    assert np.isnan(found["after"].value)
