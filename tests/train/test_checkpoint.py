"""Checkpoints: what is saved and kept, which are restored, and which workdirs are accepted."""

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
from jax.sharding import NamedSharding, PartitionSpec

from ranktuner_jax.errors import RunError, UserError
from ranktuner_jax.train import (
    CheckpointConfig,
    Checkpoints,
    MeshConfig,
    TrainConfig,
    TrainState,
    make_mesh,
)
from ranktuner_jax.train.saving.checksums import checksums
from ranktuner_jax.train.saving.workdir import claim_workdir


def make_state(value: float) -> TrainState:
    # A second dtype, to be restored as it was.
    params = {"w": jnp.full((3, 2), value), "b": jnp.full(2, value, jnp.bfloat16)}
    # Neither apply_fn nor graphdef is saved.
    state = TrainState.create(
        apply_fn=lambda params: params, params=params, tx=optax.adam(1e-3), graphdef=None
    )
    return state.replace(step=jnp.asarray(int(value), jnp.int32))


PARAMS = make_state(0.0).params


def test_a_state_is_restored_with_its_data_position(tmp_path: pathlib.Path) -> None:
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
    structures = {jax.tree.structure(state.opt_state) for state in (restored, expected)}
    assert len(structures) == 1
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    saved = json.loads((again.path(3) / "run" / "metadata").read_text())
    assert saved["config"] == {"seed": 7}
    assert saved["versions"]["jax"] == jax.__version__


def test_a_checkpoint_holds_the_state_at_the_time_of_the_save(tmp_path: pathlib.Path) -> None:
    # Large enough that the donated buffers are overwritten while the save is still writing.
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
def test_an_array_larger_than_the_write_limit_is_saved(
    asynchronous: bool, tmp_path: pathlib.Path
) -> None:
    state, config = make_state(3.0), CheckpointConfig(asynchronous=asynchronous)
    checkpoints = Checkpoints(tmp_path, config, run={}, params=state.params, write_gigabytes=1e-9)
    checkpoints.save(3, state, {})
    checkpoints.wait()
    restored = checkpoints.restore(make_state(0.0)).state
    checkpoints.close()
    np.testing.assert_array_equal(np.asarray(restored.params["w"]), np.asarray(state.params["w"]))


def test_the_newest_and_every_nth_checkpoint_are_kept(tmp_path: pathlib.Path) -> None:
    config = CheckpointConfig(keep_last=2, keep_every=4)
    checkpoints = Checkpoints(tmp_path, config, run={}, params=PARAMS)
    for step in range(1, 8):
        checkpoints.save(step, make_state(float(step)), {"next_row": step})
        checkpoints.save(step, make_state(0.0), {"next_row": 0})  # Saved already.
        checkpoints.wait()
    assert checkpoints.steps == [4, 6, 7]
    checkpoints.close()


