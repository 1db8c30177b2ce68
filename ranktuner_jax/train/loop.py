"""A whole fine-tuning run, from a config to an exported model and a table of what changed."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from ranktuner_jax import data, evals, models
from ranktuner_jax.errors import RunError, UserError
from ranktuner_jax.train.checkpoint import Checkpoints, claim_workdir
from ranktuner_jax.train.config import TrainConfig, to_dict
from ranktuner_jax.train.distributed import end_alone
from ranktuner_jax.train.held_out import HeldOut
from ranktuner_jax.train.nonfinite import NonFiniteError, stop_at
from ranktuner_jax.train.preemption import StopNotice, Stopped
from ranktuner_jax.train.profile import Profile
from ranktuner_jax.train.sharding import check_batch, make_mesh, place_batch, row_share
from ranktuner_jax.train.state import init_state, make_optimizer
from ranktuner_jax.train.step import make_train_step
from ranktuner_jax.train.telemetry import StepLog, prefixed
from ranktuner_jax.train.utilisation import Utilisation
from ranktuner_jax.train.writer import Writer, check_telemetry

__all__ = ["FINISHED", "PREEMPTED", "train_and_evaluate"]

FINISHED, PREEMPTED = 0, 75

GOES_ON = "the same command goes on"


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
      RunError: If it cannot go on: the loss or the gradient of a step is not finite, or the disk is
        full.
    """
    try:
        with StopNotice() as stop:
            return _run(config, epath.Path(workdir), stop)
    except Stopped as stopped:
        if jax.process_index() == 0:
            print(str(stopped) or f"stopped with every step saved: {GOES_ON}", file=sys.stderr)
        return PREEMPTED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(f"{workdir}: {error.strerror}; make room, then {GOES_ON}") from error


