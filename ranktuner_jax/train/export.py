"""A run's checkpoint as a Hugging Face folder, which transformers and vLLM load."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys

import jax.numpy as jnp
from etils import epath
from flax import nnx

from ranktuner_jax import data, evals, models
from ranktuner_jax.errors import UserError
from ranktuner_jax.models import hf
from ranktuner_jax.train.checkpoint import Checkpoints
from ranktuner_jax.train.config import MeshConfig, read_config, to_dict
from ranktuner_jax.train.sharding import make_mesh

__all__ = ["export"]


def export(
    workdir: str | os.PathLike[str], output: str | os.PathLike[str], step: int | None = None
) -> int:
    """Writes a checkpoint of a run as a Hugging Face folder.

    Of the checkpoint only the parameters are read, and of the model that the run began with none.

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
    # A vocabulary that a tensor axis divided has rows in the checkpoint that only fill it up.
    decoder = dataclasses.replace(
        models.read_config(folder), vocab_multiple=max(1, config.mesh.tensor)
    )
    graph, shapes = hf.abstract_decoder(
        decoder, mesh=mesh, param_dtype=jnp.dtype(config.train.param_dtype)
    )
    checkpoints = Checkpoints(
        workdir,
        config.checkpoint,
        run=to_dict(config),
        params=shapes,
        read_only=True,
    )
    try:
        known = checkpoints.steps
        if not known or (step is not None and step not in known):
            raise UserError(
                f"--step: expected one of the checkpoints of {workdir} "
                f"({', '.join(map(str, known)) or 'it has none'}), got {step}"
            )
        restored = checkpoints.restore_params(shapes, step)
    finally:
        checkpoints.close()
    for note in restored.notes:
        print(note, file=sys.stderr)
    models.save_pretrained(
        nnx.merge(graph, restored.state),
        output,
        tokenizer_from=folder,
        chat_template=config.data.chat_template and tokenizer.get_chat_template(),
        stop_ids=evals.stop_ids(tokenizer),
    )
    return restored.step
