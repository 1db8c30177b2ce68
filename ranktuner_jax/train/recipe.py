"""A complete fine-tuning run: from a config to an exported model and its evaluation."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.experimental import multihost_utils

from ranktuner_jax import evals, files, models
from ranktuner_jax.errors import RunError
from ranktuner_jax.train.config import TrainConfig
from ranktuner_jax.train.hooks import Evaluate, Hook
from ranktuner_jax.train.run import Run, describe_devices
from ranktuner_jax.train.runtime.preemption import StopNotice
from ranktuner_jax.train.saving.workdir import claim_workdir
from ranktuner_jax.train.telemetry.step_log import prefixed
from ranktuner_jax.train.telemetry.weights_and_biases import check_telemetry

__all__ = ["RunResult", "train_and_evaluate"]


@dataclasses.dataclass(frozen=True)
class RunResult:
    """The result of a finished run.

    Attributes:
      steps: Optimizer steps.
      before: The evaluation before the first step.
      after: The evaluation after the last one.
      paths: Where the outputs are: "checkpoint", "model", "metrics" and so on.
      stopped: Why training stopped early; "" if it did not.
    """

    steps: int
    before: evals.EvalResult
    after: evals.EvalResult
    paths: dict[str, str]
    stopped: str = ""

    def to_json(self) -> dict[str, Any]:
        """A dict that `from_json` reads back."""
        results = {name: getattr(self, name).to_json() for name in ("before", "after")}
        return dataclasses.asdict(self) | results

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> RunResult:
        """The result that `to_json` wrote."""
        results = {name: evals.EvalResult.from_json(saved[name]) for name in ("before", "after")}
        return cls(**{**saved, **results})


def train_and_evaluate(
    config: TrainConfig, workdir: str | os.PathLike[str], hooks: Sequence[Hook] = ()
) -> RunResult:
    """Fine-tunes a model, evaluates it before and after, and exports it.

    If the workdir holds a finished run, its result is returned; an interrupted run is resumed.

    Args:
      config: The config of the run.
      workdir: The output folder: config.json, checkpoints/, metrics.jsonl, tensorboard/, model/
        and, at the end, result.json.
      hooks: Called between steps, after the evaluation and before the config's other hooks.

    Raises:
      UserError: If the config, the model, the data or the workdir is invalid.
      DivergedError: If the loss or the gradient of a step is not finite.
      RunError: If it cannot continue, since the disk is full.
      Stopped: If a signal arrived; every completed step is saved.
    """
    try:
        with StopNotice():
            return _train_and_evaluate(Run.open(config, workdir=workdir), hooks)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(
            f"{workdir}: {error.strerror}; free some space and run the same command to resume"
        ) from error


def _train_and_evaluate(run: Run, hooks: Sequence[Hook]) -> RunResult:
    config, workdir = run.config, run.workdir
    assert workdir is not None
    check_telemetry(config.telemetry)
    claim_workdir(workdir, config)
    if (workdir / "result.json").exists():
        return RunResult.from_json(json.loads((workdir / "result.json").read_text()))
    # Opened first, so that an invalid config does not claim the folder.
    run.check()
    _ = run.mesh, run.stop_ids, run.rows, run.held_out, run.steps, run.model
    own = run.make_hooks()
    evaluate = own[0]
    assert isinstance(evaluate, Evaluate)
    with run.trainer([evaluate, *hooks, *own[1:]]) as trainer:
        trainer.open_telemetry(run.steps)
        trained, frozen = (
            sum(
                math.prod(leaf.shape)
                for leaf in jax.tree.leaves(
                    state, is_leaf=lambda leaf: isinstance(leaf, models.Quantized)
                )
            )
            for state in nnx.state(run.model, nnx.Param, ...)
        )
        size = f"{trained + frozen:,} parameters" + f", {trained:,} trained" * bool(frozen)
        trainer.say(f"model: {config.model}, {size}, {describe_devices(run.mesh)}")
        if config.data.chat_template:
            trainer.say(f"chat template: {config.data.chat_template}, not the tokenizer's own")
        trainer.say(f"data: {run.rows.summary}")
        trainer.say(f"evaluating: {run.held_out.size}")
        if run.held_out.note:
            trainer.say(run.held_out.note)
        before = run.held_out.cached(trainer.model, trainer.evaluating)
        start = trainer.resume()
        if start:
            trainer.say(f"resuming after step {start} of {run.steps}")
        else:
            trainer.log(prefixed("eval", before.metrics()))
        done = trainer.fit(
            run.rows, run.steps, batch_size=config.train.batch_size, seed=config.seed
        )
        assert evaluate.result is not None
        exported = workdir / "model"
        # Left by a run that was killed before it could write its result.
        if jax.process_index() == 0 and exported.exists():
            exported.rmtree()
        multihost_utils.sync_global_devices("the old model folder is removed")
        results = {"before": before, "after": evaluate.result}
        run.save_pretrained(trainer.model, exported, done.steps, results)
        paths = {
            # The workdir as the user wrote it: Orbax's path is absolute.
            "checkpoint": str(workdir / "checkpoints" / str(done.steps)),
            "model": str(exported),
            "metrics": str(workdir / "metrics.jsonl"),
        }
        if config.telemetry.tensorboard:
            paths["tensorboard"] = str(workdir / "tensorboard")
        result = RunResult(done.steps, before, evaluate.result, paths, done.stopped)
    if jax.process_index() == 0:
        files.write_whole(workdir / "result.json", json.dumps(result.to_json(), indent=2) + "\n")
    return result
