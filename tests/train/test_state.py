"""The learning rate and what is decayed."""

import jax.numpy as jnp
import numpy as np
import pytest

from ranktuner_jax.train import OptimizerConfig, make_optimizer, make_schedule


@pytest.mark.parametrize(
    ("schedule", "halfway", "end"), [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("constant", 1, 1)]
)
def test_the_rate_rises_and_falls_as_chosen(schedule: str, halfway: float, end: float) -> None:
    config = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_ratio=0.1)
    rate = make_schedule(config, steps=100)
    np.testing.assert_allclose(
        [float(rate(i)) for i in range(10)], np.linspace(0.2, 2.0, 10), rtol=1e-6
    )
    np.testing.assert_allclose(float(rate(55)), 2.0 * halfway, rtol=1e-6)
    np.testing.assert_allclose(float(rate(100)), 2.0 * end, atol=1e-6)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.1), (1, 0.9), (10, 0.1), (10, 0.0)])
def test_short_runs_have_a_rate_above_zero_at_every_step(steps: int, warmup: float) -> None:
    rate = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_ratio=warmup), steps)
    assert all(0 < float(rate(step)) <= 1 for step in range(steps))


def test_norms_and_biases_are_not_decayed() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_ratio=0.0, weight_decay=0.5)
    tx = make_optimizer(config, steps=10)
    params = {name: jnp.ones((2, 2)) for name in ("embed", "q", "q_bias", "mlp_norm")}
    still = {name: jnp.zeros((2, 2)) for name in params}
    updates, _ = tx.update(still, tx.init(params), params)
    assert {name: float(u[0, 0]) for name, u in updates.items()} == {
        "embed": -0.5,
        "q": -0.5,
        "q_bias": 0.0,
        "mlp_norm": 0.0,
    }


def test_clipping_can_be_switched_off() -> None:
    params = {"w": jnp.zeros(2)}
    big = {"w": jnp.array([300.0, 400.0])}
    moments = [
        make_optimizer(OptimizerConfig(clip_norm=clip, b1=0.0), 10).update(
            big, make_optimizer(OptimizerConfig(clip_norm=clip, b1=0.0), 10).init(params), params
        )[1]
        for clip in (1.0, 0.0)
    ]
    np.testing.assert_allclose(moments[0][1][0].mu["w"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(moments[1][0].mu["w"], [300.0, 400.0], rtol=1e-6)
