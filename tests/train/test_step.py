"""The train step: what it computes, and that micro-batches and meshes do not change it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from ranktuner_jax import losses
from ranktuner_jax.data import Batch
from ranktuner_jax.models import Decoder, DecoderConfig
from ranktuner_jax.train import (
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    StepConfig,
    TrainConfig,
    TrainState,
    init_state,
    make_mesh,
    make_optimizer,
    place_batch,
    sequence_ids,
)
from tests.tolerances import BF16, F32
from tests.train.steps import make_step

STEPS = 10
ROWS, LENGTH, VOCAB = 8, 12, 38
MODEL = DecoderConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    initializer_range=0.3,
)


def make_config(
    accumulation: int = 1, data: int = 1, fsdp: int = 1, tensor: int = 1, **loss: object
) -> TrainConfig:
    options = {"weighting": "ranktuner", "options": {"base": "one"}} | loss
    return TrainConfig(
        loss=LossConfig(**options),  # type: ignore[arg-type]
        # A rate of 1 % moves every weight visibly, so that a wrong gradient shows.
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.0),
        train=StepConfig(batch_size=ROWS, accumulation=accumulation),
        mesh=MeshConfig(data=data, fsdp=fsdp, tensor=tensor),
    )


@pytest.fixture
def batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Rows of two conversations and padding, with very unequal supervised counts."""
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    segment_ids = np.array([[1] * 5 + [2] * 5 + [0] * 2] * ROWS, np.int32)
    supervised = rng.random((ROWS, LENGTH)) < np.linspace(0.05, 0.95, ROWS)[:, None]
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "mask": supervised & (segment_ids > 0),
        "positions": np.array([[*range(5), *range(5), 0, 1]] * ROWS, np.int32),
        "segment_ids": segment_ids,
        "token_weights": np.ones((ROWS, LENGTH), np.float32),
        "row_index": np.arange(ROWS, dtype=np.int32),
    }


def run(
    config: TrainConfig, batch: dict[str, np.ndarray], steps: int = 1
) -> tuple[TrainState, list[dict[str, float]]]:
    sizes = dataclasses.astuple(config.mesh)
    mesh = make_mesh(config.mesh, jax.devices()[: math.prod(sizes)])
    dtype = jnp.dtype(config.train.param_dtype)
    model = Decoder(MODEL, rngs=nnx.Rngs(0), mesh=mesh, param_dtype=dtype)
    state = init_state(model, make_optimizer(config.optimizer, STEPS), mesh)
    step = make_step(config, STEPS, mesh, state)
    log = []
    for _ in range(steps):
        state, metrics = step(state, place_batch(mesh, Batch.of(batch), config.train.accumulation))
        log.append({name: float(value) for name, value in metrics.items()})
    return state, log


def assert_same(one: TrainState, other: TrainState) -> None:
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), **F32)


def test_a_step_is_adamw_on_the_dense_loss(batch: dict[str, np.ndarray]) -> None:
    config = make_config()
    state, [metrics] = run(config, batch)

    model = Decoder(MODEL, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)
    arrays = {name: jnp.asarray(value) for name, value in batch.items()}

    def loss_fn(params: nnx.State) -> tuple[jax.Array, losses.LossOutput]:
        model = nnx.merge(graphdef, params)
        hidden = model(arrays["tokens"], arrays["positions"], arrays["segment_ids"])
        output = losses.weighted_nll(
            model.logits(hidden),
            arrays["labels"],
            arrays["mask"],
            weighting=losses.RankTuner(base="one"),
        )
        return output.mean(), output

    (loss, output), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    clip = optax.clip_by_global_norm(config.optimizer.clip_norm)
    tx = optax.chain(clip, make_optimizer(config.optimizer, STEPS))
    updates, _ = tx.update(grads, tx.init(params), params)
    expected = optax.apply_updates(params, updates)

    np.testing.assert_allclose(metrics["loss"], loss, **F32)
    np.testing.assert_allclose(metrics["nll"], losses.summarize(output)["nll"], **F32)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), **F32)
    assert metrics["supervised_tokens"] == batch["mask"].sum()
    assert metrics["tokens"] == (batch["segment_ids"] > 0).sum()
    assert int(state.step) == 1
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), **F32)


