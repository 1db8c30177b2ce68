"""Export of a run's checkpoint as a Hugging Face folder for transformers and vLLM."""

from __future__ import annotations

import os
import pathlib
import sys

from ranktuner_jax.errors import UserError
from ranktuner_jax.train.config import MeshConfig
from ranktuner_jax.train.run import Run
from ranktuner_jax.train.runtime.mesh import make_mesh

__all__ = ["export"]


def export(
    workdir: str | os.PathLike[str], output: str | os.PathLike[str], step: int | None = None
) -> int:
    """Writes a checkpoint of a run as a Hugging Face folder.

    Reads only the parameters from the checkpoint, and no weights of the initial model.

    Args:
      workdir: The folder of the run.
      output: The folder to write; it must not exist yet.
      step: Step of the checkpoint; by default the newest intact one.

    Returns:
      The step that was exported.

    Raises:
      UserError: If there is no such run or checkpoint, or `output` exists.
    """
    output = pathlib.Path(output)
    if output.exists():
        raise UserError(f"--output: expected a folder that does not exist yet, got {output}")
    run = Run.open(workdir)
    # The devices of this machine, not the run's.
    restored = run.restore_model(make_mesh(MeshConfig(data=1, fsdp=-1)), step)
    for note in restored.notes:
        print(note, file=sys.stderr)
    run.save_pretrained(restored.state, output)
    return restored.step
