"""A run's checkpoints: state, data position and config, saved while training goes on."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.training.train_state import TrainState
from jax.experimental import multihost_utils

from ranktuner_jax.errors import RunError, UserError
from ranktuner_jax.train.config import CheckpointConfig, TrainConfig, differences, to_dict

if TYPE_CHECKING:
    from jaxtyping import Array, Shaped, UInt32

__all__ = ["Checkpoints", "Restored", "claim_workdir"]

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "ranktuner-jax")
# What is compressed and written at once: without a limit it is all of the state.
_WRITE_GIGABYTES = 0.25

# Keys of the config that say on which devices a run computes, what it shows and keeps and when it
# gives up, not what it computes: an interrupted run may go on with others.
_FREE = (
    *("mesh.", "checkpoint.", "telemetry.", "train.log_every:", "train.profile_steps:"),
    *("train.on_nonfinite:", "train.nonfinite_limit:"),
)


def claim_workdir(workdir: epath.PathLike, config: TrainConfig) -> Callable[[], None]:
    """Makes the folder of a run, and refuses one that holds a run with another config.

    What says where it computes and what it keeps may differ: `mesh`, `checkpoint` and the like.
    Nothing is written into the folder yet, so that a mistake that shows up later leaves it free.

    Args:
      workdir: The folder.
      config: The run's config.

    Returns:
      A function that writes config.json: from then on the folder belongs to the run.

    Raises:
      UserError: If the folder cannot be written, or holds a run with another config.
    """
    workdir = epath.Path(workdir)
    path = workdir / "config.json"
    probe = workdir / f".probe-{jax.process_index()}"
    mine = to_dict(config)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
        found = _differences(json.loads(path.read_text()), mine) if path.exists() else []
    except OSError as error:
        raise UserError(
            f"--workdir: expected a folder that can be written, got {workdir}: {error.strerror}"
        ) from error
    except ValueError as error:
        raise UserError(f"--workdir: expected a config in {path}, got {error}") from error
    if found:
        raise UserError(
            f"--workdir: {workdir} holds a run with another config ({'; '.join(found)}); "
            "take another folder, or the same config"
        )

    def claim() -> None:
        if jax.process_index() == 0:
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(mine, indent=2) + "\n")
            partial.replace(path)

    return claim


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held.

    Attributes:
      state: The state.
      data: The data position.
      step: Which step's checkpoint it was.
      notes: What there is to say of it, a line each: broken ones that were passed over, packages
        that have another version now.
    """

    state: TrainState
    data: dict[str, Any]
    step: int
    notes: list[str]