@pytest.mark.parametrize(
    "cut",
    [{"accumulation": 8}, {"data": 8}, {"accumulation": 2, "data": 2, "fsdp": 2, "tensor": 2}],
    ids=str,
)
def test_micro_batches_and_meshes_do_not_change_the_result(
    cut: dict[str, int], batch: dict[str, np.ndarray]
) -> None:
    whole, whole_log = run(make_config(), batch, steps=3)
    parts, parts_log = run(make_config(**cut), batch, steps=3)
    for one, other in zip(whole_log, parts_log, strict=True):
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=5e-6)
        np.testing.assert_allclose(one["grad_norm"], other["grad_norm"], rtol=2e-5)
    assert_same(whole, parts)


@pytest.fixture
def compiled_anew() -> Iterator[None]:
    """Turns off the cache: XLA logs nothing about programs that are loaded from it."""
    for enabled in (False, True):
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()
        if not enabled:
            yield


def compile_on_a_mesh(batch: dict[str, np.ndarray]) -> str:
    """The program of one of eight devices that divide rows, parameters and vocabulary."""
    config = make_config(data=2, fsdp=2, tensor=2)
    mesh = make_mesh(config.mesh)
    model = Decoder(MODEL, rngs=nnx.Rngs(0), mesh=mesh)
    state = init_state(model, make_optimizer(config.optimizer, STEPS), mesh)
    step = make_step(config, STEPS, mesh, state)
    return str(step.lower(state, place_batch(mesh, Batch.of(batch), 1)).compile().as_text())


def test_no_device_holds_the_activations_of_the_whole_batch(batch: dict[str, np.ndarray]) -> None:
    # No other size in the program is equal to these or to their product.
    rows, length = 44, 10
    long = {
        name: np.resize(value, (rows, *value.shape[1:]))[..., :length]
        for name, value in batch.items()
    }
    long["row_index"] = np.arange(rows, dtype=np.int32)
    text = compile_on_a_mesh(long)
    shapes = re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", text)
    sizes = {int(size) for shape in shapes for size in shape.split(",")}
    assert {rows // 4, rows // 4 * length} <= sizes  # The search finds the device's own rows.
    assert not {rows, rows * length} & sizes


@pytest.mark.usefixtures("compiled_anew")
def test_xla_reshards_a_step_without_full_rematerialization(
    batch: dict[str, np.ndarray], capfd: pytest.CaptureFixture[str]
) -> None:
    # Where XLA cannot reshard directly, it replicates the array first and warns.
    warning = "full rematerialization"
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))

    @jax.jit
    def from_columns_to_rows(x: jax.Array) -> jax.Array:
        for axes in ((None, "fsdp"), (("data", "fsdp"), None)):
            x = jax.lax.with_sharding_constraint(x * 2, NamedSharding(mesh, PartitionSpec(*axes)))
        return x

    from_columns_to_rows.lower(jnp.ones((8, 8))).compile()
    assert warning in capfd.readouterr().err
    compile_on_a_mesh(batch)
    assert warning not in capfd.readouterr().err


def test_micro_batches_of_bfloat16_are_summed_in_float32(batch: dict[str, np.ndarray]) -> None:
    # Copies of one row: a sum in bfloat16 would stop growing at 256 times its gradient.
    norms = []
    for copies in (1, 512):
        train = StepConfig(batch_size=copies, accumulation=copies, param_dtype="bfloat16")
        config = dataclasses.replace(make_config(), train=train)
        rows = {name: np.repeat(value[-1:], copies, axis=0) for name, value in batch.items()}
        _, [metrics] = run(config, rows)
        norms.append(metrics["grad_norm"])
    np.testing.assert_allclose(norms[1], norms[0], **BF16)


