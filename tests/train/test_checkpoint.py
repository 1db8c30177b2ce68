"""Checkpoints: what is saved, what is kept, whose folder it is."""

import importlib.metadata
import json
import logging
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec

from ranktuner_jax.errors import RunError, UserError
from ranktuner_jax.train import (
    CheckpointConfig,
    Checkpoints,
    MeshConfig,
    TrainConfig,
    checkpoint,
    claim_workdir,
    make_mesh,
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
    found = again.restore(fresh)
    again.close()
    assert (found.step, found.data, found.notes) == (3, {"next_row": 48}, [])
    restored = found.state
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
    restored = checkpoints.restore(state.replace(params=changed)).state
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
    restored = checkpoints.restore(make_state(0.0)).state
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


def test_a_run_may_go_on_with_another_mesh_and_other_checkpoints(tmp_path: pathlib.Path) -> None:
    claim_workdir(tmp_path, TrainConfig())()
    mesh, kept = MeshConfig(data=2, fsdp=4), CheckpointConfig(every_steps=9)
    claim_workdir(tmp_path, TrainConfig(mesh=mesh, checkpoint=kept))()
    assert json.loads((tmp_path / "config.json").read_text())["mesh"]["fsdp"] == 4


def truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def overwrite(path: pathlib.Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


DAMAGE = [
    *((how, "state/ocdbt.process_0/d/*") for how in (truncate, flip_a_bit, overwrite, os.remove)),
    *((how, "data/metadata") for how in (truncate, flip_a_bit, overwrite, os.remove)),
    *((how, "run/metadata") for how in (truncate, flip_a_bit, overwrite, os.remove)),
    *((how, "state/d/*") for how in (truncate, overwrite, os.remove)),
    *((how, "state/_METADATA") for how in (truncate, overwrite, os.remove)),
    (os.remove, "state/manifest.ocdbt"),
    (shutil.rmtree, "state"),
    (shutil.rmtree, "data"),
]


def random_state(seed: int) -> TrainState:
    """Arrays that do not compress to nothing, so that bytes of them can be damaged."""
    state = make_state(float(seed))
    values = jax.random.normal(jax.random.key(seed), (64, 32))
    return state.replace(params={"w": values, "b": jnp.ones(2, jnp.bfloat16)})


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A workdir with the whole checkpoints 2 and 4."""
    workdir = tmp_path_factory.mktemp("two")
    checkpoints = Checkpoints(workdir, CheckpointConfig(), {"seed": 7}, random_state(0).params)
    for step in (2, 4):
        checkpoints.save(step, random_state(step), {"next_row": 8 * step})
    checkpoints.close()
    return workdir


def reopen(workdir: pathlib.Path, seed: int = 7, read_only: bool = False) -> Checkpoints:
    return Checkpoints(workdir, CheckpointConfig(), {"seed": seed}, PARAMS, read_only)


def assert_equal(a: TrainState, b: TrainState) -> None:
    for ours, theirs in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize(("how", "where"), DAMAGE)
def test_a_broken_checkpoint_is_set_aside_for_the_one_before(
    how: Callable[[pathlib.Path], None],
    where: str,
    two_saved: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(two_saved, workdir)
    broken = workdir / "checkpoints" / "4"
    # The largest file holds the arrays; the others are copies of metadata that nothing reads.
    how(max(broken.glob(where), key=lambda path: path.stat().st_size))
    before = {path.name: path.read_bytes() for path in broken.rglob("*") if path.is_file()}

    checkpoints = reopen(workdir)
    assert checkpoints.steps == [2, 4]
    found = checkpoints.restore(random_state(0))
    assert_equal(found.state, random_state(2))
    assert (found.step, found.data) == (2, {"next_row": 16})
    assert re.fullmatch(
        r"checkpoint 4 is broken \(.+\); going on from checkpoint 2", found.notes[0]
    )
    aside = workdir / "broken" / "4"
    assert found.notes[1:] == [f"what is broken is now in {aside.parent}"]
    kept = {path.name: path.read_bytes() for path in aside.rglob("*") if path.is_file()}
    assert kept == before
    assert checkpoints.steps == [2]

    # The run comes to the same step again.
    checkpoints.save(4, random_state(4), {"next_row": 32})
    checkpoints.close()
    again = reopen(workdir)
    found = again.restore(random_state(0))
    again.close()
    assert_equal(found.state, random_state(4))
    assert (found.step, found.notes) == (4, [])


def test_the_line_says_what_is_broken(two_saved: pathlib.Path, tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(two_saved, workdir)
    flip_a_bit(
        max(workdir.glob(f"checkpoints/4/{DAMAGE[0][1]}"), key=lambda path: path.stat().st_size)
    )
    checkpoints = reopen(workdir, read_only=True)
    note = checkpoints.restore(random_state(0)).notes[0]
    assert "(params.w is not what was saved)" in note
    with pytest.raises(UserError, match=r"4: params\.w is not what was saved"):
        checkpoints.restore(random_state(0), 4)
    checkpoints.close()
    assert not (workdir / "broken").exists()
    assert (workdir / "checkpoints" / "4").exists()


def test_no_whole_checkpoint_is_an_error_and_nothing_is_touched(
    two_saved: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(two_saved, workdir)
    for path in workdir.glob("checkpoints/*/data/metadata"):
        path.unlink()
    checkpoints = reopen(workdir)
    with pytest.raises(UserError, match=r"no checkpoint .* is whole \(4: .*; 2: .*another") as e:
        checkpoints.restore(random_state(0))
    checkpoints.close()
    assert "\n" not in str(e.value)
    assert [path.name for path in workdir.iterdir()] == ["checkpoints"]
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"2", "4"}


def test_a_checkpoint_of_another_config_is_refused(two_saved: pathlib.Path) -> None:
    checkpoints = reopen(two_saved, seed=8)
    with pytest.raises(UserError, match=r"another config \(seed: 7, now 8\)"):
        checkpoints.restore(random_state(0))
    checkpoints.close()


def test_other_versions_are_said(two_saved: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_versions", lambda: {"jax": "9.9"})
    checkpoints = reopen(two_saved)
    notes = checkpoints.restore(random_state(0)).notes
    checkpoints.close()
    assert len(notes) == 1
    assert (
        f"other versions (flax: '{importlib.metadata.version('flax')}', now 'absent'; jax: "
        in notes[0]
    )


def loggers() -> list[logging.Logger]:
    return [logging.getLogger(name) for name in ("absl", "asyncio")]


def test_other_tracebacks_are_logged_while_a_run_saves(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), run={}, params=PARAMS)
    for logger in loggers():
        try:
            raise ValueError(f"the user's, to {logger.name}")
        except ValueError:
            logger.exception("of the user")
    checkpoints.close()
    assert "ValueError: the user's, to absl" in caplog.text
    assert "ValueError: the user's, to asyncio" in caplog.text


def test_reading_only_is_nothing_to_warn_of(
    two_saved: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.clear()
    config = CheckpointConfig()
    Checkpoints(two_saved, config, run={}, params=PARAMS, read_only=True).close()
    assert "read" not in caplog.text


@pytest.mark.parametrize("end", ["close", "close that raises", "no start"])
def test_once_closed_nothing_is_kept_out_of_the_log(end: str, tmp_path: pathlib.Path) -> None:
    before = [list(logger.filters) for logger in loggers()]
    if end == "no start":
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="Not a directory"):
            Checkpoints(tmp_path / "file", CheckpointConfig(), run={}, params=PARAMS)
    else:
        checkpoints = Checkpoints(tmp_path, CheckpointConfig(), run={}, params=PARAMS)
        assert [logger.filters for logger in loggers()] != before
        other = Checkpoints(tmp_path / "other", CheckpointConfig(), run={}, params=PARAMS)
        other.close()
        assert [logger.filters for logger in loggers()] != before
        if end == "close that raises":
            # Where the checkpoint is to be committed there is a file.
            checkpoints.save(3, make_state(3.0), {})
            (tmp_path / "checkpoints" / "3").write_text("")
            with pytest.raises(RunError, match="step 3 could not be written"):
                checkpoints.close()
        else:
            checkpoints.close()
    assert [logger.filters for logger in loggers()] == before


MESHES = {
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8, "data": 1},
    "tensor 8": {"tensor": 8, "data": 1},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
    "1 device": {"data": 1},
}


def on_mesh(state: TrainState, sizes: dict[str, int]) -> TrainState:
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])

    def place(leaf: jax.Array) -> jax.Array:
        spec = PartitionSpec(("data", "fsdp"), "tensor") if leaf.shape == (64, 32) else None
        sharding = NamedSharding(mesh, spec or PartitionSpec())
        return jax.device_put(np.asarray(leaf), sharding)

    return jax.tree.map(place, state)


def test_the_values_are_the_same_on_any_mesh(tmp_path: pathlib.Path) -> None:
    expected = random_state(3)
    config = CheckpointConfig(keep_last=9)
    for number, sizes in enumerate(MESHES.values(), 1):
        checkpoints = Checkpoints(tmp_path, config, {}, PARAMS)
        state = on_mesh(random_state(0), sizes)
        wanted = [leaf.sharding for leaf in jax.tree.leaves(state)]
        if number == 1:
            state = on_mesh(expected, sizes)
        else:
            found = checkpoints.restore(state)
            assert (found.step, found.notes) == (number - 1, [])
            state = found.state
        checkpoints.save(number, state, {})
        checkpoints.close()
        assert_equal(state, expected)
        assert [leaf.sharding for leaf in jax.tree.leaves(state)] == wanted


def shapes_on(sizes: dict[str, int]) -> dict[str, jax.ShapeDtypeStruct]:
    params = on_mesh(random_state(0), sizes).params
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in params.items()
    }


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_parameters_come_back_alone_on_any_mesh(
    sizes: dict[str, int], two_saved: pathlib.Path
) -> None:
    checkpoints = reopen(two_saved, read_only=True)
    shapes = shapes_on(sizes)
    found = checkpoints.restore_params(shapes)
    checkpoints.close()
    assert (found.step, found.data, found.notes) == (4, {"next_row": 32}, [])
    expected = random_state(4).params
    assert found.state.keys() == expected.keys()
    for name, leaf in found.state.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected[name]))
        assert (leaf.dtype, leaf.sharding) == (expected[name].dtype, shapes[name].sharding)


def test_parameters_are_checked_and_a_broken_checkpoint_is_passed_over(
    two_saved: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(two_saved, workdir)
    flip_a_bit(
        max(workdir.glob(f"checkpoints/4/{DAMAGE[0][1]}"), key=lambda path: path.stat().st_size)
    )
    checkpoints = reopen(workdir, read_only=True)
    found = checkpoints.restore_params(shapes_on(MESHES["1 device"]))
    assert found.step == 2
    assert (
        "4 is broken (params.w is not what was saved); going on from checkpoint 2"
        in (found.notes[0])
    )
    np.testing.assert_array_equal(np.asarray(found.state["w"]), random_state(2).params["w"])
    with pytest.raises(UserError, match=r"4: params\.w is not what was saved"):
        checkpoints.restore_params(shapes_on(MESHES["1 device"]), 4)
    checkpoints.close()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"more": (2, 2)}, r"params\.more is not both in it and in the model"),
        ({"b": None}, r"params\.b is not both in it and in the model"),
        ({"w": (64, 16)}, r"shape: \(64, 16\) is not compatible with the stored shape"),
        ({"w": (64, 64)}, r"shape: \(64, 64\) is not compatible with the stored shape"),
    ],
)
def test_parameters_of_another_model_are_refused(
    change: dict[str, tuple[int, ...] | None], said: str, two_saved: pathlib.Path
) -> None:
    shapes = shapes_on(MESHES["1 device"])
    for name, shape in change.items():
        old = shapes.pop(name, shapes["w"])
        if shape is not None:
            shapes[name] = jax.ShapeDtypeStruct(shape, old.dtype, sharding=old.sharding)
    checkpoints = reopen(two_saved, read_only=True)
    with pytest.raises(UserError, match=said):
        checkpoints.restore_params(shapes)
    checkpoints.close()


def test_elements_that_changed_places_change_the_checksum() -> None:
    rows = jnp.arange(12.0).reshape(3, 4)
    changed = [rows[::-1], rows[:, ::-1], rows.reshape(4, 3).T, rows.at[2, 3].add(1e-6)]
    sums = [checkpoint._checksums({"w": array})["w"] for array in (rows, *changed)]
    assert len(set(sums)) == 5