class Checkpoints:
    """Saves without blocking, keeps the newest and every n-th, restores the newest that is whole.

    A checkpoint is whole if all of it can be read and every array has the checksum that it had in
    the memory of the devices when it was saved. The files alone do not tell: Orbax reads an array
    with flipped bits without a word.

    Args:
      workdir: The folder of the run; checkpoints lie in its `checkpoints`.
      config: When to save and what to keep.
      run: The config of the run, saved with each checkpoint.
      params: The parameters, or their shapes and shardings: no array of the state is larger.
      read_only: Whether the folder is left as it is: it may belong to a run that goes on.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        config: CheckpointConfig,
        run: Mapping[str, Any],
        params: Any,
        read_only: bool = False,
    ) -> None:
        self.folder = _absolute(epath.Path(workdir)) / "checkpoints"
        self._run = {"config": run, "versions": _versions()}
        # Orbax refuses an array that is larger than the limit.
        largest = max(map(_shard_bytes, jax.tree.leaves(params)))
        gigabytes = max(_WRITE_GIGABYTES, 1.01e-9 * largest)
        self._handlers = {
            "state": ocp.StandardCheckpointHandler(save_concurrent_gb=gigabytes),
            "data": ocp.JsonCheckpointHandler(),
            "run": ocp.JsonCheckpointHandler(),
        }
        self._read_only, self._saving = read_only, 0
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_is_no_traceback)
        self._manager = _Manager(
            self.folder,
            item_handlers=self._handlers,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep_last,
                keep_period=config.keep_every or None,
                enable_async_checkpointing=config.asynchronous,
                read_only=read_only,
            ),
        )

    def save(self, step: int, state: TrainState, data: Mapping[str, Any]) -> None:
        """Starts to save; the arrays are copied before it returns, so that they may be donated.

        Raises:
          RunError: If this checkpoint, or the one before it, cannot be written.
        """
        if step == self._manager.latest_step():
            return
        self.wait()  # What goes wrong there is not this checkpoint's.
        self._saving = step
        arrays = _arrays(state)
        run = {**self._run, "arrays": _checksums(arrays)}
        with self._told():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(arrays),
                    data=ocp.args.JsonSave(dict(data)),
                    run=ocp.args.JsonSave({**run, "checksum": _checksum(run, data)}),
                ),
                force=True,
            )

    @property
    def steps(self) -> list[int]:
        """The steps whose checkpoint was completed, in order."""
        return sorted(self._manager.all_steps())

    def restore(self, state: TrainState, step: int | None = None) -> Restored:
        """The newest checkpoint that is whole.

        Broken ones that are newer are moved to the workdir's `broken`, once a whole one is found:
        the run will save the same steps again.

        Args:
          state: A state with the structure and the shardings to restore into. Its arrays are
            deleted first: two states need not fit into memory.
          step: Which of `steps`; without it, the newest that is whole.

        Raises:
          UserError: If no checkpoint is whole, or it is one of a run with another config.
        """
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, _arrays(state))
        jax.tree.map(lambda array: array.delete(), _arrays(state))
        broken: dict[int, str] = {}
        for candidate in [step] if step is not None else reversed(self.steps):
            saved, problem = self._read(candidate, shapes)
            if saved is None:
                broken[candidate] = problem
                continue
            if found := _differences(saved["run"]["config"], self._run["config"]):
                raise UserError(
                    f"--workdir: {self.path(candidate)} is the checkpoint of a run with another "
                    f"config ({'; '.join(found)}); take another folder, or the same config"
                )
            notes = [
                f"checkpoint {older} is broken ({why}); going on from checkpoint {candidate}"
                for older, why in broken.items()
            ]
            if broken and not self._read_only:
                notes.append(f"what is broken is now in {self._set_aside(list(broken))}")
            if then := _differences(saved["run"]["versions"], self._run["versions"]):
                notes.append(
                    f"checkpoint {candidate} was written with other versions ({'; '.join(then)}): "
                    "the numbers may differ in their last digits"
                )
            return Restored(state.replace(**saved["state"]), saved["data"], candidate, notes)
        raise UserError(
            f"no checkpoint in {self.folder} is whole ("
            + "; ".join(f"{step}: {why}" for step, why in broken.items())
            + "); put a whole one there, or start anew in another --workdir"
        )

    def path(self, step: int) -> epath.Path:
        """The folder of a step's checkpoint."""
        return self.folder / str(step)

    def wait(self) -> None:
        """Returns once everything that `save` started is on disk.

        Raises:
          RunError: If it cannot be written.
        """
        with self._told():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits as `wait` does, then frees the threads."""
        with self._told():
            self._manager.close()

    def _read(self, step: int, shapes: Any) -> tuple[dict[str, Any] | None, str]:
        """What a checkpoint holds, or else what is wrong with it; the same in every process."""
        saved: dict[str, Any] | None = None
        try:
            # Not the manager's restore: it ends in a collective, which a process that could not
            # read its share would never join.
            saved = {
                name: self._handlers[name].restore(self.path(step) / name, args=args)
                for name, args in {
                    "run": ocp.args.JsonRestore(),
                    "data": ocp.args.JsonRestore(),
                    "state": ocp.args.StandardRestore(shapes),
                }.items()
            }
            stored = saved["run"].pop("checksum")
            problem = "" if stored == _checksum(saved["run"], saved["data"]) else "run or data"
        except Exception as error:  # Orbax and TensorStore raise whatever comes up.
            problem = _one_line(error)
        problem = _first_problem(problem)
        if not problem and saved is not None:
            now = _checksums(saved["state"])
            changed = [name for name, value in saved["run"]["arrays"].items() if now[name] != value]
            problem = f"{changed[0]} is not what was saved" if changed else ""
        return (None, problem) if problem else (saved, "")

    def _set_aside(self, steps: list[int]) -> epath.Path:
        """Moves checkpoints where no save of the same step meets them."""
        place = self.folder.parent / "broken"
        if jax.process_index() == 0:
            place.mkdir(exist_ok=True)
            for step in steps:
                if (place / str(step)).exists():
                    (place / str(step)).rmtree()
                self.path(step).rename(place / str(step))
        multihost_utils.sync_global_devices("broken checkpoints are set aside")
        self._manager.reload()
        return place

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Says in one line what went wrong while a checkpoint was written."""
        try:
            yield
        except Exception as error:
            raise RunError(
                f"the checkpoint of step {self._saving} could not be written to {self.folder}: "
                f"{_one_line(error)}; older ones are whole, the same command goes on from there"
            ) from error


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never: the loop asks, and an answer belongs to the step that asked last.

        Orbax asks again from its threads, for steps that are over.
        """
        return False


def _is_no_traceback(record: logging.LogRecord) -> bool:
    """What Orbax's threads and tasks raise is raised here too, and said in one line."""
    return record.exc_info is None


