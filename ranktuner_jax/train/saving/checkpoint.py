"""A run's checkpoints: state, data position and config, saved while training goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import json
import logging
import math
import re
import threading
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

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
# What Orbax logs as warnings where it is asked to change nothing.
_NOTES_ON_READ_ONLY = ("CheckpointManagerOptions.read_only=", "Given directory is read only")
# What is compressed and written at once: without a limit it is all of the state.
_WRITE_GIGABYTES = 0.25
_SECONDS_FOR_THREADS = 30.0

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


State = TypeVar("State")
Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Restored(Generic[State]):
    """What a checkpoint held.

    Attributes:
      state: The state, or the parameters where only they were asked for.
      data: The data position.
      step: Which step's checkpoint it was.
      notes: What there is to say of it, a line each: broken ones that were passed over, packages
        that have another version now.
    """

    state: State
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
        # Reads what the other one saved, in parts if need be.
        self._reader = ocp.PyTreeCheckpointHandler()
        self._read_only, self._saving = read_only, 0
        with contextlib.ExitStack() as stack:
            stack.enter_context(_quiet())
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
            self._until_closed = stack.pop_all()

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

    def restore(self, state: TrainState, step: int | None = None) -> Restored[TrainState]:
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
        found = self._newest([shapes], step)
        return Restored(state.replace(**found.state[0]), found.data, found.step, found.notes)

    def restore_params(self, shapes: State, step: int | None = None) -> Restored[State]:
        """As `restore`, the parameters alone: of the rest of the state nothing is read.

        They are read one by one, the largest first: while an array is read it takes about twice its
        size, of host memory and of the devices'.

        Args:
          shapes: The parameters' `jax.ShapeDtypeStruct`s, with shardings.
          step: Which of `steps`; without it, the newest that is whole.

        Raises:
          UserError: If no checkpoint is whole, or it is one of a run with another config.
        """
        tree = {"params": shapes}
        order = sorted(
            jax.tree_util.tree_leaves_with_path(tree), key=lambda item: item[1].size, reverse=True
        )
        found = self._newest([_alone(*item) for item in order], step, partial=True)
        paths = [path for path, _ in order]
        read = dict(zip(paths, jax.tree.leaves(found.state), strict=True))
        params = jax.tree_util.tree_map_with_path(lambda path, _: read[path], tree)["params"]
        return Restored(params, found.data, found.step, found.notes)

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
        with self._until_closed, self._told():
            self._manager.close()

    def _newest(
        self, parts: Sequence[Any], step: int | None, partial: bool = False
    ) -> Restored[list[Any]]:
        """The newest checkpoint that is whole; its arrays are read in parts, one after another.

        Args:
          parts: Trees of shapes with shardings.
          step: Which of `steps`; without it, the newest that is whole.
          partial: Whether a checkpoint has more than the parts.
        """
        broken: dict[int, str] = {}
        for candidate in [step] if step is not None else reversed(self.steps):
            try:
                saved, arrays = self._read(candidate, parts, partial)
            except _BrokenError as error:
                broken[candidate] = str(error)
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
            return Restored(arrays, saved["data"], candidate, notes)
        raise UserError(
            f"no checkpoint in {self.folder} is whole ("
            + "; ".join(f"{step}: {why}" for step, why in broken.items())
            + "); put a whole one there, or start anew in another --workdir"
        )

    def _read(
        self, step: int, parts: Sequence[Any], partial: bool
    ) -> tuple[dict[str, Any], list[Any]]:
        """What a checkpoint holds: `run` and `data`, and the arrays in parts.

        Raises:
          _BrokenError: In every process, if one of them finds it broken.
        """
        path = self.path(step)

        # Not the manager's restore: it ends in a collective, which a process that could not read
        # its share would never join.
        def read_json() -> dict[str, Any]:
            saved = {
                name: self._handlers[name].restore(path / name, args=ocp.args.JsonRestore())
                for name in ("run", "data")
            }
            if saved["run"].pop("checksum") != _checksum(saved["run"], saved["data"]):
                raise _BrokenError("run or data")
            return saved

        def read_arrays(part: Any) -> Any:
            how = ocp.checkpoint_utils.construct_restore_args(part)
            args = ocp.args.PyTreeRestore(part, restore_args=how, partial_restore=partial)
            # What they were copied from is let go before the next thing is done.
            return jax.block_until_ready(self._reader.restore(path / "state", args=args))

        saved = _in_every_process(read_json)
        sums = saved["run"]["arrays"]
        wanted = {name for part in parts for name in _by_name(part)}
        kinds = {name.split(".")[0] for name in wanted}  # "params" and so on.
        # Orbax lets a part of a state have more and fewer arrays than there are.
        if others := wanted ^ {name for name in sums if name.split(".")[0] in kinds}:
            raise _BrokenError(f"{min(others)} is not both in it and in the model")
        arrays = []
        for part in parts:
            arrays.append(_in_every_process(functools.partial(read_arrays, part)))
            for name, value in _checksums(arrays[-1]).items():
                if sums[name] != value:
                    raise _BrokenError(f"{name} is not what was saved")
        return saved, arrays

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

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Says in one line what went wrong while a checkpoint was written."""
        try:
            yield
        except Exception as error:
            _clear_frames(error)
            if isinstance(_root(error), jax.errors.JaxRuntimeError):
                raise _root(error) from None  # A device or another process, not the folder.
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax's notes out of the log, and what it raises in threads: it is raised here too."""
    hidden: list[BaseException] = []

    def is_not_orbaxs(record: logging.LogRecord) -> bool:
        if record.getMessage().startswith(_NOTES_ON_READ_ONLY):
            return False
        error = record.exc_info[1] if record.exc_info else None
        if error is None or not _is_orbaxs(error):
            return True
        hidden.append(error)
        return False

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:
        logger.addFilter(is_not_orbaxs)
    try:
        yield
    finally:
        # After a save that failed there are threads that nobody waits for, and futures that log
        # what nobody asked them once they are gone: the frames of the errors hold them.
        for thread in threading.enumerate():
            if type(thread).__module__.startswith("orbax."):
                threading.Thread.join(thread, _SECONDS_FOR_THREADS)
        for error in hidden:
            _clear_frames(error)
        if hidden:
            gc.collect()
        for logger in loggers:
            logger.removeFilter(is_not_orbaxs)


