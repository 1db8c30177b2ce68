"""A whole fine-tuning run, from a config to an exported model and a table of what changed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import rich.console
import rich.table
from flax import nnx

from ranktuner_jax import data, evals, models
from ranktuner_jax.errors import UserError
from ranktuner_jax.train.checkpoint import Checkpoints, claim_workdir
from ranktuner_jax.train.config import TrainConfig, to_dict
from ranktuner_jax.train.preemption import stop_notice
from ranktuner_jax.train.sharding import check_batch, make_mesh, place_batch
from ranktuner_jax.train.state import init_state, make_optimizer
from ranktuner_jax.train.step import make_train_step
from ranktuner_jax.train.telemetry import StepLog, prefixed
from ranktuner_jax.train.writer import Writer

__all__ = ["FINISHED", "PREEMPTED", "train_and_evaluate"]

FINISHED, PREEMPTED = 0, 75


def train_and_evaluate(config: TrainConfig, workdir: str | os.PathLike[str]) -> int:
    """Fine-tunes a model, evaluates it before and after, exports it and shows what changed.

    A finished workdir is only shown; an interrupted one goes on where it was.

    Args:
      config: The run.
      workdir: Where everything goes: config.json, checkpoints/, metrics.jsonl, tensorboard/,
        model/ and, once all is done, result.json.

    Returns:
      The exit code: `FINISHED`, or `PREEMPTED` where a signal came and the state was saved.

    Raises:
      UserError: If the config, the model, the data or the workdir is not what it has to be.
      FloatingPointError: If the loss or the gradient of a step is not finite.
    """
    workdir = pathlib.Path(workdir)
    claim = claim_workdir(workdir, config)
    if (workdir / "result.json").exists():
        _show(json.loads((workdir / "result.json").read_text()))
        return FINISHED

    mesh = make_mesh(config.mesh)
    check_batch(mesh, config.train.batch_size, config.train.accumulation)
    folder = models.resolve(config.model)
    tokenizer = data.load_tokenizer(folder)
    rows = data.load_rows(config.data, tokenizer, seed=config.seed)
    held_out = _HeldOut(config, folder, tokenizer)
    steps = _count_steps(config, len(rows))
    model = models.load_pretrained(
        folder,
        mesh=mesh,
        dtype=jnp.dtype(config.train.compute_dtype),
        param_dtype=jnp.dtype(config.train.param_dtype),
        remat=config.train.remat,
    )
    claim()

    with contextlib.ExitStack() as stack:
        params = nnx.state(model, nnx.Param)
        checkpoints = Checkpoints(workdir, config.checkpoint, run=to_dict(config), params=params)
        stack.callback(checkpoints.close)
        start = max(checkpoints.steps, default=0)
        writer = stack.enter_context(Writer(workdir, start, steps))
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        writer.say(f"model: {config.model}, {size:,} parameters, {_devices(mesh)}")
        writer.say(f"data: {rows.summary}")

        before = held_out.before(model, writer)
        if start == 0:
            writer.write(0, prefixed("eval", before.metrics()))

        state = init_state(model, make_optimizer(config.optimizer, steps), mesh)
        del model, params
        share = {
            "batch_size": config.train.batch_size,
            "seed": config.seed,
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
        }
        batches = data.BatchIterator(rows, **share)
        if start:
            state, position = checkpoints.restore(state, start)
            batches = data.BatchIterator.from_state(rows, position, **share)
            writer.say(f"going on after step {start} of {steps}")

        step_fn = make_train_step(config, steps, mesh, state)
        compiled = None
        log = StepLog(writer, steps, config.train.log_every)
        with stop_notice() as stop:
            for step in range(start + 1, steps + 1):
                rows_of_step = next(batches)
                batch = place_batch(mesh, rows_of_step, config.train.accumulation)
                if compiled is None:
                    # Ahead of time: it then refuses other shapes, so there is no second one.
                    compiled = step_fn.lower(state, batch).compile()
                    log.restart_clock()
                state, metrics = compiled(state, batch)
                log.read_previous_then_hold(step, metrics, rows_of_step["row_index"])

                last, stopping = step == steps, stop.is_set()
                if _due(step, config.eval.every_steps) and not last:
                    log.read()
                    now = held_out.evaluate(state.apply_fn(state.params), writer)
                    writer.write(step, prefixed("eval", now.metrics()))
                    log.restart_clock()
                if _due(step, config.checkpoint.every_steps) or last or stopping:
                    log.read()  # A state is saved only once it is known to be finite.
                    checkpoints.save(step, state, batches.state())
                    log.restart_clock()
                if stopping and not last:
                    checkpoints.wait()
                    writer.say(f"stopped and saved after step {step}: the same command goes on")
                    return PREEMPTED
        checkpoints.wait()

        model = state.apply_fn(state.params)
        del state  # With it goes the optimizer's share of the memory.
        after = held_out.evaluate(model, writer)
        writer.write(steps, prefixed("eval", after.metrics()))
        exported = workdir / "model"
        if jax.process_index() == 0:
            # Left by a run that was killed before it could write its result.
            shutil.rmtree(exported, ignore_errors=True)
        models.save_pretrained(model, exported, tokenizer_from=folder)
        result = {
            "steps": steps,
            "before": before.to_json(),
            "after": after.to_json(),
            "paths": {
                "checkpoint": str(checkpoints.path(steps)),
                "model": str(exported),
                "metrics": str(writer.metrics_path),
                "tensorboard": str(writer.tensorboard_path),
            },
        }
    if jax.process_index() == 0:
        partial = workdir / "result.json.partial"
        partial.write_text(json.dumps(result, indent=2) + "\n")
        partial.replace(workdir / "result.json")
        _show(result)
    return FINISHED


class _HeldOut:
    """The evaluation of a run: the same rows and questions every time."""

    def __init__(self, config: TrainConfig, folder: pathlib.Path, tokenizer: Any) -> None:
        self._config = config.eval
        self._folder = folder
        self._tokenizer = tokenizer
        split = config.eval.split
        self._rows = data.load_rows(config.data, tokenizer, split=split, seed=config.seed)
        self._examples = (
            data.load_examples(config.data, tokenizer, split=split, limit=config.eval.examples)
            if config.eval.task
            else []
        )
        self._size = (
            f"{min(len(self._rows), config.eval.rows):,} held-out rows, "
            f"{len(self._examples):,} questions"
        )

    def before(self, model: models.Decoder, writer: Writer) -> evals.EvalResult:
        """What the model could do at the start; kept in the user's cache."""
        writer.say(f"evaluating: {self._size}")
        result, _ = evals.cached_evaluation(
            model,
            self._tokenizer,
            rows=self._rows,
            examples=self._examples,
            config=self._config,
            model_folder=self._folder,
            cache_dir=models.default_cache_dir(),
            progress=writer.evaluating,
        )
        return result

    def evaluate(self, model: models.Decoder, writer: Writer) -> evals.EvalResult:
        """What it can do now."""
        writer.say(f"evaluating: {self._size}")
        return evals.evaluate(
            model,
            self._tokenizer,
            rows=self._rows,
            examples=self._examples,
            config=self._config,
            progress=writer.evaluating,
        )