def test_only_a_claimed_workdir_refuses_another_config(tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "runs" / "x"
    claim_workdir(workdir, TrainConfig(seed=1))
    claim = claim_workdir(workdir, TrainConfig(seed=2))
    assert list(workdir.iterdir()) == []
    claim()
    claim_workdir(workdir, TrainConfig(seed=2))
    with pytest.raises(UserError, match=r"another config \(seed: 2, now 3\); use another"):
        claim_workdir(workdir, TrainConfig(seed=3))
    assert json.loads((workdir / "config.json").read_text())["seed"] == 2


def test_a_workdir_that_cannot_be_written_is_reported(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir: expected a writable folder, got"):
        claim_workdir(tmp_path / "file" / "run", TrainConfig())


def test_a_workdir_with_a_truncated_config_is_reported(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="--workdir: expected the config of a run at"):
        claim_workdir(tmp_path, TrainConfig())


def test_a_run_may_resume_with_another_mesh_and_other_checkpoint_settings(
    tmp_path: pathlib.Path,
) -> None:
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
    """Arrays that do not compress, so that damaged bytes of a file damage their values."""
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
def test_a_broken_checkpoint_is_moved_away_and_the_one_before_is_restored(
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
        r"checkpoint 4 is broken \(.+\); restoring checkpoint 2 instead", found.notes[0]
    )
    aside = workdir / "broken" / "4"
    assert found.notes[1:] == [f"moved broken checkpoints to {aside.parent}"]
    kept = {path.name: path.read_bytes() for path in aside.rglob("*") if path.is_file()}
    assert kept == before
    assert checkpoints.steps == [2]

    # The resumed run saves the same step again.
    checkpoints.save(4, random_state(4), {"next_row": 32})
    checkpoints.close()
    again = reopen(workdir)
    found = again.restore(random_state(0))
    again.close()
    assert_equal(found.state, random_state(4))
    assert (found.step, found.notes) == (4, [])


def test_the_message_names_the_broken_array(
    two_saved: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(two_saved, workdir)
    flip_a_bit(
        max(workdir.glob(f"checkpoints/4/{DAMAGE[0][1]}"), key=lambda path: path.stat().st_size)
    )
    checkpoints = reopen(workdir, read_only=True)
    note = checkpoints.restore(random_state(0)).notes[0]
    assert "(wrong checksum of params.w)" in note
    with pytest.raises(UserError, match=r"4: wrong checksum of params\.w"):
        checkpoints.restore(random_state(0), 4)
    checkpoints.close()
    assert not (workdir / "broken").exists()
    assert (workdir / "checkpoints" / "4").exists()


def test_without_a_whole_checkpoint_restore_fails_and_changes_no_files(
    two_saved: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(two_saved, workdir)
    for path in workdir.glob("checkpoints/*/data/metadata"):
        path.unlink()
    checkpoints = reopen(workdir)
    with pytest.raises(UserError, match=r"no checkpoint .* is intact \(4: .*; 2: .*another") as e:
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


def test_other_package_versions_are_reported(
    two_saved: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name == "flax":
            raise importlib.metadata.PackageNotFoundError(name)
        return "9.9" if name == "jax" else installed(name)

    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", version)
        checkpoints = reopen(two_saved)
    notes = checkpoints.restore(random_state(0)).notes
    checkpoints.close()
    assert len(notes) == 1
    assert (
        f"other versions (flax: '{installed('flax')}', now 'not installed'; jax: "
        f"'{installed('jax')}', now '9.9'): "
    ) in notes[0]


def test_keys_that_are_newer_than_a_checkpoint_are_no_other_config(
    two_saved: pathlib.Path,
) -> None:
    config = {"seed": 7, "hooks": {"patience": 3}}
    checkpoints = Checkpoints(two_saved, CheckpointConfig(), config, PARAMS, read_only=True)
    assert checkpoints.restore(random_state(0)).step == 4
    checkpoints.close()


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


def test_opening_checkpoints_read_only_logs_no_warning(
    two_saved: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.clear()
    config = CheckpointConfig()
    Checkpoints(two_saved, config, run={}, params=PARAMS, read_only=True).close()
    assert "read" not in caplog.text


@pytest.mark.parametrize("end", ["close", "close that raises", "no start"])
def test_log_filters_are_removed_on_close(end: str, tmp_path: pathlib.Path) -> None:
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
            # A file where the finished checkpoint would be renamed to.
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


def test_a_state_is_restored_unchanged_on_any_mesh(tmp_path: pathlib.Path) -> None:
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
def test_parameters_alone_are_restored_on_any_mesh(
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


def test_restore_params_verifies_checksums_and_skips_a_broken_checkpoint(
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
        "4 is broken (wrong checksum of params.w); restoring checkpoint 2 instead"
        in (found.notes[0])
    )
    np.testing.assert_array_equal(np.asarray(found.state["w"]), random_state(2).params["w"])
    with pytest.raises(UserError, match=r"4: wrong checksum of params\.w"):
        checkpoints.restore_params(shapes_on(MESHES["1 device"]), 4)
    checkpoints.close()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"more": (2, 2)}, r"params\.more: 'absent', now 'float32\(2, 2\)'"),
        ({"b": None}, r"params\.b: 'bfloat16\(\d+,\)', now 'absent'"),
        ({"w": (64, 16)}, r"params\.w: 'float32\(\d+, \d+\)', now 'float32\(64, 16\)'"),
        ({"w": (64, 64)}, r"params\.w: 'float32\(\d+, \d+\)', now 'float32\(64, 64\)'"),
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


def test_reordered_elements_change_the_checksum() -> None:
    rows = jnp.arange(12.0).reshape(3, 4)
    changed = [rows[::-1], rows[:, ::-1], rows.reshape(4, 3).T, rows.at[2, 3].add(1e-6)]
    sums = [checksums({"w": array})["w"] for array in (rows, *changed)]
    assert len(set(sums)) == 5
