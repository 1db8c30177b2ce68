"""The same batches give the same numbers on any mesh, in micro-batches, packed and padded."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ranktuner_jax import data, losses, models
from ranktuner_jax.train import (
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    StepConfig,
    TrainConfig,
    init_state,
    make_mesh,
    make_optimizer,
    place_batch,
)
from tests.tolerances import (
    BF16_RUN_LOSS,
    PADDED_ADAFACTOR,
    SAME_RUN_LOSS,
    SAME_RUN_PARAM,
    Tolerance,
)
from tests.train.steps import make_step

STEPS, ROWS, LENGTH = 20, 8, 12
VOCAB = 61  # A prime: no axis divides it.
OPTIMIZER = OptimizerConfig(learning_rate=2e-3)

Batch = dict[str, np.ndarray]


class Run(NamedTuple):
    """The result of a run: the loss of each step, and the parameters by name."""

    losses: list[float]
    params: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tiny Qwen2: biases of queries, keys and values that are not zero, heads that share keys."""
    config = models.DecoderConfig(
        family="qwen2",
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=8,
        num_kv_heads=2,
        head_dim=4,
        qkv_bias=True,
        initializer_range=0.2,
    )
    model = models.Decoder(config, rngs=nnx.Rngs(0))
    for index, name in enumerate(("q_bias", "k_bias", "v_bias")):
        bias = getattr(model.layers, name)
        bias[...] = 0.3 * jax.random.normal(jax.random.key(index), bias.shape)
    path = tmp_path_factory.mktemp("qwen2") / "model"
    models.save_pretrained(model, path)
    return path