def _count_steps(config: TrainConfig, rows: int) -> int:
    if config.train.batch_size > rows:
        raise UserError(
            f"train.batch_size: expected at most the number of rows of the data, {rows}, got "
            f"{config.train.batch_size}"
        )
    if config.train.epochs is None:
        return config.train.steps
    return max(1, math.floor(config.train.epochs * rows / config.train.batch_size))


def _devices(mesh: jax.sharding.Mesh) -> str:
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    kind = mesh.devices.flat[0].device_kind
    return f"{mesh.size} {kind} device{'s' * (mesh.size > 1)}" + (f" ({axes})" if axes else "")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _show(result: Mapping[str, Any]) -> None:
    """Prints what the run changed, and where everything is."""
    before, after = (evals.EvalResult.from_json(result[when]) for when in ("before", "after"))
    table = rich.table.Table(title=f"held-out, before and after {result['steps']} steps")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("plain NLL", f"{before.nll:.3f}", f"{after.nll:.3f}")
    table.add_row("token accuracy", f"{before.token_accuracy:.1%}", f"{after.token_accuracy:.1%}")
    if after.questions:
        cells = []
        for one in (before, after):
            low, high = one.accuracy_interval or (0.0, 0.0)
            cells.append(f"{one.accuracy:.1%} ({low:.1%} to {high:.1%})")
        table.add_row("answers right", *cells)
        table.caption = f"{after.questions} questions; in brackets the 95 % interval"
    rich.console.Console(file=sys.stdout).print(table)
    lines = {}
    for then, now in zip(before.previews[:1], after.previews[:1], strict=True):
        lines = {
            "question": then.question,
            "expected": then.expected,
            "before": then.completion,
            "after": now.completion,
        }
    for name, text in (lines | result["paths"]).items():
        print(f"{name + ':':<13}{text}")