def _run(config: TrainConfig, workdir: epath.Path, stop: StopNotice) -> int:
    check_telemetry(config.telemetry)
    claim = claim_workdir(workdir, config)
    if (workdir / "result.json").exists():
        if jax.process_index() == 0:
            _show(json.loads((workdir / "result.json").read_text()))
        return FINISHED

    mesh = make_mesh(config.mesh)
    check_batch(mesh, config.train.batch_size, config.train.accumulation)
    reader, readers = row_share(mesh)
    folder = models.resolve(config.model)
    tokenizer = data.load_tokenizer(folder, config.data.chat_template)
    stop_ids = evals.stop_ids(tokenizer)  # Now, for a template may refuse to tell.
    rows = data.load_rows(
        config.data, tokenizer, seed=config.seed, min_rows=config.train.batch_size
    )
    held_out = HeldOut(config, folder, tokenizer)
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
        stack.enter_context(end_alone())
        start = max(checkpoints.steps, default=0)
        numbers_to = functools.partial(
            Writer, workdir, steps=steps, config=config.telemetry, run=to_dict(config)
        )
        writer = stack.enter_context(numbers_to(start))
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        writer.say(f"model: {config.model}, {size:,} parameters, {_devices(mesh)}")
        if config.data.chat_template:
            writer.say(f"chat template: {config.data.chat_template}, not the tokenizer's own")
        writer.say(f"data: {rows.summary}")

        writer.say(f"evaluating: {held_out.size}")
        if held_out.note:
            writer.say(held_out.note)
        before = held_out.cached(model, writer.evaluating)
        if start == 0:
            writer.write(0, prefixed("eval", before.metrics()))

        utilisation = Utilisation(model.config, mesh.devices.flatten().tolist())
        state = init_state(model, make_optimizer(config.optimizer, steps), mesh)
        del model, params
        share = {
            "batch_size": config.train.batch_size,
            "seed": config.seed,
            "process_index": reader,
            "process_count": readers,
        }
        batches = data.BatchIterator(rows, **share)
        if start:
            restored = checkpoints.restore(state)
            for note in restored.notes:
                writer.say(note)
            if restored.step < start:  # What was logged since is done again.
                start = restored.step
                writer.close()
                writer = stack.enter_context(numbers_to(start))
            state = restored.state
            batches = data.BatchIterator.from_state(rows, restored.data, **share)
            del restored
            writer.say(f"going on after step {start} of {steps}")

        def evaluating(done: int, total: int) -> None:
            writer.evaluating(done, total)
            stop.check()

        step_fn = make_train_step(config, steps, mesh, state)
        compiled = None
        limit = config.train.nonfinite_limit if config.train.on_nonfinite == "skip" else 0
        skipped = start - int(state.step)  # Steps that are not finite leave the state as it is.
        log = StepLog(writer, steps, config.train.log_every, utilisation, skipped, limit)
        profile = stack.enter_context(Profile(writer.profile_path, config.train.profile_steps))
        go = hold = jax.device_put(np.asarray(False), NamedSharding(mesh, PartitionSpec()))
        try:
            with stop.deferred():
                for step in range(start + 1, steps + 1):
                    profile.before(step, log.read)
                    rows_of_step = next(batches)
                    batch = place_batch(mesh, rows_of_step, config.train.accumulation)
                    if compiled is None:
                        # Ahead of time: it then refuses other shapes, so there is no second one.
                        compiled = step_fn.lower(state, batch, hold).compile()
                        log.restart_clock()
                    state, metrics = compiled(state, batch, hold)
                    log.read_previous_then_hold(step, metrics, batch)
                    # Where one more step that is not finite ends the run, the step after it changes
                    # nothing: its state is still there when the host learns of it.
                    hold = metrics["nonfinite"] if log.skipped >= limit else go

                    last, stopping = step == steps, stop.reached()
                    if _due(step, config.eval.every_steps) and not last and not stopping:
                        log.read()
                        try:
                            writer.say(f"evaluating: {held_out.size}")
                            now = held_out.evaluate(state.apply_fn(state.params), evaluating)
                            writer.write(step, prefixed("eval", now.metrics()))
                        except Stopped:
                            stopping = True
                        log.restart_clock()
                    if _due(step, config.checkpoint.every_steps) or last or stopping:
                        log.read()  # A state is saved only once it is known to be finite.
                        checkpoints.save(step, state, batches.state())
                        log.restart_clock()
                    if stopping:
                        checkpoints.wait()
                        raise Stopped(f"stopped and saved after step {step}: {GOES_ON}")
        except NonFiniteError as found:
            raise stop_at(found, state, config, steps, workdir) from None
        checkpoints.wait()

        model = state.apply_fn(state.params)
        del state  # With it goes the optimizer's share of the memory.
        writer.say(f"evaluating: {held_out.size}")
        after = held_out.evaluate(model, evaluating)
        writer.write(steps, prefixed("eval", after.metrics()))
        exported = workdir / "model"
        # Left by a run that was killed before it could write its result.
        if jax.process_index() == 0 and exported.exists():
            exported.rmtree()
        multihost_utils.sync_global_devices("the folder of the model is free")
        models.save_pretrained(
            model,
            exported,
            tokenizer_from=folder,
            chat_template=config.data.chat_template and tokenizer.get_chat_template(),
            stop_ids=stop_ids,
        )
        result = {
            "steps": steps,
            "before": before.to_json(),
            "after": after.to_json(),
            "paths": {
                # As the user wrote the folder: Orbax's own path is absolute.
                "checkpoint": str(workdir / "checkpoints" / str(steps)),
                "model": str(exported),
                "metrics": str(writer.metrics_path),
                **(
                    {"tensorboard": str(writer.tensorboard_path)} if writer.tensorboard_path else {}
                ),
            },
        }
    if jax.process_index() == 0:
        partial = workdir / "result.json.partial"
        partial.write_text(json.dumps(result, indent=2) + "\n")
        partial.replace(workdir / "result.json")
        _show(result)
    return FINISHED


def _count_steps(config: TrainConfig, rows: int) -> int:
    if config.train.batch_size > rows:
        raise UserError(
            f"train.batch_size: expected at most the number of rows of the data, {rows}, got "
            f"{config.train.batch_size}; set --config.train.batch_size to less, or add rows"
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