def conversations() -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """2 · ROWS conversations for each step: their tokens, and which are supervised.

    The supervised share rises from none in the first ones to nearly all in the last ones.
    """
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        shares = np.linspace(-0.2, 0.95, 2 * ROWS)
        lengths = rng.integers(3, LENGTH // 2 + 1, 2 * ROWS)
        step = []
        for length, share in zip(lengths, shares, strict=True):
            tokens = rng.integers(VOCAB) * 3 ** np.arange(length + 1) % VOCAB  # Predictable.
            step.append((tokens, rng.random(length) < share))
        yield step


def lay_out(step: list[tuple[np.ndarray, np.ndarray]], together: int) -> Batch:
    """The batch of a step, with `together` conversations in each row."""
    shape = (len(step) // together, LENGTH)
    names = ("tokens", "labels", "positions", "segment_ids")
    batch: Batch = {name: np.zeros(shape, np.int32) for name in names}
    batch |= {"mask": np.zeros(shape, bool), "token_weights": np.ones(shape, np.float32)}
    batch["row_index"] = np.arange(shape[0], dtype=np.int32)
    for row in range(shape[0]):
        start = 0
        for segment, (tokens, mask) in enumerate(step[row * together : (row + 1) * together]):
            place = row, slice(start, start := start + len(mask))
            batch["tokens"][place], batch["labels"][place] = tokens[:-1], tokens[1:]
            batch["mask"][place], batch["segment_ids"][place] = mask, segment + 1
            batch["positions"][place] = np.arange(len(mask))
    return batch


PACKED = [lay_out(step, 2) for step in conversations()]
PADDED = [lay_out(step, 1) for step in conversations()]


@pytest.fixture(scope="module")
def run(folder: pathlib.Path) -> Callable[..., Run]:
    """Trains with the library's own step."""

    def train(
        batches: list[Batch] = PACKED,
        accumulation: int = 1,
        compute_dtype: str = "float32",
        param_dtype: str = "float32",
        optimizer: OptimizerConfig = OPTIMIZER,
        **mesh_sizes: int,
    ) -> Run:
        config = TrainConfig(
            loss=LossConfig(options={"base": "one"}),
            optimizer=optimizer,
            train=StepConfig(batch_size=len(batches[0]["tokens"]), accumulation=accumulation),
            mesh=MeshConfig(**{"data": 1} | mesh_sizes),
        )
        mesh = make_mesh(config.mesh, jax.devices()[: math.prod(dataclasses.astuple(config.mesh))])
        model = models.load_pretrained(
            folder, mesh=mesh, dtype=jnp.dtype(compute_dtype), param_dtype=jnp.dtype(param_dtype)
        )
        state = init_state(model, make_optimizer(optimizer, STEPS), mesh)
        step = make_step(config, STEPS, mesh, state)
        log = []
        for batch in batches:
            state, metrics = step(state, place_batch(mesh, data.Batch.of(batch), accumulation))
            log.append(float(metrics["loss"]))
        return Run(log, by_name(state.params))

    return train


@pytest.fixture(scope="module")
def one_device(run: Callable[..., Run]) -> Run:
    return run()


def by_name(params: object) -> dict[str, np.ndarray]:
    """The arrays of a tree, without the padding of the vocabulary."""
    named = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    return {name: a[:VOCAB] if "embed" in name else a for name, a in named.items()}


def assert_same(
    one: Run, other: Run, loss: Tolerance = SAME_RUN_LOSS, param: Tolerance = SAME_RUN_PARAM
) -> None:
    np.testing.assert_allclose(other.losses, one.losses, **loss)
    assert one.params.keys() == other.params.keys()
    for name, value in one.params.items():
        # A key's bias adds the same to all scores of a query, so that its gradient is zero but for
        # rounding, which Adam makes as large as any gradient.
        if "k_bias" not in name:
            largest = np.abs(value).max()
            np.testing.assert_allclose(
                other.params[name] / largest, value / largest, **param, err_msg=name
            )


@pytest.mark.parametrize(
    "cut",
    [
        {"data": 8},
        {"fsdp": 8},
        {"tensor": 8},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"accumulation": 8},
    ],
    ids=str,
)
def test_twenty_steps_are_the_same_on_any_mesh_and_in_any_number_of_micro_batches(
    cut: dict[str, int], run: Callable[..., Run], one_device: Run
) -> None:
    counts = [batch["mask"].sum(axis=1) for batch in PACKED]
    assert min(map(min, counts)) == 0  # Some devices and micro-batches have nothing to learn.
    assert one_device.losses[-1] < one_device.losses[0]
    assert_same(one_device, run(**cut))


def test_twenty_steps_are_the_same_packed_and_padded(
    run: Callable[..., Run], one_device: Run
) -> None:
    assert PADDED[0]["tokens"].shape == (2 * ROWS, LENGTH)
    assert PADDED[0]["mask"].sum() == PACKED[0]["mask"].sum()
    assert_same(one_device, run(PADDED))


def test_twenty_steps_are_the_same_in_a_user_written_pmap_loop(
    folder: pathlib.Path, one_device: Run
) -> None:
    model = models.load_pretrained(folder)
    graphdef, params = nnx.split(model, nnx.Param)
    tx = optax.chain(
        optax.clip_by_global_norm(OPTIMIZER.clip_norm), make_optimizer(OPTIMIZER, STEPS)
    )

    def loss_fn(params: nnx.State, batch: dict[str, jax.Array]) -> tuple[jax.Array, object]:
        model = nnx.merge(graphdef, params)
        hidden = model(batch["tokens"], batch["positions"], batch["segment_ids"])
        output = losses.fused_weighted_nll(
            hidden,
            model.unembed,
            batch["labels"],
            batch["mask"],
            weighting=losses.RankTuner(base="one"),
            axis_name="devices",
        )
        return output.total, output

    def step(params: nnx.State, opt_state: optax.OptState, batch: dict[str, jax.Array]) -> tuple:
        grads, output = jax.grad(loss_fn, has_aux=True)(params, batch)
        grads, output = jax.lax.psum(grads, "devices"), output.psum("devices")
        grads = jax.tree.map(lambda grad: grad / output.denom, grads)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, output.mean()

    everywhere = jax.pmap(step, axis_name="devices")
    state = jax.tree.map(lambda x: np.stack([x] * 8), (params, tx.init(params)))
    log = []
    for batch in PACKED:
        cut = {name: value.reshape(8, -1, *value.shape[1:]) for name, value in batch.items()}
        *state, loss = everywhere(*state, cut)
        log.append(float(loss[0]))
    assert_same(one_device, Run(log, by_name(jax.tree.map(lambda x: x[0], state[0]))))


@pytest.mark.parametrize("name", ["adafactor", "lion", "muon"])
def test_twenty_steps_are_the_same_with_every_optimizer(name: str, run: Callable[..., Run]) -> None:
    options = {"min_dim_size_to_factor": 8} if name == "adafactor" else {}
    optimizer = OptimizerConfig(name=name, options=options, learning_rate=1e-3)
    one = run(optimizer=optimizer)
    assert one.losses[-1] < one.losses[0] - 0.5
    assert_same(one, run(optimizer=optimizer, data=2, fsdp=4))
    divided = run(optimizer=optimizer, data=2, fsdp=2, tensor=2)
    if name == "adafactor":
        assert_same(one, divided, PADDED_ADAFACTOR, PADDED_ADAFACTOR)
    else:
        assert_same(one, divided)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("bfloat16", "bfloat16")], ids=str)
def test_bfloat16_stays_near_float32(
    dtypes: tuple[str, str], run: Callable[..., Run], one_device: Run
) -> None:
    compute, param = dtypes
    near = run(PACKED[:5], compute_dtype=compute, param_dtype=param, data=4, fsdp=2)
    np.testing.assert_allclose(near.losses, one_device.losses[:5], **BF16_RUN_LOSS)
    assert near.losses != one_device.losses[:5]
    assert {str(value.dtype) for value in near.params.values()} == {param}


def test_each_of_eight_devices_holds_an_eighth_of_the_state(folder: pathlib.Path) -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    model = models.load_pretrained(folder, mesh=mesh)
    state = init_state(model, make_optimizer(OPTIMIZER, STEPS), mesh)
    leaves = jax.tree.leaves((state.params, state.opt_state))
    cut = [leaf for leaf in leaves if "fsdp" in leaf.sharding.spec]
    for device in jax.devices():
        shards = [shard for leaf in cut for shard in leaf.addressable_shards]
        here = sum(shard.data.nbytes for shard in shards if shard.device == device)
        assert here == sum(leaf.nbytes for leaf in cut) / 8
    # Vectors are too small to be cut.
    assert sum(leaf.nbytes for leaf in cut) > 0.95 * sum(leaf.nbytes for leaf in leaves)
