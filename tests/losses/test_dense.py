"""The dense loss against the oracle."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranktuner_jax import losses
from tests import oracles
from tests.losses.problems import (
    METHODS,
    Array,
    Method,
    Problem,
    Result,
    assert_same_gradients,
    assert_same_sums,
    make_problem,
    make_weighting,
    method_id,
    oracle,
)
from tests.tolerances import BF16_GRADIENT, F32, F64, LARGE_VOCAB_GRADIENT, LOSS_GRADIENT

PROBLEM = make_problem(3, 12)


def value_and_grads(problem: Problem, weighting: losses.Weighting, **options: Any) -> Result:
    """LossOutput and the gradients by hidden and unembed, through the logits."""

    def loss(hidden: Array, unembed: Array) -> tuple[Array, losses.LossOutput]:
        logits = jnp.einsum("...d,vd->...v", hidden, unembed)
        output = losses.weighted_nll(
            logits, problem.labels, problem.mask, weighting=weighting, **options
        )
        return output.total, output

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, output), gradients = grad(jnp.asarray(problem.hidden), jnp.asarray(problem.unembed))
    return output, gradients


def compiled(logits: Array, labels: Array, mask: Array, **options: Any) -> losses.LossOutput:
    """The loss as one program: compiled sooner than each of its operations."""
    return jax.jit(functools.partial(losses.weighted_nll, **options))(logits, labels, mask)


@pytest.mark.parametrize("method", METHODS, ids=method_id)
def test_dense_matches_the_oracle(method: Method) -> None:
    output, gradients = value_and_grads(PROBLEM, make_weighting(method))
    expected, *expected_gradients = oracle(PROBLEM, method)
    assert_same_sums(output, expected)
    assert_same_gradients(gradients, expected_gradients)


def test_the_problem_has_ties_clipped_weights_and_both_branches() -> None:
    sums = [oracle(PROBLEM, ("ranktuner", o))[0].metrics for o in ({}, {"clip": 1.2})]
    assert 0 < sums[0]["correct"] < PROBLEM.mask.sum()
    assert sums[0]["noise_region_bound"] > 0
    assert 0 < sums[1]["clipped"] < PROBLEM.mask.sum()
    ties = [
        np.sum(z == z[y]) > 1
        for z, y in zip(PROBLEM.logits[PROBLEM.mask], PROBLEM.labels[PROBLEM.mask], strict=True)
    ]
    assert any(ties)
    kept = oracle(PROBLEM, ("profit", {"threshold": 0.3}))[0].metrics["weight"]
    assert 0 < kept < PROBLEM.mask.sum()
    bits = [oracles.token(z, 0).entropy / math.log(2) for z in PROBLEM.logits[PROBLEM.mask]]
    assert min(bits) < 2 < max(bits)


def test_options_match_the_oracle_together(rng: np.random.Generator) -> None:
    method = ("ranktuner", {"base": "one", "clip": 1.5})
    token_weights = rng.uniform(0, 2, PROBLEM.labels.shape).astype(np.float32)
    output, gradients = value_and_grads(
        PROBLEM, make_weighting(method), token_weights=token_weights, ramp=0.3
    )
    expected, *expected_gradients = oracle(PROBLEM, method, token_weights=token_weights, ramp=0.3)
    assert_same_sums(output, expected)
    assert_same_gradients(gradients, expected_gradients)


def test_ramp_goes_from_plain_nll_to_the_method_without_a_new_trace() -> None:
    traces = []

    @jax.jit
    def total(ramp: Array) -> Array:
        traces.append(ramp)
        return losses.weighted_nll(PROBLEM.logits, PROBLEM.labels, PROBLEM.mask, ramp=ramp).total

    for ramp in (0.0, 0.25, 1.0):
        expected = oracle(PROBLEM, ramp=ramp)[0].total
        np.testing.assert_allclose(total(jnp.float32(ramp)), expected, **F32)
    assert len(traces) == 1


def test_talr_takes_sequences_from_ids(rng: np.random.Generator) -> None:
    ids = rng.choice([-7, 3, 4, 900], PROBLEM.labels.shape).astype(np.int32)
    output = compiled(
        PROBLEM.logits, PROBLEM.labels, PROBLEM.mask, weighting=losses.TALR(), sequence_ids=ids
    )
    assert_same_sums(output, oracle(PROBLEM, ("talr", {}), sequence_ids=ids)[0])
    by_rows = oracle(PROBLEM, ("talr", {}))[0].total
    assert abs(float(output.total) - by_rows) > 1e-3


def test_talr_of_an_even_number_of_sequences_takes_the_mean_of_the_middle_two() -> None:
    four = make_problem(5, 7, seed=1)
    four.mask[2] = False  # a row without a supervised token is no sequence
    output = compiled(four.logits, four.labels, four.mask, weighting=losses.TALR())
    assert_same_sums(output, oracle(four, ("talr", {}))[0])


def test_talr_bounds_tau_below_if_every_token_is_certain() -> None:
    logits = jnp.array([[[200.0, 0.0], [200.0, 0.0]]])
    labels, mask = jnp.array([[0, 0]]), jnp.ones((1, 2), bool)
    output = compiled(logits, labels, mask, weighting=losses.TALR())
    np.testing.assert_allclose(output.metrics["weight"], 2.0)


def test_token_stats_match_the_oracle() -> None:
    fields = ("expected_rank", "topk_entropy", "collision")
    stats = losses.token_stats(PROBLEM.logits, PROBLEM.labels, fields)
    expected = [
        oracles.token(z, y)
        for z, y in zip(PROBLEM.logits.reshape(-1, 53), PROBLEM.labels.ravel(), strict=True)
    ]
    for name in ("nll", "prob", "rank", "entropy", "max_prob", *fields):
        np.testing.assert_allclose(
            np.ravel(getattr(stats, name)),
            [getattr(t, name) for t in expected],
            **F32,
            err_msg=name,
        )
    assert stats.rank.dtype == jnp.int32
    np.testing.assert_allclose(
        np.ravel(losses.relative_rank(stats)),
        [oracles.indicator(t.rank, t.expected_rank) for t in expected],
        **F32,
    )
    bare = losses.token_stats(PROBLEM.logits, PROBLEM.labels)
    assert bare.expected_rank is bare.topk_entropy is bare.collision is None
    np.testing.assert_allclose(
        np.ravel(losses.relative_rank(bare)),
        [oracles.indicator(t.rank, oracles.expected_rank_bound(t)) for t in expected],
        **F32,
    )


def test_ties_take_the_worst_rank() -> None:
    logits = jnp.array([[1.0, 3.0, 3.0, 2.0, 3.0]] * 3)
    stats = losses.token_stats(logits, jnp.array([1, 4, 3]))
    assert stats.rank.tolist() == [3, 3, 4]


def logits_of_entropy(bits: float, vocab: int = 5) -> np.ndarray:
    """Logits whose entropy is `bits`, found by bisection of the temperature."""
    low, high = 0.0, 50.0
    slope = np.linspace(0, -1, vocab)
    for _ in range(200):
        middle = (low + high) / 2
        entropy = oracles.shannon(oracles.softmax(middle * slope)) / math.log(2)
        low, high = (middle, high) if entropy > bits else (low, middle)
    return low * slope


@pytest.mark.parametrize("side", [-1e-4, 1e-4])
def test_each_side_of_two_bits_takes_its_branch(side: float) -> None:
    logits: Array = logits_of_entropy(2 + side).astype(np.float32)[None]
    label: Array = np.array([0])
    output = compiled(logits, label, np.array([True]), weighting=losses.RankTuner(base="one"))
    expected = oracles.weighted_nll(logits, label, np.array([True]), "ranktuner", {"base": "one"})
    assert_same_sums(output, expected)


def test_the_scale_jumps_at_two_bits_between_the_values_of_its_branches() -> None:
    below, above = (
        oracles.relative_scale(oracles.token(logits_of_entropy(2 + side), 0))
        for side in (-1e-9, 1e-9)
    )
    assert above < 0.95 * below
    logits = jnp.asarray(logits_of_entropy(2), jnp.float32)
    at = losses.RankTuner(base="one")(losses.token_stats(logits, jnp.array(0)))
    assert min(abs(float(at) / below - 1), abs(float(at) / above - 1)) < 1e-5


def test_logits_of_minus_infinity_are_ignored() -> None:
    logits = PROBLEM.logits.copy()
    logits[..., 5:9] = -np.inf
    labels: Array = np.where((PROBLEM.labels >= 5) & (PROBLEM.labels < 9), 0, PROBLEM.labels)
    for method in METHODS[:1] + METHODS[4:5] + METHODS[9:10] + METHODS[16:18]:
        weighting = make_weighting(method)
        total, gradient = jax.value_and_grad(
            lambda z, w=weighting, m=PROBLEM.mask: compiled(z, labels, m, weighting=w).total
        )(jnp.asarray(logits))
        expected = oracles.weighted_nll(logits, labels, PROBLEM.mask, *method)
        np.testing.assert_allclose(total, expected.total, **F32)
        np.testing.assert_allclose(gradient, expected.d_logits, **F32)


def test_huge_logits_stay_finite(rng: np.random.Generator) -> None:
    logits = rng.choice([-1e4, 0.0, 1e4], (6, 19)).astype(np.float32)
    logits += rng.normal(size=logits.shape).astype(np.float32)
    labels: Array = np.arange(6, dtype=np.int32)
    mask: Array = np.ones(6, bool)
    for method in (
        ("ranktuner", {"base": "one"}),
        ("ranktuner", {"base": "one", "scale": "exact"}),
    ):
        weighting = make_weighting(method)
        total, gradient = jax.value_and_grad(
            lambda z, w=weighting, m=mask: compiled(z, labels, m, weighting=w).total
        )(jnp.asarray(logits))
        expected = oracles.weighted_nll(logits, labels, mask, *method)
        assert np.isfinite(expected.total)
        np.testing.assert_allclose(total, expected.total, **F32)
        assert_same_gradients(gradient, expected.d_logits)


@pytest.mark.parametrize("vocab", [7, 151_936])
def test_small_and_large_vocabularies(vocab: int) -> None:
    problem = make_problem(2, 3, features=8, vocab=vocab, seed=6)
    for method in (("ranktuner", {}), ("ranktuner", {"scale": "exact"})):
        output, gradients = value_and_grads(problem, make_weighting(method))
        expected, *expected_gradients = oracle(problem, method)
        assert_same_sums(output, expected)
        tolerance = LOSS_GRADIENT if vocab == 7 else LARGE_VOCAB_GRADIENT
        assert_same_gradients(gradients, expected_gradients, tolerance)


def test_bf16_logits_are_compared_and_summed_in_float32() -> None:
    logits = jnp.asarray(PROBLEM.logits, jnp.bfloat16)
    total, gradient = jax.value_and_grad(
        lambda z: losses.weighted_nll(z, PROBLEM.labels, PROBLEM.mask).total
    )(logits)
    seen = np.asarray(logits.astype(jnp.float32))
    expected = oracles.weighted_nll(seen, PROBLEM.labels, PROBLEM.mask)
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, expected.total, **F32)
    assert gradient.dtype == jnp.bfloat16
    assert_same_gradients(gradient.astype(jnp.float32), expected.d_logits, BF16_GRADIENT)


def test_float64_stays_float64() -> None:
    with jax.enable_x64(True):
        problem = Problem(
            PROBLEM.hidden.astype(np.float64),
            PROBLEM.unembed.astype(np.float64),
            PROBLEM.labels,
            PROBLEM.mask,
        )
        for method in (METHODS[0], METHODS[4], METHODS[9], METHODS[12], METHODS[16]):
            output, gradients = value_and_grads(problem, make_weighting(method))
            assert {x.dtype for x in jax.tree.leaves((output, gradients))} == {np.dtype("float64")}
            expected, *expected_gradients = oracle(problem, method)
            assert_same_sums(output, expected, F64)
            assert_same_gradients(gradients, expected_gradients, F64)


@pytest.mark.parametrize("method", METHODS, ids=method_id)
def test_nothing_supervised_is_zero_with_zero_gradients(method: Method) -> None:
    def mean(logits: Array) -> tuple[Array, losses.LossOutput]:
        output = losses.weighted_nll(
            logits, PROBLEM.labels, np.zeros_like(PROBLEM.mask), weighting=make_weighting(method)
        )
        return output.mean() + output.mean(normalize="weights"), output

    (value, output), gradient = jax.value_and_grad(mean, has_aux=True)(jnp.asarray(PROBLEM.logits))
    assert value == output.denom == 0
    np.testing.assert_array_equal(gradient, 0)
    assert all(np.all(np.asarray(x) == 0) for x in output.metrics.values())
    assert all(np.asarray(x) in (0, 1) for x in losses.summarize(output).values())


@pytest.mark.parametrize("method", METHODS, ids=method_id)
def test_nan_logits_give_nan_where_supervised_and_nothing_elsewhere(method: Method) -> None:
    weighting = make_weighting(method)

    def grad(logits: Array) -> tuple[Array, Array]:
        return jax.value_and_grad(
            lambda z: (
                losses.weighted_nll(z, PROBLEM.labels, PROBLEM.mask, weighting=weighting).total
            )
        )(jnp.asarray(logits))

    clean_total, clean_gradient = grad(PROBLEM.logits)
    for poison in (np.nan, np.inf):
        masked = np.where(PROBLEM.mask[..., None], PROBLEM.logits, np.float32(poison))
        total, gradient = grad(masked)
        np.testing.assert_array_equal(total, clean_total)
        np.testing.assert_array_equal(gradient, clean_gradient)
    poisoned = PROBLEM.logits.copy()
    poisoned[0, 0, 3] = np.nan
    assert np.isnan(grad(poisoned)[0])


def test_labels_out_of_range_give_nan_unless_unsupervised() -> None:
    for label in (-1, 53, -100):
        labels: Array = np.where(PROBLEM.mask, PROBLEM.labels, label).astype(np.int32)
        output = losses.weighted_nll(PROBLEM.logits, labels, PROBLEM.mask)
        assert_same_sums(output, oracle(PROBLEM)[0])
        labels[0, 0] = label
        output = losses.weighted_nll(PROBLEM.logits, labels, PROBLEM.mask)
        assert np.isnan(output.total)
        assert np.isnan(output.metrics["nll"])


def test_padding_columns_are_ignored() -> None:
    padded: Array = np.concatenate([PROBLEM.logits, np.full((3, 12, 4), 1e3, np.float32)], axis=-1)
    for method in (METHODS[4], METHODS[19]):
        output = losses.weighted_nll(
            padded, PROBLEM.labels, PROBLEM.mask, weighting=make_weighting(method), vocab_size=53
        )
        assert_same_sums(output, oracle(PROBLEM, method)[0])
    labels = PROBLEM.labels.copy()
    labels[0, 0] = 54  # a padding column is not a vocabulary entry
    assert np.isnan(losses.weighted_nll(padded, labels, PROBLEM.mask, vocab_size=53).total)


def test_mask_may_be_left_out_or_be_integers() -> None:
    everywhere = losses.weighted_nll(PROBLEM.logits, PROBLEM.labels)
    integers = jnp.ones((3, 12), jnp.int32)
    ones = losses.weighted_nll(PROBLEM.logits, PROBLEM.labels, integers)
    assert_same_sums(everywhere, ones, {"rtol": 0, "atol": 0})
    assert everywhere.denom == 36


def test_weights_are_constants_to_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the stop_gradient is deleted; the second half shows that it would."""
    _, gradients = value_and_grads(PROBLEM, losses.RankTuner())
    _, *expected = oracle(PROBLEM)
    assert_same_gradients(gradients, expected)
    monkeypatch.setattr(jax.lax, "stop_gradient", lambda x: x)
    _, gradients = value_and_grads(PROBLEM, losses.RankTuner())
    for actual, right in zip(gradients, expected, strict=True):
        assert np.max(np.abs(actual - right)) > 0.1 * np.max(np.abs(right))