def test_parameters_and_their_moments_are_created_sharded() -> None:
    config = make_config(fsdp=8)
    mesh = make_mesh(config.mesh)
    model = Decoder(MODEL, rngs=nnx.Rngs(0), mesh=mesh)
    state = init_state(model, make_optimizer(config.optimizer, STEPS), mesh)
    for leaf in (state.params["embed"][...], state.opt_state[0].mu["embed"][...]):
        assert leaf.addressable_shards[0].data.shape == (VOCAB, MODEL.hidden_size // 8)


def test_a_nonfinite_step_keeps_the_state(batch: dict[str, np.ndarray]) -> None:
    config = make_config()
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state = init_state(
        Decoder(MODEL, rngs=nnx.Rngs(0)), make_optimizer(config.optimizer, STEPS), mesh
    )
    step = make_step(config, STEPS, mesh, state)
    state, _ = step(state, place_batch(mesh, Batch.of(batch), 1))
    before = jax.tree.map(np.array, state)
    poisoned = batch | {"token_weights": np.full((ROWS, LENGTH), np.inf, np.float32)}
    state, metrics = step(state, place_batch(mesh, Batch.of(poisoned), 1))
    assert bool(metrics["nonfinite"])
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, np.asarray(b))
    state, metrics = step(state, place_batch(mesh, Batch.of(batch), 1))
    assert not bool(metrics["nonfinite"])
    assert int(state.step) == 2


@pytest.mark.parametrize("clip", [0.25, 0.0])
def test_the_gradient_is_clipped_to_clip_norm_or_not_at_all(
    clip: float, batch: dict[str, np.ndarray]
) -> None:
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.0, b1=0.0, clip_norm=clip)
    state, [metrics] = run(dataclasses.replace(make_config(), optimizer=optimizer), batch)
    assert metrics["grad_norm"] > 0.3  # The norm before clipping.
    # With b1 = 0 the first moment is the gradient that the optimizer was given.
    given = optax.tree.norm(state.opt_state[0].mu)
    np.testing.assert_allclose(given, clip or metrics["grad_norm"], **F32)


def test_the_state_is_donated_and_nothing_compiles_twice(batch: dict[str, np.ndarray]) -> None:
    config = make_config(data=8)
    mesh = make_mesh(config.mesh)
    state = init_state(
        Decoder(MODEL, rngs=nnx.Rngs(0), mesh=mesh), make_optimizer(config.optimizer, STEPS), mesh
    )
    step = make_step(config, STEPS, mesh, state)
    first = state
    for _ in range(3):
        state, _ = step(state, place_batch(mesh, Batch.of(batch), 1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))
    assert step._cache_size() == 1  # type: ignore[attr-defined]


def test_dividing_by_weights_makes_their_mean_one(batch: dict[str, np.ndarray]) -> None:
    _, [by_tokens] = run(make_config(), batch)
    _, [by_weights] = run(make_config(normalize="weights"), batch)
    mean = by_tokens["weight/mean"]
    assert abs(mean - 1) > 0.01
    np.testing.assert_allclose(by_weights["loss"] * mean, by_tokens["loss"], rtol=1e-5)
    np.testing.assert_allclose(by_weights["grad_norm"] * mean, by_tokens["grad_norm"], rtol=1e-5)


def test_weights_ramp_up_from_one(batch: dict[str, np.ndarray]) -> None:
    _, log = run(make_config(ramp_steps=2), batch, steps=2)
    _, [full] = run(make_config(), batch)
    expected = 0.5 * full["nll"] + 0.5 * full["loss"]
    np.testing.assert_allclose(log[0]["loss"], expected, rtol=1e-5)
    assert abs(log[1]["loss"] - log[1]["nll"]) > 1e-3


def test_a_batch_without_supervised_tokens_has_loss_zero(batch: dict[str, np.ndarray]) -> None:
    empty = batch | {"mask": np.zeros_like(batch["mask"])}
    _, [metrics] = run(make_config(), empty)
    assert metrics["loss"] == 0
    assert metrics["grad_norm"] == 0
    assert not metrics["nonfinite"]


def test_sequence_ids_differ_between_conversations_and_rows() -> None:
    ids = sequence_ids(jnp.array([[1, 1, 2, 0], [1, 2, 3, 4]], jnp.int32))
    assert len({int(i) for i in ids.ravel()} - {int(ids[0, 3])}) + 1 == 6
    assert int(ids.max()) < ids.size


def test_options_of_the_config_reach_the_loss(batch: dict[str, np.ndarray]) -> None:
    _, [sft] = run(make_config(weighting="sft", options={}), batch)
    np.testing.assert_allclose(sft["loss"], sft["nll"], rtol=1e-6)
    config = make_config(chunk_size=16)
    assert dataclasses.replace(config.loss, chunk_size=0) == make_config().loss
    _, [chunked] = run(config, batch)
    _, [whole] = run(make_config(), batch)
    np.testing.assert_allclose(chunked["loss"], whole["loss"], rtol=1e-5)
