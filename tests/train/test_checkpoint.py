"""Checkpoints: what is saved, what is kept, whose folder it is."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from ranktuner_jax.errors import UserError
from ranktuner_jax.train import (
    CheckpointConfig,
    Checkpoints,
    TrainConfig,
    checkpoint,
    claim_workdir,
)


def make_state(value: float) -> TrainState:
    # The last parameter exists to show that its type survives.
    params = {"w": jnp.full((3, 2), value), "b": jnp.full(2, value, jnp.bfloat16)}
    state = TrainState.create(apply_fn=lambda params: params, params=params, tx=optax.adam(1e-3))
    return state.replace(step=jnp.asarray(int(value), jnp.int32))


PARAMS = make_state(0.0).params


def test_a_state_comes_back_with_its_data_position(tmp_path: pathlib.Path) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), run={"seed": 7}, params=PARAMS)
    checkpoints.save(3, make_state(3.0), {"next_row": 48})
    checkpoints.wait()
    checkpoints.close()

    again = Checkpoints(tmp_path, CheckpointConfig(), run={"seed": 7}, params=PARAMS)
    assert again.steps == [3]
    fresh = make_state(0.0)
    restored, position = again.restore(fresh, 3)
    again.close()
    assert position == {"next_row": 48}
    assert fresh.params["w"].is_deleted()
    expected = make_state(3.0)
    assert jax.tree.structure(restored.opt_state) == jax.tree.structure(expected.opt_state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    saved = json.loads((again.path(3) / "run" / "metadata").read_text())
    assert saved["config"] == {"seed": 7}
    assert saved["versions"]["jax"] == jax.__version__


def test_what_is_saved_is_the_state_at_that_moment(tmp_path: pathlib.Path) -> None:
    # Large enough that writing is still under way while the donated buffers are filled anew.
    overwrite = jax.jit(lambda params: jax.tree.map(jnp.negative, params), donate_argnums=0)
    state = make_state(3.0).replace(params={"w": jnp.full((1 << 22,), 3.0)})
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), run={}, params=state.params)
    checkpoints.save(3, state, {})
    changed = overwrite(state.params)
    for _ in range(3):
        changed = overwrite(changed)
    checkpoints.wait()
    restored, _ = checkpoints.restore(state.replace(params=changed), 3)
    checkpoints.close()
    np.testing.assert_array_equal(np.asarray(restored.params["w"]), np.full(1 << 22, 3.0))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_array_larger_than_what_is_written_at_once_is_saved(
    asynchronous: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_WRITE_GIGABYTES", 1e-9)
    state, config = make_state(3.0), CheckpointConfig(asynchronous=asynchronous)
    checkpoints = Checkpoints(tmp_path, config, run={}, params=state.params)
    checkpoints.save(3, state, {})
    checkpoints.wait()
    restored, _ = checkpoints.restore(make_state(0.0), 3)
    checkpoints.close()
    np.testing.assert_array_equal(np.asarray(restored.params["w"]), np.asarray(state.params["w"]))


def test_the_newest_and_every_nth_are_kept(tmp_path: pathlib.Path) -> None:
    config = CheckpointConfig(keep_last=2, keep_every=4)
    checkpoints = Checkpoints(tmp_path, config, run={}, params=PARAMS)
    for step in range(1, 8):
        checkpoints.save(step, make_state(float(step)), {"next_row": step})
        checkpoints.save(step, make_state(0.0), {"next_row": 0})  # Saved already.
        checkpoints.wait()
    assert checkpoints.steps == [4, 6, 7]
    checkpoints.close()


def test_a_workdir_is_claimed_late_and_refuses_another_config(tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "runs" / "x"
    claim_workdir(workdir, TrainConfig(seed=1))
    claim = claim_workdir(workdir, TrainConfig(seed=2))
    assert list(workdir.iterdir()) == []
    claim()
    claim_workdir(workdir, TrainConfig(seed=2))
    with pytest.raises(UserError, match=r"another config \(seed: 2, now 3\); take another"):
        claim_workdir(workdir, TrainConfig(seed=3))
    assert json.loads((workdir / "config.json").read_text())["seed"] == 2


def test_a_workdir_that_cannot_be_written_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir: expected a folder that can be written, got"):
        claim_workdir(tmp_path / "file" / "run", TrainConfig())


def test_a_workdir_with_a_torn_config_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="--workdir: expected a config in"):
        claim_workdir(tmp_path, TrainConfig())
