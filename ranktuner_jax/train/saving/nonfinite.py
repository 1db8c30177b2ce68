"""A step whose loss or gradient is not finite: what is kept of it, and how it is done again."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from flax.training.train_state import TrainState
from jax.experimental import multihost_utils

from ranktuner_jax import models
from ranktuner_jax.errors import RunError, UserError
from ranktuner_jax.train.checkpoint import Checkpoints
from ranktuner_jax.train.config import CheckpointConfig, TrainConfig, read_config, to_dict
from ranktuner_jax.train.sharding import make_mesh, place_batch
from ranktuner_jax.train.state import init_state, make_optimizer
from ranktuner_jax.train.step import make_train_step

__all__ = ["NonFiniteError", "replay", "stop_at"]


@dataclasses.dataclass
class NonFiniteError(Exception):
    """The step after which the run has to stop; it changed nothing."""

    step: int
    loss: float
    grad_norm: float
    batch: Mapping[str, jax.Array]


def stop_at(
    found: NonFiniteError, state: TrainState, config: TrainConfig, steps: int, workdir: epath.Path
) -> RunError:
    """Keeps the batch and the state before it in `nonfinite/step_N` of the workdir.

    Args:
      found: The step.
      state: The state before it.
      config: The run.
      steps: Its number of steps.
      workdir: Its folder.

    Returns:
      What there is to say, with the rows of the data set that all processes read.
    """
    batch = {
        name: np.asarray(multihost_utils.process_allgather(array, tiled=True))
        for name, array in found.batch.items()
    }
    folder = _folder(workdir, found.step)
    try:
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            with io.BytesIO() as file:
                np.savez(file, **batch)  # type: ignore[arg-type]
                (folder / "batch.npz").write_bytes(file.getvalue())
            (folder / "steps.json").write_text(json.dumps(steps))
        with contextlib.closing(
            Checkpoints(folder, CheckpointConfig(asynchronous=False), to_dict(config), state.params)
        ) as checkpoints:
            checkpoints.save(found.step - 1, state, {})
        kept = f"`ranktuner_jax.train.replay({os.fspath(workdir)!r}, {found.step})` does it again"
    except (OSError, RunError) as error:
        kept = f"it could not be kept in {folder}: {error}"
    return RunError(
        f"step {found.step}: the loss is {found.loss} and the gradient norm {found.grad_norm}, on "
        f"rows {batch['row_index'].ravel().tolist()} of the data set; {kept}; "
        "--config.train.on_nonfinite=skip goes on without such steps"
    )


def replay(workdir: str | os.PathLike[str], step: int) -> dict[str, float]:
    """Does a step again that was not finite, from the state and the batch that were kept.

    Args:
      workdir: The folder of the run.
      step: The step that it named when it stopped.

    Returns:
      The metrics of the step: "loss", "grad_norm" and so on.

    Raises:
      UserError: If nothing was kept of such a step.
    """
    workdir = epath.Path(workdir)
    folder = _folder(workdir, step)
    if not (folder / "steps.json").exists():
        raise UserError(f"expected a step that was not finite in {folder}, found none")
    steps = json.loads((folder / "steps.json").read_text())
    config = read_config(workdir)
    mesh = make_mesh(config.mesh)
    model = models.load_pretrained(
        models.resolve(config.model),
        mesh=mesh,
        dtype=jnp.dtype(config.train.compute_dtype),
        param_dtype=jnp.dtype(config.train.param_dtype),
        remat=config.train.remat,
    )
    params = nnx.state(model, nnx.Param)
    with contextlib.closing(
        Checkpoints(folder, config.checkpoint, to_dict(config), params, read_only=True)
    ) as checkpoints:
        state = init_state(model, make_optimizer(config.optimizer, steps), mesh)
        state = checkpoints.restore(state).state
    with np.load(io.BytesIO((folder / "batch.npz").read_bytes())) as kept:
        # The micro-batches are cut again.
        rows = {name: kept[name].reshape(-1, *kept[name].shape[2:]) for name in kept.files}
    batch = place_batch(mesh, rows, config.train.accumulation)
    _, metrics = make_train_step(config, steps, mesh, state)(state, batch)
    return {name: float(value) for name, value in jax.device_get(metrics).items() if not value.ndim}


def _folder(workdir: epath.Path, step: int) -> epath.Path:
    return workdir / "nonfinite" / f"step_{step}"
