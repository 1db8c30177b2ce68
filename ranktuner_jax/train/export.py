"""Write a run's checkpoint as a Hugging Face folder, which transformers and vLLM load.

ranktuner export --workdir=runs/first --output=exported
ranktuner export --workdir=runs/first --step=50 --output=exported-50
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

import jax.numpy as jnp
from etils import epath
from flax import nnx

from ranktuner_jax import data, evals, models
from ranktuner_jax.errors import UserError
from ranktuner_jax.train.checkpoint import Checkpoints
from ranktuner_jax.train.config import MeshConfig, read_config, to_dict
from ranktuner_jax.train.sharding import make_mesh
from ranktuner_jax.train.state import init_state, make_optimizer

__all__ = ["add_arguments", "export", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `ranktuner export` takes."""
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--output", required=True, help="folder to write; it must not exist yet")
    parser.add_argument("--step", type=int, help="which checkpoint; the newest by default")


def run(args: argparse.Namespace) -> int:
    """Runs it."""
    step = export(args.workdir, args.output, args.step)
    print(f"step {step} of {args.workdir} is in {args.output}")
    return 0


def export(
    workdir: str | os.PathLike[str], output: str | os.PathLike[str], step: int | None = None
) -> int:
    """Writes a checkpoint of a run as a Hugging Face folder.

    Args:
      workdir: The folder of the run.
      output: The folder to write; it must not exist yet.
      step: Which checkpoint; by default the newest that is whole.

    Returns:
      The step that was exported.

    Raises:
      UserError: If there is no such run or checkpoint, or `output` exists.
    """
    workdir, output = epath.Path(workdir), pathlib.Path(output)
    if output.exists():
        raise UserError(f"--output: expected a folder that does not exist yet, got {output}")
    config = read_config(workdir)
    folder = models.resolve(config.model)
    tokenizer = data.load_tokenizer(folder, config.data.chat_template)
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))  # Whatever devices are here, not the run's.
    model = models.load_pretrained(
        folder, mesh=mesh, param_dtype=jnp.dtype(config.train.param_dtype)
    )
    checkpoints = Checkpoints(
        workdir,
        config.checkpoint,
        run=to_dict(config),
        params=nnx.state(model, nnx.Param),
        read_only=True,
    )
    try:
        known = checkpoints.steps
        if not known or (step is not None and step not in known):
            raise UserError(
                f"--step: expected one of the checkpoints of {workdir} "
                f"({', '.join(map(str, known)) or 'it has none'}), got {step}"
            )
        # The rate does not matter here: only the structure of the optimizer's state does.
        state = init_state(model, make_optimizer(config.optimizer, steps=1), mesh)
        restored = checkpoints.restore(state, step)
    finally:
        checkpoints.close()
    for note in restored.notes:
        print(note, file=sys.stderr)
    models.save_pretrained(
        restored.state.apply_fn(restored.state.params),
        output,
        tokenizer_from=folder,
        chat_template=config.data.chat_template and tokenizer.get_chat_template(),
        stop_ids=evals.stop_ids(tokenizer),
    )
    return restored.step
