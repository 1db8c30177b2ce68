"""The fused loss against the dense one."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranktuner_jax import losses
from ranktuner_jax.losses.plan import BACKENDS, Plan
from ranktuner_jax.losses.projection import Projection
from tests import oracles
from tests.losses.problems import (
    CLASSES,
    METHODS,
    Array,
    Loss,
    Method,
    Params,
    Problem,
    Result,
    assert_same_gradients,
    assert_same_sums,
    compiled,
    make_problem,
    make_weighting,
    method_id,
)
from tests.tolerances import (
    BF16_GRADIENT,
    EXACT_GRADIENT,
    EXACT_SCALE,
    EXPECTED_RANK,
    F32,
    F64,
    LARGE_VOCAB_GRADIENT,
    LOSS_GRADIENT,
    Tolerance,
)

PROBLEM = make_problem(3, 12)
LONG = make_problem(2, 75, seed=3)


def dense(
    hidden: Array,
    unembed: Array,
    labels: Array,
    mask: Array,
    *,
    bias: Array | None = None,
    logit_cap: float | None = None,
    **options: Any,
) -> losses.LossOutput:
    logits = jnp.einsum(
        "...d,vd->...v", hidden, unembed.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    if bias is not None:
        logits += jnp.expand_dims(bias, range(labels.ndim))
    if logit_cap is not None:
        logits = logit_cap * jnp.tanh(logits / logit_cap)
    return losses.weighted_nll(logits, labels, mask, **options)


def both(
    problem: Problem, *, bias: Array | None = None, chunk_size: int | None = None, **options: Any
) -> tuple[Result, Result]:
    """(LossOutput, gradients) of the fused loss and of the dense one."""

    def run(loss: Loss, **chunks: Any) -> Result:
        def total(matrices: Sequence[Array]) -> Array:
            hidden, unembed, *rest = matrices
            output = loss(
                hidden,
                unembed,
                problem.labels,
                problem.mask,
                bias=rest[0] if rest else None,
                **options,
                **chunks,
            )
            return output.total, output

        matrices = [problem.hidden, problem.unembed, *([] if bias is None else [bias])]
        (_, output), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(
            [jnp.asarray(x) for x in matrices]
        )
        return output, grads

    return run(losses.fused_weighted_nll, chunk_size=chunk_size), run(dense)


def assert_fused_is_dense(
    problem: Problem, gradient_tolerance: Tolerance = LOSS_GRADIENT, **options: Any
) -> None:
    (output, grads), (expected, expected_grads) = both(problem, **options)
    assert_same_sums(output, expected)
    assert [g.dtype for g in grads] == [g.dtype for g in expected_grads]
    assert_same_gradients(
        [g.astype(jnp.float32) for g in grads],
        [g.astype(jnp.float32) for g in expected_grads],
        gradient_tolerance,
    )


@pytest.mark.parametrize(
    "method", [m for m in METHODS if "exact" not in method_id(m)], ids=method_id
)
def test_fused_matches_dense(method: Method) -> None:
    assert_fused_is_dense(PROBLEM, weighting=make_weighting(method), chunk_size=7)


@pytest.mark.parametrize("chunk_size", [1, 5, 36, 1000, None])
def test_any_chunk_size(chunk_size: int | None) -> None:
    assert_fused_is_dense(PROBLEM, chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [64, 67, 149, 1000])
def test_remainders_run_in_quarter_chunks(chunk_size: int | None) -> None:
    assert_fused_is_dense(LONG, chunk_size=chunk_size)


@pytest.mark.parametrize("rows", [2049, 4992, 4999])
def test_padding_rows_and_overlapping_tiles_are_ignored(
    rows: int, rng: np.random.Generator
) -> None:
    problem = make_problem(2, 4, features=8, vocab=rows, seed=2)
    assert_fused_is_dense(problem, weighting=losses.DEFT())
    padded = Problem(problem.hidden, problem.unembed.copy(), problem.labels, problem.mask)
    padded.unembed[rows - 11 :] = 8  # would win most ranks
    padded.labels[...] = padded.labels % (rows - 11)
    assert_fused_is_dense(padded, weighting=losses.EAFT(), vocab_size=rows - 11)


def test_vocabulary_of_151936() -> None:
    problem = make_problem(2, 3, features=8, vocab=151_936, seed=6)
    assert_fused_is_dense(problem, LARGE_VOCAB_GRADIENT, chunk_size=4)


def test_bias_cap_token_weights_and_ramp_together(rng: np.random.Generator) -> None:
    assert_fused_is_dense(
        PROBLEM,
        chunk_size=7,
        bias=(rng.integers(-16, 16, 53) / 8).astype(np.float32),
        logit_cap=30.0,
        token_weights=jnp.asarray(rng.uniform(0, 2, (3, 12)), jnp.float32),
        ramp=jnp.float32(0.3),
    )


def test_talr_takes_sequences_from_ids(rng: np.random.Generator) -> None:
    ids = rng.choice([-7, 3, 4, 900], (3, 12)).astype(np.int32)
    assert_fused_is_dense(PROBLEM, chunk_size=7, weighting=losses.TALR(), sequence_ids=ids)


def test_bf16_hidden_with_float32_unembed() -> None:
    hidden = jnp.asarray(PROBLEM.hidden, jnp.bfloat16)
    problem = Problem(hidden, PROBLEM.unembed, PROBLEM.labels, PROBLEM.mask)
    assert_fused_is_dense(problem, BF16_GRADIENT, chunk_size=7)


def test_float64_stays_float64() -> None:
    with jax.enable_x64(True):
        hidden, unembed = LONG.hidden.astype(np.float64), LONG.unembed.astype(np.float64)
        (output, grads), _ = both(Problem(hidden, unembed, LONG.labels, LONG.mask), chunk_size=64)
        assert {x.dtype for x in jax.tree.leaves((output, grads))} == {np.dtype("float64")}
        expected = oracles.weighted_nll(LONG.logits, LONG.labels, LONG.mask)
        assert_same_sums(output, expected, F64)


def test_nothing_supervised_is_zero_with_zero_gradients() -> None:
    def mean(hidden: Array, unembed: Array) -> Array:
        return losses.fused_weighted_nll(
            hidden, unembed, PROBLEM.labels, jnp.zeros((3, 12), bool), chunk_size=7
        ).mean()

    value, grads = jax.value_and_grad(mean, argnums=(0, 1))(PROBLEM.hidden, PROBLEM.unembed)
    assert value == 0
    for grad in grads:
        np.testing.assert_array_equal(grad, 0)


def test_nan_propagates_from_supervised_positions_only() -> None:
    grad = jax.jit(
        jax.value_and_grad(
            lambda h, labels: (
                losses.fused_weighted_nll(
                    h, PROBLEM.unembed, labels, PROBLEM.mask, chunk_size=7
                ).total
            )
        )
    )
    clean = grad(PROBLEM.hidden, PROBLEM.labels)
    masked = np.where(PROBLEM.mask[..., None], PROBLEM.hidden, np.float32(np.nan))
    ignored = np.where(PROBLEM.mask, PROBLEM.labels, -100).astype(np.int32)
    jax.tree.map(np.testing.assert_array_equal, grad(masked, ignored), clean)
    poisoned = PROBLEM.hidden.copy()
    poisoned[0, 0, 3] = np.nan
    assert np.isnan(grad(poisoned, PROBLEM.labels)[0])
    for label in (-1, 53, 4000):
        labels = PROBLEM.labels.copy()
        labels[0, 0] = label
        assert np.isnan(grad(PROBLEM.hidden, labels)[0])


def test_huge_and_impossible_logits() -> None:
    rng = np.random.default_rng(5)
    logits: Array = rng.choice([-1e4, 0.0, 1e4], (6, 19)).astype(np.float32)
    bias: Array = np.where(np.arange(19) == 7, -np.inf, 0).astype(np.float32)
    labels: Array = np.array([0, 1, 2, 3, 4, 5], np.int32)
    stats = losses.fused_token_stats(jnp.eye(6), logits.T, labels, bias=bias, chunk_size=4)
    whole = losses.token_stats(logits + bias[None], labels)
    np.testing.assert_allclose(stats.nll, whole.nll, rtol=1e-6)
    np.testing.assert_array_equal(stats.rank, whole.rank)
    np.testing.assert_allclose(stats.entropy, whole.entropy, rtol=1e-5, atol=1e-6)


def distributions(kind: str, seed: int, vocab: int = 4999) -> np.ndarray:
    """Four rows of adversarial logits."""
    rng = np.random.default_rng(seed)
    size = rng.choice([1e-3, 0.05, 1.0, 8.0, 41.9, 1e4], (4, 1))
    zipf = -np.log(np.arange(1, vocab + 1))[None] * rng.uniform(0.2, 3, (4, 1))
    table = {
        "uniform": lambda: np.zeros((4, vocab)),
        "one-hot": lambda: (np.arange(vocab) == rng.integers(0, vocab, (4, 1))) * size,
        "two-level": lambda: (rng.random((4, vocab)) < rng.random((4, 1))) * size,
        "zipf": lambda: rng.permuted(zipf, axis=1),
        "ties": lambda: np.round(rng.normal(size=(4, vocab)) * 2) / 2,
        "slope": lambda: -np.arange(vocab)[None] * size / 50,
        "edges": lambda: -rng.integers(0, 2000, (4, vocab)) * 42 / 6144,
    }
    return (table[kind]() + rng.choice([0, -1e3, 1e3])).astype(np.float32)


@jax.jit
def fused_scale(logits: Array, labels: Array) -> tuple[Array, Array]:
    stats = losses.fused_token_stats(
        jnp.eye(4), logits.T, labels, fields=("expected_rank",), chunk_size=4
    )
    return stats.expected_rank, losses.RankTuner(base="one", scale="exact")(stats)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    kind=st.sampled_from(["uniform", "one-hot", "two-level", "zipf", "ties", "slope", "edges"]),
    seed=st.integers(0, 2**31),
)
def test_expected_rank_without_a_sort_is_within_its_bound(kind: str, seed: int) -> None:
    logits = distributions(kind, seed)
    labels = np.random.default_rng(seed).integers(0, 4999, 4).astype(np.int32)
    rank, scale = fused_scale(logits, labels)
    tokens = [oracles.token(z, y) for z, y in zip(logits, labels, strict=True)]
    expected = np.array([t.expected_rank for t in tokens])
    np.testing.assert_allclose(rank - 1, expected - 1, **EXPECTED_RANK)
    np.testing.assert_allclose(
        scale, [oracles.relative_scale(t, "exact") for t in tokens], **EXACT_SCALE
    )


@pytest.mark.parametrize("chunk_size", [7, 1000])
def test_token_stats_match_dense(chunk_size: int | None) -> None:
    fields = ("topk_entropy", "collision", "expected_rank")
    stats = losses.fused_token_stats(*LONG.inputs, fields=fields, chunk_size=chunk_size)
    whole = losses.token_stats(LONG.logits, LONG.labels, fields)
    for name in ("nll", "rank", "entropy", "max_prob", *fields):
        close: Tolerance = {"rtol": 4e-3, "atol": 0} if name == "expected_rank" else F32
        expected = np.where(LONG.mask, getattr(whole, name), 0)
        np.testing.assert_allclose(getattr(stats, name), expected, **close, err_msg=name)


def test_jit_traces_once() -> None:
    traces = []

    @jax.jit
    def total(hidden: Array, mask: Array, ramp: Array) -> Array:
        traces.append(1)
        return losses.fused_weighted_nll(
            hidden, PROBLEM.unembed, PROBLEM.labels, mask, weighting=losses.RankTuner(), ramp=ramp
        ).total

    for seed in range(3):
        mask = np.random.default_rng(seed).random((3, 12)) < 0.3 * seed
        total(PROBLEM.hidden, mask, jnp.float32(seed))
    assert len(traces) == 1


def test_matmuls_are_one_two_and_three() -> None:
    # In the second, several chunks and tiles are loops in a loop.
    for problem in (
        make_problem(4, 12, features=32, vocab=96),
        make_problem(4, 50, features=32, vocab=5000),
    ):

        def loss(hidden: Array, unembed: Array, problem: Any = problem) -> Array:
            return losses.fused_weighted_nll(
                hidden, unembed, problem.labels, problem.mask, chunk_size=16
            ).total

        for function, matmuls in (
            (loss, 1),
            (jax.grad(loss), 2),
            (jax.grad(loss, argnums=(0, 1)), 3),
        ):
            text, _ = compiled(function, problem.hidden, problem.unembed)
            assert text.count(" dot(") == matmuls


def test_a_sum_without_a_gradient_has_one_of_zero() -> None:
    def tokens(hidden: Array) -> Array:
        return losses.fused_weighted_nll(hidden, PROBLEM.unembed, PROBLEM.labels).metrics["nll"]

    assert not np.any(jax.grad(tokens)(jnp.asarray(PROBLEM.hidden)))


def test_memory_is_a_fraction_of_dense() -> None:
    problem = make_problem(4, 128, vocab=1024)

    def temporaries(loss: Loss) -> int:
        grad = jax.grad(lambda h, u: loss(h, u, problem.labels, problem.mask).total, (0, 1))
        return compiled(grad, problem.hidden, problem.unembed)[1]

    fused = temporaries(lambda *a: losses.fused_weighted_nll(*a, chunk_size=32))
    assert fused < temporaries(dense) / 4


def test_the_default_chunk_leaves_room_for_the_bins_of_the_expected_rank() -> None:
    hidden, unembed, labels = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((16384, 64), "float32"), ((256, 64), "float32"), ((16384,), "int32"))
    )

    def loss(*arrays: Array) -> Array:
        return losses.fused_weighted_nll(*arrays, weighting=losses.RankTuner(scale="exact")).total

    def stats(*arrays: Array) -> losses.TokenStats:
        return losses.fused_token_stats(*arrays, fields=("expected_rank",))

    for function in (loss, jax.grad(loss, argnums=(0, 1)), stats):
        # With chunks sized for the logits alone it would be above a gibibyte.
        assert compiled(function, hidden, unembed, labels)[1] < 256 * 2**20


@pytest.mark.parametrize("vocab", [49152, 65536, 128256, 151936, 262144])
@pytest.mark.parametrize("features", [576, 1024, 2048, 4096, 8192])
def test_a_large_vocabulary_has_the_same_chunks_with_and_without_bins(
    vocab: int, features: int
) -> None:
    size = losses.default_chunk_size(16384, features, vocab)
    assert losses.default_chunk_size(16384, features, vocab, fields=("expected_rank",)) == size


@pytest.mark.parametrize("tokens", [8192, 10000, 65536])
def test_chunks_of_accelerators_take_little_of_many_tokens(tokens: int) -> None:
    for backend in ("tpu", "gpu"):
        assert losses.default_chunk_size(tokens, 1024, 151936, backend=backend) <= tokens / 4


def test_there_are_slots_for_the_chunks_of_every_backend() -> None:
    tokens, vocab = 1100, 2**20
    plan = Plan(Projection(vocab, vocab), tokens, 4, None, losses.SFT(), frozenset())
    ends = set()
    for backend in BACKENDS:
        main, rest = plan.on(backend).chunk_sizes
        ends.add(tokens // main * main + math.ceil(tokens % main / rest) * rest)
    assert len(ends) > 1
    assert max(ends) <= plan.slots


def small_model(params: Params, inputs: Array) -> Array:
    return jnp.tanh(inputs @ params["w"])


def model_loss(
    params: Params,
    inputs: Array,
    labels: Array,
    mask: Array,
    loss: Loss = losses.fused_weighted_nll,
    **options: Any,
) -> Array:
    return loss(small_model(params, inputs), params["unembed"], labels, mask, **options).total


def test_gradients_of_a_model_under_checkpoint_scan_and_vmap() -> None:
    params = {"w": np.eye(16, dtype=np.float32), "unembed": PROBLEM.unembed}
    params = jax.tree.map(jnp.asarray, params)
    batch = [jnp.asarray(x) for x in (PROBLEM.hidden, PROBLEM.labels, PROBLEM.mask)]
    expected = jax.grad(model_loss)(params, *batch, loss=dense)

    def fused(params: Params, *batch: Array) -> Array:
        return model_loss(params, *batch, chunk_size=7)

    assert_same_gradients(jax.jit(jax.grad(fused))(params, *batch), expected)
    assert_same_gradients(jax.jit(jax.grad(jax.checkpoint(fused)))(params, *batch), expected)

    @jax.jit
    def by_micro_batches(params: Params) -> Params:
        def step(total: Params, batch: Sequence[Array]) -> tuple[Params, None]:
            return jax.tree.map(jnp.add, total, jax.grad(fused)(params, *batch)), None

        return jax.lax.scan(step, jax.tree.map(jnp.zeros_like, params), batch)[0]

    assert_same_gradients(by_micro_batches(params), expected)
    each = jax.jit(jax.vmap(jax.grad(fused), in_axes=(None, 0, 0, 0)))(params, *batch)
    assert_same_gradients(jax.tree.map(lambda g: g.sum(0), each), expected)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("method", CLASSES, ids=method_id)
def test_the_form_for_accelerators_matches_dense(method: Method) -> None:
    exact = method[1].get("scale") == "exact"
    problem = make_problem(3, 30, vocab=2049, seed=2)
    (output, grads), (expected, expected_grads) = both(
        problem, chunk_size=64, weighting=make_weighting(method)
    )
    # Without the histogram: a small error may move a token to the next bin.
    output, expected = (
        dataclasses.replace(o, metrics=_without_histogram(o)) for o in (output, expected)
    )
    assert_same_sums(output, expected, EXACT_SCALE if exact else F32)
    assert_same_gradients(grads, expected_grads, EXACT_GRADIENT if exact else LOSS_GRADIENT)


def _without_histogram(output: losses.LossOutput) -> dict[str, Array]:
    return {k: v for k, v in output.metrics.items() if k != "weight_histogram"}


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("chunk_size", [7, 64, 67, None])
def test_the_form_for_accelerators_in_bf16_with_any_chunk_size(chunk_size: int | None) -> None:
    hidden = jnp.asarray(LONG.hidden, jnp.bfloat16)
    problem = Problem(hidden, LONG.unembed, LONG.labels, LONG.mask)
    assert_fused_is_dense(problem, BF16_GRADIENT, chunk_size=chunk_size)


@pytest.mark.usefixtures("accelerator")
def test_the_form_for_accelerators_with_cap_bias_and_padding(rng: np.random.Generator) -> None:
    bias = (rng.integers(-16, 16, 53) / 8).astype(np.float32)
    assert_fused_is_dense(PROBLEM, chunk_size=7, bias=bias, logit_cap=30.0)
    within = dataclasses.replace(PROBLEM, labels=np.minimum(PROBLEM.labels, 49))
    assert_fused_is_dense(within, chunk_size=7, vocab_size=50)


def test_a_cap_over_several_tiles_keeps_the_ranks() -> None:
    problem = make_problem(3, 12, vocab=4999, seed=2)
    logits = 30 * jnp.tanh(jnp.asarray(problem.logits) / 30)
    stats = losses.fused_token_stats(*problem.inputs[:3], chunk_size=7, logit_cap=30.0)
    np.testing.assert_allclose(stats.nll, losses.token_stats(logits, problem.labels).nll, **F32)
    # Rounding may move other entries' capped logits across the label's, but not the label's own.
    above = np.sum(logits > label_logits(logits, problem.labels) + 1e-5, axis=-1)
    near = np.sum(logits >= label_logits(logits, problem.labels) - 1e-5, axis=-1)
    assert np.all(stats.rank >= above + 1)
    assert np.all(stats.rank <= near)


def label_logits(logits: Array, labels: Array) -> np.ndarray:
    return np.take_along_axis(np.asarray(logits), labels[..., None], axis=-1)