def _clear_frames(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _is_orbaxs(error: BaseException) -> bool:
    """Whether an error comes from Orbax, or from TensorStore, whose errors have no frames."""
    frames = list(traceback.walk_tb(error.__traceback__))
    modules = (frame.f_globals.get("__name__", "") for frame, _ in frames)
    return any(name.startswith("orbax.") for name in modules) or (
        not frames and "tensorstore" in str(error)
    )


def _arrays(state: TrainState) -> dict[str, Any]:
    """What of a state is saved: its arrays, not its functions."""
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _by_name(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _alone(path: Sequence[Any], leaf: Any) -> Any:
    """A tree in which a leaf has the name that it has in the tree that it comes from."""
    for key in reversed(path):
        leaf = {jax.tree_util.keystr((key,), simple=True): leaf}
    return leaf


def _checksums(arrays: Any) -> dict[str, int]:
    """A checksum of each array by its name: of its bits alone, however it is sharded."""
    # One after another: on CPUs each takes as much memory as its array.
    return {name: int(_sum_bits(array)) for name, array in _by_name(arrays).items()}


@jax.jit
def _sum_bits(array: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    # Every element has an odd factor of its own: modulo 2^32 a change of one always shows, and so
    # do elements that changed places.
    factor = jnp.ones(array.shape, jnp.uint32)
    for axis in range(array.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        factor += index * np.uint32(2 * pow(2654435761, axis + 1, 2**31))
    return jnp.sum(bits.astype(jnp.uint32) * factor, dtype=jnp.uint32)


def _checksum(run: Mapping[str, Any], data: Mapping[str, Any]) -> int:
    """A checksum of what is saved as JSON."""
    return zlib.crc32(json.dumps([run, data], sort_keys=True).encode())


class _BrokenError(Exception):
    """What is wrong with a checkpoint."""


def _in_every_process(read: Callable[[], Value]) -> Value:
    """What it reads; a `_BrokenError` if it cannot be read in this process or another one."""
    problem = ""
    try:
        value = read()
    except _BrokenError as error:
        problem = str(error)
    except Exception as error:  # Orbax and TensorStore raise whatever comes up.
        problem = _one_line(error)
    if problem := _first_problem(problem):
        raise _BrokenError(problem)
    return value


def _first_problem(problem: str) -> str:
    """What the first process that has a problem says, in every process; "" if none has."""
    text = np.zeros(400, np.uint8)
    encoded = np.frombuffer(problem.encode()[: text.size], np.uint8)
    text[: encoded.size] = encoded
    everywhere = multihost_utils.process_allgather(text).reshape(-1, text.size)
    said = (bytes(line).rstrip(b"\0").decode(errors="ignore") for line in everywhere)
    return next(filter(None, said), "")


def _root(error: BaseException) -> BaseException:
    """What an error began with."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _one_line(error: BaseException) -> str:
    """An error in one line, without the specification of the array that TensorStore appends."""
    error = _root(error)
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
