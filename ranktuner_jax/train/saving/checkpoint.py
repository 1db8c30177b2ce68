"""A run's checkpoints: state, data position and config, saved while training continues."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ranktuner_jax.errors import RunError, UserError
from ranktuner_jax.train.config import CheckpointConfig, differences
from ranktuner_jax.train.saving.checksums import by_name, checksums, json_checksum, nest
from ranktuner_jax.train.saving.orbax_log import clear_frames, one_line, quiet_orbax, root_cause
from ranktuner_jax.train.saving.workdir import config_differences
from ranktuner_jax.train.step.state import TrainState

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

__all__ = ["Checkpoints", "Restored"]

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "ranktuner-jax")
_WRITE_GIGABYTES = 0.25


State = TypeVar("State")
Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Restored(Generic[State]):
    """A restored checkpoint.

    Attributes:
      state: The state, or only the parameters.
      data: The data position.
      step: The step of the checkpoint.
      notes: Warnings, one line each: corrupt checkpoints that were skipped, packages whose version
        has changed.
    """

    state: State
    data: dict[str, Any]
    step: int
    notes: list[str]


class Checkpoints:
    """Saves checkpoints asynchronously, deletes old ones, and restores the newest intact one.

    A checkpoint is intact if all of it can be read and every array has the checksum that was
    computed on the devices when it was saved. Without checksums, flipped bits would go unnoticed:
    Orbax reads such an array without an error.

    Args:
      workdir: The folder of the run; checkpoints are in its `checkpoints`.
      config: When to save and what to keep.
      run: The config of the run, saved with each checkpoint.
      params: The parameters, or their shapes and shardings: no array of the state is larger.
      read_only: Whether to leave the folder unchanged, since a running job may be using it.
      write_gigabytes: How much data to compress and write concurrently (at least the largest
        shard); Orbax would otherwise hold all of the state.
      base: The parameters that are not trained, which are not saved: a checkpoint has a checksum
        of them, and is refused where they are others. None if they are not at hand.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        config: CheckpointConfig,
        run: Mapping[str, Any],
        params: Any,
        read_only: bool = False,
        write_gigabytes: float = _WRITE_GIGABYTES,
        base: Any = None,
    ) -> None:
        # Imported here, so that a command is refused before it has waited for Orbax.
        import orbax.checkpoint as ocp

        self.folder = _absolute(epath.Path(workdir)) / "checkpoints"
        self._run: dict[str, Any] = {"config": run, "versions": _versions()}
        if jax.tree.leaves(base):
            self._run["base"] = json_checksum(checksums(base), {})
        # Orbax refuses an array that is larger than the limit.
        largest = max(map(_shard_bytes, jax.tree.leaves(params)))
        gigabytes = max(write_gigabytes, 1.01e-9 * largest)
        self._handlers = {
            "state": ocp.StandardCheckpointHandler(save_concurrent_gb=gigabytes),
            "data": ocp.JsonCheckpointHandler(),
            "run": ocp.JsonCheckpointHandler(),
        }
        # Reads what the handler of `state` wrote, in parts if needed.
        self._reader = ocp.PyTreeCheckpointHandler()
        self._read_only, self._saving = read_only, 0
        with contextlib.ExitStack() as stack:
            stack.enter_context(quiet_orbax())
            self._manager = _manager(
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
        """Starts a save; the arrays are copied before it returns, so that they may be donated.

        Raises:
          RunError: If this checkpoint or the previous one cannot be written.
        """
        if step == self._manager.latest_step():
            return
        import orbax.checkpoint as ocp

        self.wait()  # So that errors name the right checkpoint.
        self._saving = step
        arrays = _arrays(state)
        run = {**self._run, "arrays": checksums(arrays), "shapes": _shapes(arrays)}
        with self._errors_in_one_line():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(arrays),
                    data=ocp.args.JsonSave(dict(data)),
                    run=ocp.args.JsonSave({**run, "checksum": json_checksum(run, data)}),
                ),
                force=True,
            )

    @property
    def steps(self) -> list[int]:
        """The steps of the completed checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def restore(self, state: TrainState, step: int | None = None) -> Restored[TrainState]:
        """Restores the newest intact checkpoint.

        Newer corrupt ones are then moved to `broken` in the workdir, since the run will save the
        same steps again.

        Args:
          state: A state with the structure and the shardings to restore into. Its arrays are
            deleted before others are read, since two states may not fit into memory.
          step: One of `steps`; by default the newest intact one.

        Raises:
          UserError: If no checkpoint is intact, or it belongs to a run with another config,
            another model or another optimizer.
        """
        import orbax.checkpoint as ocp

        arrays = _arrays(state)
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, arrays)
        found = self._newest(
            [shapes], step, free=lambda: jax.tree.map(lambda array: array.delete(), arrays)
        )
        return Restored(state.replace(**found.state[0]), found.data, found.step, found.notes)

    def restore_params(self, shapes: State, step: int | None = None) -> Restored[State]:
        """Like `restore`, but reads only the parameters.

        They are read one by one, the largest first, because reading an array temporarily takes
        about twice its size, in host and device memory.

        Args:
          shapes: The parameters' `jax.ShapeDtypeStruct`s, with shardings.
          step: One of `steps`; by default the newest intact one.

        Raises:
          UserError: If no checkpoint is intact, or it belongs to a run with another config.
        """
        tree = {"params": shapes}
        order = sorted(
            jax.tree_util.tree_leaves_with_path(tree), key=lambda item: item[1].size, reverse=True
        )
        found = self._newest([nest(*item) for item in order], step, partial=True)
        paths = [path for path, _ in order]
        read = dict(zip(paths, jax.tree.leaves(found.state), strict=True))
        params = jax.tree_util.tree_map_with_path(lambda path, _: read[path], tree)["params"]
        return Restored(params, found.data, found.step, found.notes)

    def path(self, step: int) -> epath.Path:
        """The folder of a step's checkpoint."""
        return self.folder / str(step)

    def wait(self) -> None:
        """Waits until all saves are on disk.

        Raises:
          RunError: If a checkpoint cannot be written.
        """
        with self._errors_in_one_line():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits like `wait`, then releases the threads."""
        with self._until_closed, self._errors_in_one_line():
            self._manager.close()

    def _newest(
        self,
        parts: Sequence[Any],
        step: int | None,
        *,
        partial: bool = False,
        free: Callable[[], object] = lambda: None,
    ) -> Restored[list[Any]]:
        """Restores the newest intact checkpoint, reading its arrays in parts, one after another.

        Args:
          parts: Trees of shapes with shardings.
          step: One of `steps`; by default the newest intact one.
          partial: Whether the checkpoint has arrays that are in none of the parts.
          free: Called before arrays are read, once the checkpoint is known to be of this run.
        """
        broken: dict[int, str] = {}
        for candidate in [step] if step is not None else reversed(self.steps):
            try:
                saved = self._read_json(candidate)
                self._check(candidate, saved["run"], parts, partial)
                free()
                arrays = self._read_arrays(candidate, saved["run"]["arrays"], parts, partial)
            except _BrokenError as error:
                broken[candidate] = str(error)
                continue
            notes = [
                f"checkpoint {older} is broken ({why}); restoring checkpoint {candidate} instead"
                for older, why in broken.items()
            ]
            if broken and not self._read_only:
                notes.append(f"moved broken checkpoints to {self._set_aside(list(broken))}")
            if then := config_differences(saved["run"]["versions"], self._run["versions"]):
                notes.append(
                    f"checkpoint {candidate} was written with other versions ({'; '.join(then)}): "
                    "results may differ by rounding"
                )
            return Restored(arrays, saved["data"], candidate, notes)
        raise UserError(
            f"no checkpoint in {self.folder} is intact ("
            + "; ".join(f"{step}: {why}" for step, why in broken.items())
            + "); restore one from a backup, or start over in another --workdir"
        )

    def _read_json(self, step: int) -> dict[str, Any]:
        """What a checkpoint holds beside arrays: `run` and `data`.

        Raises:
          _BrokenError: In every process, if the checkpoint is broken in any of them.
        """
        import orbax.checkpoint as ocp

        # Not the manager's restore, which ends in a collective: a process that fails to read its
        # share would not join it, and the others would hang.
        def read() -> dict[str, Any]:
            saved = {
                name: self._handlers[name].restore(
                    self.path(step) / name, args=ocp.args.JsonRestore()
                )
                for name in ("run", "data")
            }
            if saved["run"].pop("checksum") != json_checksum(saved["run"], saved["data"]):
                raise _BrokenError("wrong checksum of run or data")
            return saved

        return _in_every_process(read)

    def _check(
        self, step: int, run: Mapping[str, Any], parts: Sequence[Any], partial: bool
    ) -> None:
        """Refuses a checkpoint of another config, another model or another optimizer."""
        if found := config_differences(run["config"], self._run["config"]):
            raise UserError(
                f"--workdir: {self.path(step)} is the checkpoint of a run with another "
                f"config ({'; '.join(found)}); use another folder, or the same config"
            )
        base = run.get("base")
        if base is not None and self._run.get("base", base) != base:
            raise UserError(
                f"--workdir: the adapters in {self.path(step)} were trained on another base model "
                "than the one that config.model names now; give back that model, or use another "
                "folder"
            )
        wanted = {name: shape for part in parts for name, shape in _shapes(part).items()}
        # Orbax does not report missing or extra arrays.
        saved = {
            name: shape
            for name, shape in run["shapes"].items()
            if not partial or name.startswith("params.")
        }
        if found := differences(saved, wanted):
            raise UserError(
                f"--workdir: {self.path(step)} was saved with another model or optimizer "
                f"({'; '.join(found[:3])}); use another folder, or the same model and optimizer"
            )

    def _read_arrays(
        self, step: int, sums: Mapping[str, int], parts: Sequence[Any], partial: bool
    ) -> list[Any]:
        """The arrays of a checkpoint, in parts.

        Raises:
          _BrokenError: In every process, if the checkpoint is broken in any of them.
        """
        import orbax.checkpoint as ocp

        def read(part: Any) -> Any:
            how = ocp.checkpoint_utils.construct_restore_args(part)
            args = ocp.args.PyTreeRestore(part, restore_args=how, partial_restore=partial)
            # Frees the buffers that they were copied from before reading more.
            return jax.block_until_ready(self._reader.restore(self.path(step) / "state", args=args))

        arrays = []
        for part in parts:
            arrays.append(_in_every_process(functools.partial(read, part)))
            for name, value in checksums(arrays[-1]).items():
                if sums[name] != value:
                    raise _BrokenError(f"wrong checksum of {name}")
        return arrays

    def _set_aside(self, steps: list[int]) -> epath.Path:
        """Moves checkpoints out of the way of later saves of the same steps."""
        folder = self.folder.parent / "broken"
        if jax.process_index() == 0:
            folder.mkdir(exist_ok=True)
            for step in steps:
                if (folder / str(step)).exists():
                    (folder / str(step)).rmtree()
                self.path(step).rename(folder / str(step))
        multihost_utils.sync_global_devices("broken checkpoints are set aside")
        self._manager.reload()
        return folder

    @contextlib.contextmanager
    def _errors_in_one_line(self) -> Iterator[None]:
        """Turns errors while a checkpoint is written into a `RunError` of one line."""
        try:
            yield
        except Exception as error:
            clear_frames(error)
            if isinstance(root_cause(error), jax.errors.JaxRuntimeError):
                raise root_cause(error) from None  # Not an error of the write.
            raise RunError(
                f"the checkpoint of step {self._saving} could not be written to {self.folder}: "
                f"{one_line(error)}; older ones are intact: run the same command to resume from "
                "them"
            ) from error


def _manager(*args: Any, **options: Any) -> ocp.CheckpointManager:
    import orbax.checkpoint as ocp

    class Manager(ocp.CheckpointManager):
        def reached_preemption(self, step: int) -> bool:
            """Always False: only the training loop polls for preemption (`StopNotice`).

            Orbax would poll from its threads as well, for past steps.
            """
            return False

    return Manager(*args, **options)


def _arrays(state: TrainState) -> dict[str, Any]:
    """The arrays of a state, which are saved; its functions are not."""
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _shapes(arrays: Any) -> dict[str, str]:
    """Type and shape of each array by name, such as "float32(3, 2)"."""
    return {name: f"{leaf.dtype}{leaf.shape}" for name, leaf in by_name(arrays).items()}


class _BrokenError(Exception):
    """A checkpoint is corrupt or incomplete; the message says why."""


def _in_every_process(read: Callable[[], Value]) -> Value:
    """Calls `read`; raises `_BrokenError` in all processes if it fails in any of them."""
    problem = ""
    try:
        value = read()
    except _BrokenError as error:
        problem = str(error)
    except Exception as error:  # Orbax and TensorStore raise many types.
        problem = one_line(error)
    if problem := _first_problem(problem):
        raise _BrokenError(problem)
    return value


def _first_problem(problem: str) -> str:
    """The message of the first process with a problem, in every process; "" if there is none."""
    text = np.zeros(400, np.uint8)
    encoded = np.frombuffer(problem.encode()[: text.size], np.uint8)
    text[: encoded.size] = encoded
    everywhere = multihost_utils.process_allgather(text).reshape(-1, text.size)
    messages = (bytes(line).rstrip(b"\0").decode(errors="ignore") for line in everywhere)
    return next(filter(None, messages), "")


def _absolute(path: epath.Path) -> epath.Path:
    """The absolute path, which Orbax requires; epath's own `absolute` breaks gs:// paths."""
    return path if path.is_absolute() else path.absolute()


def _shard_bytes(array: jax.Array | jax.ShapeDtypeStruct) -> int:
    """The bytes of one device's shard of an array."""
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