def test_only_the_total_is_differentiable(rng: np.random.Generator) -> None:
    token_weights = jnp.asarray(rng.uniform(0, 2, PROBLEM.labels.shape), jnp.float32)

    def metrics(logits: Array) -> Array:
        output = losses.weighted_nll(logits, PROBLEM.labels, PROBLEM.mask)
        return sum(jnp.sum(x) for x in output.metrics.values())

    np.testing.assert_array_equal(jax.grad(metrics)(jnp.asarray(PROBLEM.logits)), 0)
    by_weights = jax.grad(
        lambda w: (
            losses.weighted_nll(PROBLEM.logits, PROBLEM.labels, PROBLEM.mask, token_weights=w).total
        )
    )(token_weights)
    np.testing.assert_array_equal(by_weights, 0)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    vocab=st.integers(1, 25),
    seed=st.integers(0, 2**31),
    method=st.sampled_from([m for m in METHODS if m[0] != "entropy"]),
    share=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_any_shape_and_mask(
    shape: list[int], vocab: int, seed: int, method: Method, share: float
) -> None:
    if method[0] == "talr" and not shape:
        shape = [1]
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(*shape, vocab)) * rng.choice([0.1, 1, 20])).astype(np.float32)
    labels = rng.integers(0, vocab, shape).astype(np.int32)
    mask = np.asarray(rng.random(shape) < share)
    output = compiled(logits, labels, mask, weighting=make_weighting(method))
    expected = oracles.weighted_nll(
        logits.reshape(-1, vocab) if not shape else logits,
        np.atleast_1d(labels),
        np.atleast_1d(mask),
        *method,
    )
    np.testing.assert_allclose(output.total, expected.total, **LOSS_GRADIENT)
    np.testing.assert_allclose(output.metrics["nll"], expected.metrics["nll"], **F32)
    np.testing.assert_array_equal(output.metrics["rank"], expected.metrics["rank"])
    np.testing.assert_array_equal(output.denom, mask.sum())