def _arrays(state: TrainState) -> dict[str, Any]:
    """What of a state is saved: its arrays, not its functions."""
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _checksums(arrays: Any) -> dict[str, int]:
    """A checksum of each array by its name: of its bits alone, however it is sharded."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
    }
    return {name: int(value) for name, value in jax.device_get(_sum_bits(leaves)).items()}


@jax.jit
def _sum_bits(leaves: dict[str, Shaped[Array, "..."]]) -> dict[str, UInt32[Array, ""]]:
    def sum_bits(array: Shaped[Array, "..."]) -> UInt32[Array, ""]:
        bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
        # Every element has an odd factor of its own: modulo 2^32 a change of one always shows,
        # and so do elements that changed places.
        factor = jnp.ones(array.shape, jnp.uint32)
        for axis in range(array.ndim):
            index = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
            factor += index * np.uint32(2 * pow(2654435761, axis + 1, 2**31))
        return jnp.sum(bits.astype(jnp.uint32) * factor, dtype=jnp.uint32)

    return jax.tree.map(sum_bits, leaves)


def _checksum(run: Mapping[str, Any], data: Mapping[str, Any]) -> int:
    """A checksum of what is saved as JSON."""
    return zlib.crc32(json.dumps([run, data], sort_keys=True).encode())


def _first_problem(problem: str) -> str:
    """What the first process that has a problem says, in every process; "" if none has."""
    text = np.zeros(400, np.uint8)
    encoded = np.frombuffer(problem.encode()[: text.size], np.uint8)
    text[: encoded.size] = encoded
    everywhere = multihost_utils.process_allgather(text).reshape(-1, text.size)
    said = (bytes(line).rstrip(b"\0").decode(errors="ignore") for line in everywhere)
    return next(filter(None, said), "")


def _one_line(error: BaseException) -> str:
    """An error in one line, without the specification of the array that TensorStore appends."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    # "[tensorstore_spec=..." and "[source locations=..." are pages of JSON.
    text = re.split(r" \[(?:tensorstore_spec|source locations)=", lines[0])[0]
    # Long paths stand in the middle; the reason is at the end.
    text = text if len(text) <= 200 else f"{text[:80]} ... {text[-115:]}"
    return f"{type(error).__name__}: {text}"


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Those that an interrupted run may not go on with."""
    return [line for line in differences(old, new) if not line.startswith(_FREE)]


def _absolute(path: epath.Path) -> epath.Path:
    """Orbax takes no other; epath's own `absolute` spoils gs://."""
    return path if path.is_absolute() else path.absolute()


def _shard_bytes(array: jax.Array | jax.ShapeDtypeStruct) -> int:
    """The bytes that one device holds of an array."""
    shape = array.sharding.shard_shape(array.shape) if array.sharding else array.shape
    # Moments and accumulators are never wider than float32.
    return math.prod(shape) * max(4, array.dtype.itemsize)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
