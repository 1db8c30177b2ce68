"""Sums: merged, divided once, and summarised."""

import jax
import jax.numpy as jnp
import numpy as np

from ranktuner_jax import losses
from tests.losses.problems import assert_same_sums, make_problem
from tests.tolerances import F32

PROBLEM = make_problem(4, 50, seed=2)


def half(rows: slice) -> losses.LossOutput:
    loss = jax.jit(losses.weighted_nll)  # One program: compiled sooner than each operation.
    return loss(PROBLEM.logits[rows], PROBLEM.labels[rows], PROBLEM.mask[rows])


def test_merged_halves_are_the_whole() -> None:
    whole = half(slice(None))
    merged = half(slice(0, 1)).merge(half(slice(1, None)))
    assert_same_sums(merged, whole)
    np.testing.assert_allclose(merged.mean(), whole.total / whole.denom, **F32)
    np.testing.assert_allclose(
        merged.mean(normalize="weights"), whole.total / whole.metrics["weight"], **F32
    )


def test_mean_keeps_a_nan_where_nothing_is_supervised() -> None:
    output = losses.LossOutput(jnp.float32(np.nan), jnp.float32(0), {"weight": jnp.float32(0)})
    assert np.isnan(output.mean())
    assert np.isnan(output.mean(normalize="weights"))


def test_summary_is_means_shares_and_quantiles() -> None:
    output = half(slice(None))
    summary = {name: float(value) for name, value in losses.summarize(output).items()}
    stats = losses.token_stats(PROBLEM.logits[PROBLEM.mask], PROBLEM.labels[PROBLEM.mask])
    weights = np.asarray(losses.RankTuner()(stats), np.float64)
    nll = np.asarray(stats.nll, np.float64)
    expected = {
        "loss": np.mean(weights * nll),
        "nll": np.mean(nll),
        "perplexity": np.exp(np.mean(nll)),
        "accuracy": np.mean(np.asarray(stats.rank) == 1),
        "entropy": np.mean(stats.entropy),
        "rank/mean": np.mean(stats.rank),
        "weight/mean": np.mean(weights),
        "weight/effective_fraction": np.mean(weights) ** 2 / np.mean(weights**2),
        "weight/clipped": 0.0,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(summary[name], value, **F32, err_msg=name)
    assert 0 < summary["noise_region_bound"] < 1
    bin_width = 10 ** (1 / 8) * 1.02
    for percent in (5, 50, 95):
        ratio = summary[f"weight/p{percent:02d}"] / np.quantile(
            np.maximum(weights, 1e-5), percent / 100, method="inverted_cdf"
        )
        assert 1 / bin_width < ratio < bin_width


def test_quantiles_of_one_weight_lie_in_its_bin() -> None:
    for weight in (0.02, 1.05, 37.0):
        token_weights = jnp.full(PROBLEM.labels.shape, weight, jnp.float32)
        output = losses.weighted_nll(
            PROBLEM.logits, PROBLEM.labels, weighting=losses.SFT(), token_weights=token_weights
        )
        below = np.searchsorted(losses.HISTOGRAM_EDGES, weight) - 1
        assert output.metrics["weight_histogram"][below] == output.denom
        for name in ("p05", "p50", "p95"):
            quantile = float(losses.summarize(output)[f"weight/{name}"])
            low, high = losses.HISTOGRAM_EDGES[below : below + 2]
            assert low < quantile < high
