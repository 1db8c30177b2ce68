"""Export of a run's checkpoint as a Hugging Face folder for transformers and vLLM."""

from __future__ import annotations

import json
import os
import pathlib
import sys

from ranktuner_jax import evals, models
from ranktuner_jax.errors import UserError
from ranktuner_jax.train.config import MeshConfig
from ranktuner_jax.train.recipe import RunResult
from ranktuner_jax.train.run import Run
from ranktuner_jax.train.runtime.mesh import make_mesh

__all__ = ["export"]


def export(
    workdir: str | os.PathLike[str],
    output: str | os.PathLike[str],
    step: int | None = None,
    *,
    merge: bool = False,
) -> int:
    """Writes a checkpoint of a run as a Hugging Face folder, or its adapters as PEFT's.

    README.md is the model card: base model, data, method, results and the command.

    Reads only the parameters from the checkpoint, and weights of the initial model only to merge.

    Args:
      workdir: The folder of the run.
      output: The folder to write; it must not exist yet.
      step: Step of the checkpoint; by default the newest intact one.
      merge: Whether to write the whole model of a run with adapters, which are added to it.

    Returns:
      The step that was exported.

    Raises:
      UserError: If there is no such run or checkpoint, `output` exists, or there is nothing to
        merge.
    """
    output = pathlib.Path(output)
    if output.exists():
        raise UserError(f"--output: expected a folder that does not exist yet, got {output}")
    run = Run.open(workdir)
    if merge and not run.config.lora.is_on:
        raise UserError(
            f"--merge: expected a run with adapters, got {workdir}, which trained the whole model; "
            "leave it out"
        )
    # The devices of this machine, not the run's.
    restored = run.restore_model(make_mesh(MeshConfig(data=1, fsdp=-1)), step, base=merge)
    for note in restored.notes:
        print(note, file=sys.stderr)
    model = restored.state
    if merge:
        model = run.unquantized(model)
        models.merge_adapters(model)
    run.save_pretrained(model, output, restored.step, _results(run, restored.step))
    return restored.step


def _results(run: Run, step: int) -> dict[str, evals.EvalResult]:
    """The evaluations of a finished run, if this is its last step."""
    assert run.workdir is not None
    file = run.workdir / "result.json"
    if not file.exists():
        return {}
    result = RunResult.from_json(json.loads(file.read_text()))
    return {"before": result.before, "after": result.after} if result.steps == step else {}
