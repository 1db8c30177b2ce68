"""Learning-rate schedules, weight decay, and the train state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ranktuner_jax import models
from ranktuner_jax.errors import UserError
from ranktuner_jax.train import (
    OPTIMIZERS,
    MeshConfig,
    OptimizerConfig,
    init_state,
    make_mesh,
    make_optimizer,
    make_schedule,
)


@pytest.mark.parametrize(
    ("schedule", "halfway", "end"), [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("constant", 1, 1)]
)
def test_the_learning_rate_follows_the_chosen_schedule(
    schedule: str, halfway: float, end: float
) -> None:
    config = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_ratio=0.1)
    rate = make_schedule(config, steps=100)
    np.testing.assert_allclose(
        [float(rate(i)) for i in range(10)], np.linspace(0.2, 2.0, 10), rtol=1e-6
    )
    np.testing.assert_allclose(float(rate(55)), 2.0 * halfway, rtol=1e-6)
    np.testing.assert_allclose(float(rate(100)), 2.0 * end, atol=1e-6)


def test_wsd_warms_up_stays_constant_and_decays_to_zero() -> None:
    config = OptimizerConfig(learning_rate=2.0, schedule="wsd", warmup_ratio=0.1, decay_ratio=0.25)
    rate = make_schedule(config, steps=20)
    by_hand = [1.0, 2.0] + [2.0] * 13 + [2.0, 1.6, 1.2, 0.8, 0.4] + [0.0]
    np.testing.assert_allclose([float(rate(step)) for step in range(21)], by_hand, atol=1e-6)


def test_warmup_and_decay_longer_than_the_run_are_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer\.decay_ratio: expected at most .*, got 0\.6"):
        OptimizerConfig(schedule="wsd", warmup_ratio=0.5, decay_ratio=0.6)
    OptimizerConfig(schedule="cosine", warmup_ratio=0.5, decay_ratio=0.6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.1), (1, 0.9), (10, 0.1), (10, 0.0)])
def test_short_runs_have_a_rate_above_zero_at_every_step(
    steps: int, warmup: float, schedule: str
) -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_ratio=warmup)
    rate = make_schedule(config, steps)
    assert all(0 < float(rate(step)) <= 1 for step in range(steps))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_norms_and_biases_are_not_decayed(name: str) -> None:
    config = OptimizerConfig(name, learning_rate=1.0, warmup_ratio=0.0, weight_decay=0.5)
    tx = make_optimizer(config, steps=10)
    params = {name: jnp.ones((2, 2)) for name in ("embed", "q_bias", "mlp_norm")}
    params["q"] = jnp.ones((1, 2, 2, 2))
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(still, tx.init(params), params)
    assert {name: float(u.max()) for name, u in updates.items()} == {
        "embed": -0.5,
        "q": -0.5,
        "q_bias": 0.0,
        "mlp_norm": 0.0,
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_does_not_clip(name: str) -> None:
    params = {"w": jnp.ones(2), "q": jnp.ones((1, 2, 2, 2))}
    large = jax.tree.map(lambda x: 1e3 * x, params)
    clipping, free = (
        make_optimizer(OptimizerConfig(name, clip_norm=clip), 10) for clip in (1.0, 0.0)
    )
    states = [tx.update(large, tx.init(params), params)[1] for tx in (clipping, free)]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_a_state_gives_the_model_and_its_outputs() -> None:
    config = models.DecoderConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
    )
    model = models.Decoder(config, rngs=nnx.Rngs(0))
    tokens = jnp.arange(4)[None]
    expected = np.asarray(model(tokens))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = init_state(model, make_optimizer(OptimizerConfig(), 10), mesh)
    np.testing.assert_array_equal(state.model()(tokens), expected)
    np.testing.assert_array_equal(state.apply_fn(state.params, tokens), expected)
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    np.testing.assert_array_equal(state.model(zeros)(tokens), 0 * expected)
    assert jax.jit(lambda state: state.model()(tokens))(state).shape == expected.shape
