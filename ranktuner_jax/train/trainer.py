"""Training from objects: a model, a weighting, an optimizer, batches and hooks."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import jax
import optax
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from ranktuner_jax import data, evals, losses, models
from ranktuner_jax.errors import UserError
from ranktuner_jax.train.batch_source import Batches, BatchSource
from ranktuner_jax.train.config import CheckpointConfig, MeshConfig, TelemetryConfig
from ranktuner_jax.train.hooks import Hook
from ranktuner_jax.train.hooks.calls import HookCalls
from ranktuner_jax.train.runtime.mesh import make_mesh
from ranktuner_jax.train.runtime.preemption import StopNotice, Stopped
from ranktuner_jax.train.saving.checkpoint import Checkpoints
from ranktuner_jax.train.saving.nonfinite import load_step, stop_at
from ranktuner_jax.train.step.program import StepProgram
from ranktuner_jax.train.step.state import TrainState, init_state
from ranktuner_jax.train.step.train_step import Metrics
from ranktuner_jax.train.telemetry.step_log import NonFiniteError, StepLog
from ranktuner_jax.train.telemetry.telemetry import Telemetry
from ranktuner_jax.train.telemetry.utilisation import Utilisation

__all__ = ["FitResult", "Trainer"]


@dataclasses.dataclass(frozen=True)
class FitResult:
    """The result of `Trainer.fit`.

    Attributes:
      steps: Steps done since the run began.
      metrics: The latest value of each metric by name, such as "train/loss" and "eval/nll".
      stopped: Why training stopped early; "" if it did not.
    """

    steps: int
    metrics: dict[str, float]
    stopped: str = ""


class Trainer:
    """Trains a decoder, with checkpoints, resuming, logging and evaluation.

    The state is a Flax `TrainState`, updated by one compiled function over the mesh. Without a
    workdir nothing is written. With one, the folder holds checkpoints/, metrics.jsonl and
    tensorboard/, and an interrupted run resumes with bit-identical results: create the same
    trainer, call `resume`, then `fit` with the same batches. Used as a context manager, a trainer
    keeps these files open between calls.

    Args:
      model: The decoder. It is trained in place: its arrays are donated, and it holds the trained
        parameters whenever no step is running. Of one with adapters (`models.add_adapters`) they
        alone are trained and saved.
      tx: An optax transformation.
      weighting: How tokens are weighted.
      mesh: Axes data, fsdp and tensor (`make_mesh`); by default the model's.
      hooks: Called between steps, in order.
      workdir: The folder of the run: a local path or gs://.
      normalize: "tokens" divides the loss by the supervised tokens of the whole batch, "weights"
        by the sum of their weights.
      ramp_steps: Steps over which the weights ramp from 1 to their full values; 0 for no ramp.
      chunk_size: Tokens per chunk of logits; None lets the loss choose.
      clip_norm: Maximum global gradient norm; 0 disables clipping.
      accumulation: Micro-batches per batch.
      schedule: Learning rate by step, for logging only; `tx` has its own.
      log_every: Steps between logged metrics.
      nonfinite_limit: How many steps with a non-finite loss or gradient are skipped, with the
        state unchanged; one more ends training.
      checkpoint: When checkpoints are saved and which are kept.
      telemetry: What is written in addition to metrics.jsonl.
      run: Settings as JSON types, saved with each checkpoint; they must be equal to resume.

    Raises:
      ValueError: If the mesh lacks an axis, or is left out with several processes.

    Example:
      >>> config = models.DecoderConfig(vocab_size=11, hidden_size=8, intermediate_size=16,
      ...                               num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4)
      >>> model = models.Decoder(config, rngs=nnx.Rngs(0))
      >>> import numpy as np
      >>> tokens = np.arange(1, 9).reshape(2, 4)
      >>> batch = {"tokens": tokens, "labels": tokens + 1, "mask": tokens > 1}
      >>> trainer = Trainer(model, tx=optax.adam(1e-2), weighting=losses.RankTuner("one"))
      >>> result = trainer.fit([batch] * 5, steps=5)
      >>> result.steps, result.metrics["train/nll"] < 2.5
      (5, True)
    """

    def __init__(
        self,
        model: models.Decoder,
        *,
        tx: optax.GradientTransformation,
        weighting: losses.Weighting = losses.RankTuner(),  # noqa: B008 (frozen)
        mesh: Mesh | None = None,
        hooks: Sequence[Hook] = (),
        workdir: str | os.PathLike[str] | None = None,
        normalize: Literal["tokens", "weights"] = "tokens",
        ramp_steps: int = 0,
        chunk_size: int | None = None,
        clip_norm: float = 0.0,
        accumulation: int = 1,
        schedule: optax.Schedule | None = None,
        log_every: int = 1,
        nonfinite_limit: int = 0,
        checkpoint: CheckpointConfig = CheckpointConfig(),  # noqa: B008 (frozen)
        telemetry: TelemetryConfig = TelemetryConfig(),  # noqa: B008 (frozen)
        run: Mapping[str, Any] | None = None,
    ) -> None:
        _check(weighting, tx, hooks)
        for name, value, least in (
            ("ramp_steps", ramp_steps, 0),
            ("clip_norm", clip_norm, 0),
            ("accumulation", accumulation, 1),
            ("log_every", log_every, 1),
            ("nonfinite_limit", nonfinite_limit, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}: got {value}.")
        self.mesh = model.mesh = _mesh_of(model, mesh)
        self.tx, self.weighting, self.hooks = tx, weighting, list(hooks)
        self._calls = HookCalls(self.hooks)
        self.workdir = None if workdir is None else epath.Path(workdir)
        self.steps_done = 0
        self._model = model
        self._state: TrainState | None = None
        step_options = {
            "weighting": weighting,
            "normalize": normalize,
            "ramp_steps": ramp_steps,
            "chunk_size": chunk_size,
            "clip_norm": clip_norm,
            "schedule": schedule,
        }
        self._program = StepProgram(self.mesh, accumulation, step_options)
        self._run = {"weighting": repr(weighting)} if run is None else run
        self._telemetry = Telemetry(self.workdir, telemetry, self._run)
        self._log_every, self._nonfinite_limit = log_every, nonfinite_limit
        self._checkpoint = checkpoint
        self._checkpoints: Checkpoints | None = None
        self._users = 0  # Nested `with` blocks; the outermost closes the files.
        self._source: BatchSource | None = None
        self._position: Any = None  # Of the batches, from a checkpoint.
        self._log: StepLog | None = None
        self._notice: StopNotice | None = None
        self._stop_reason = ""

    # --- What hooks may use between steps.

    @property
    def model(self) -> models.Decoder:
        """The model, with the latest parameters."""
        if self._state is not None:
            nnx.update(self._model, self._state.params, self._state.base)
        return self._model

    @property
    def state(self) -> TrainState:
        """The train state; the optimizer state is created on first use."""
        if self._state is None:
            self._state = init_state(self._model, self.tx, self.mesh)
            nnx.update(self._model, self._state.params, self._state.base)
        return self._state

    @property
    def metrics(self) -> dict[str, float]:
        """The latest value of each metric by name, such as "train/loss"."""
        return self._telemetry.metrics

    @property
    def metric_steps(self) -> dict[str, int]:
        """The step of each of these values."""
        return self._telemetry.metric_steps

    @property
    def step_memory_gb(self) -> float | None:
        """What the compiled step needs on each device, in GB; None before the first step."""
        return self._program.memory_gb

    @property
    def profile_path(self) -> os.PathLike[str] | None:
        """A local folder for profiler traces of this run; None without a workdir."""
        return self._telemetry.profile_path

    def log(self, metrics: Mapping[str, float]) -> None:
        """Records metrics of the last step, by names such as "eval/nll"."""
        self._telemetry.record(self.steps_done, metrics)

    def say(self, text: str) -> None:
        """Prints a line above the progress bar, on process 0."""
        self._telemetry.progress.say(text)

    def evaluating(self, done: int, total: int) -> None:
        """Shows the progress of an evaluation; raises `Stopped` if the run was asked to stop."""
        self._telemetry.progress.evaluation(done, total)
        if self._notice is not None:
            self._notice.check()

    def stop(self, reason: str) -> None:
        """Ends `fit` after the current step, as if it were the last one.

        Args:
          reason: The value of `FitResult.stopped`.
        """
        self._stop_reason = reason

    def read_metrics(self) -> None:
        """Waits for the last step; `metrics` then has its values."""
        if self._log is not None:
            self._log.read()

    # --- Training, checkpoints and evaluation.

    def fit(
        self, batches: Batches, steps: int, *, batch_size: int | None = None, seed: int = 0
    ) -> FitResult:
        """Trains until `steps` steps are done, including those before a resume.

        On SIGTERM and Ctrl-C, finishes the current step and saves before raising `Stopped`.

        Args:
          batches: Rows of `data.load_rows`, or an iterable of batches (`Batch`, or its arrays by
            name) from the beginning of the run, of which each process passes its own rows. To
            resume, an iterator with grain's `get_state` and `set_state` has its state restored; of
            any other, one batch is skipped for each step already done.
          steps: Steps of the whole run.
          batch_size: Rows per step over all processes; required for rows, not allowed for batches.
          seed: Seed of the order of the rows.

        Raises:
          Stopped: If a signal arrived; with a workdir, everything is saved.
          DivergedError: If a step is not finite.
          RunError: If a checkpoint cannot be written.
          UserError: If the workdir has checkpoints and `resume` was not called, or batches run out
            or have the wrong shape.
          ValueError: If an argument is invalid.
        """
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(f"steps must be a whole number of steps: got {steps!r}.")
        self._stop_reason = ""
        with StopNotice() as notice, self._training(steps, notice):
            self._open_source(batches, batch_size, seed)
            self._calls.start(self)
            try:
                with notice.deferred():
                    self._run_steps(steps, notice)
            except NonFiniteError as found:
                # The state is that before the step; the batches are ahead of it.
                self.steps_done, self._source, self._position = found.step - 1, None, None
                raise stop_at(found, self.state, self.workdir, self._run) from None
            if self._checkpoints is not None:
                self._checkpoints.wait()
            self._calls.finish(self)
        return FitResult(self.steps_done, dict(self.metrics), self._stop_reason)

    def step(self, batch: data.Batch | Mapping[str, Any]) -> dict[str, jax.Array]:
        """Takes one step, for custom training loops; nothing is logged or saved.

        A step with a non-finite loss or gradient leaves the state unchanged.

        Args:
          batch: This process's rows.

        Returns:
          The metrics, computed asynchronously: "loss", "nll", "grad_norm", "nonfinite" and so on.
        """
        metrics = self._take_step(self._program.place(batch), self._program.off)
        nnx.update(self._model, self.state.params, self.state.base)
        return metrics

    def save(self) -> None:
        """Saves a checkpoint; returns once it is on disk.

        Raises:
          RunError: If it cannot be written.
          ValueError: If the trainer has no workdir.
        """
        if self.workdir is None:
            raise ValueError("save needs a trainer with a workdir.")
        with self:
            self._save()
            assert self._checkpoints is not None
            self._checkpoints.wait()

    def resume(self) -> int:
        """Restores the newest intact checkpoint of the workdir.

        Returns:
          The step of the checkpoint; 0 if there is none.

        Raises:
          UserError: If all checkpoints are corrupt, or they belong to a run with another config.
          ValueError: If the trainer has no workdir.
        """
        if self.workdir is None:
            raise ValueError("resume needs a trainer with a workdir.")
        with self:
            assert self._checkpoints is not None
            if not self._checkpoints.steps:
                return 0
            restored = self._checkpoints.restore(self.state)
            for note in restored.notes:
                self.say(note)
            self._state, self.steps_done = restored.state, restored.step
            self._telemetry.rewind(restored.step)
            self._source, self._position = None, restored.data["batches"]
            for name, (step, value) in restored.data["metrics"].items():
                self._telemetry.record(step, {name: value}, write=False)
            nnx.update(self._model, self._state.params, self._state.base)
            self._calls.set_state(restored.data["hooks"])
        return self.steps_done

    def evaluate(
        self,
        rows: data.Rows,
        *,
        tokenizer: Any = None,
        examples: Sequence[data.Example] = (),
        config: evals.EvalConfig = evals.EvalConfig(),  # noqa: B008 (frozen)
    ) -> evals.EvalResult:
        """Evaluates the current model with `evals.evaluate`: NLL of rows and accuracy of answers.

        Args:
          rows: Held-out rows.
          tokenizer: Decodes completions; required with `examples` only.
          examples: Held-out questions.
          config: Settings of the evaluation.
        """
        return evals.evaluate(
            self.model,
            tokenizer,
            rows=rows,
            examples=examples,
            config=config,
            progress=self.evaluating,
        )

    def replay(self, step: int) -> dict[str, float]:
        """Repeats a non-finite step, from the state and the batch that were saved.

        Args:
          step: The step that `fit` named when it raised.

        Returns:
          The metrics of the step: "loss", "grad_norm" and so on.

        Raises:
          UserError: If no such step was saved.
          ValueError: If the trainer has no workdir.
        """
        if self.workdir is None:
            raise ValueError("replay needs a trainer with a workdir.")
        self._state, batch = load_step(self.workdir, step, self.state, self._run)
        # Merges the micro-batches: `step` splits the batch again.
        rows = jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), batch)
        metrics = jax.device_get(self.step(rows))
        return {name: float(value) for name, value in metrics.items() if not value.ndim}

    # --- Files, which stay open while any `with` block is active.

    def __enter__(self) -> Trainer:
        self._users += 1
        if self._users == 1 and self.workdir is not None:
            params, base = nnx.state(self.model, nnx.Param, ...)
            self._checkpoints = Checkpoints(
                self.workdir, self._checkpoint, self._run, params, base=base
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._users -= 1
        if self._users:
            return
        checkpoints, self._checkpoints = self._checkpoints, None
        with contextlib.ExitStack() as stack:
            # Closing waits for all processes, and one may be dead.
            failed = isinstance(error, Exception) and not isinstance(error, UserError)
            if checkpoints is not None and not (failed and jax.process_count() > 1):
                stack.callback(checkpoints.close)
            stack.callback(self._telemetry.close)

    @contextlib.contextmanager
    def _training(self, steps: int, notice: StopNotice) -> Iterator[None]:
        """Opens the files and hooks that `fit` needs, and closes them."""
        with self, contextlib.ExitStack() as stack:
            saved = self._checkpoints.steps if self._checkpoints else []
            if max(saved, default=0) > self.steps_done:
                raise UserError(
                    f"{self.workdir}: has checkpoint {max(saved)} of an earlier run; call resume() "
                    "before fit(), or use another workdir"
                )
            self.open_telemetry(steps)
            self._log = StepLog(
                self._telemetry,
                Utilisation(
                    self._model.config,
                    self.mesh.devices.flatten().tolist(),
                    self._model.layers.lora,
                ),
                steps,
                every=self._log_every,
                # Non-finite steps did not advance the state's step.
                skipped=self.steps_done - int(self.state.step),
                limit=self._nonfinite_limit,
            )
            self._notice = notice
            stack.callback(setattr, self, "_notice", None)
            stack.callback(self._calls.close)
            yield

    def open_telemetry(self, steps: int) -> None:
        """Opens the progress bar and, with a workdir, the metrics files.

        `fit` calls it. Call it earlier, inside `with trainer:`, to show lines and record metrics
        before the first step.

        Args:
          steps: Steps of the whole run.
        """
        saved = self._checkpoints.steps if self._checkpoints else []
        # Before `resume`, keep the metrics up to the newest checkpoint.
        start = self.steps_done or max(saved, default=-1)
        self._telemetry.open(steps, start)

    # --- The steps.

    def _run_steps(self, steps: int, notice: StopNotice) -> None:
        """The training loop."""
        log, source = self._log, self._source
        assert log is not None
        assert source is not None
        hold = self._program.off
        if self.steps_done < steps and self._calls.call_pending(self):
            raise Stopped(f"stopped and saved after step {self.steps_done}")
        while self.steps_done < steps and not self._stop_reason:
            number = self.steps_done + 1
            self._calls.before_step(self, number)
            batch = self._program.place(source.next(number), source.widths)
            if self._program.compile(self.state, batch):
                log.restart_clock()
            metrics = self._take_step(batch, hold)
            log.read_previous_then_hold(number, metrics, batch)
            # If one more non-finite step would end the run, the step after it must not change the
            # state, which is saved once the host has read the metrics.
            at_limit = log.skipped >= self._nonfinite_limit
            hold = metrics["nonfinite"] if at_limit else self._program.off

            stopping = notice.reached()
            if number < steps and self._calls.are_due(number):
                log.read()
                stopping = self._calls.after_step(self, number, stopping)
                log.restart_clock()
            last = number == steps or bool(self._stop_reason)
            every = self._checkpoint.every_steps
            if last or stopping or (every and number % every == 0):
                log.read()  # Only save a state that is known to be finite.
                self._save()
                log.restart_clock()
            if stopping:
                if self._checkpoints is None:
                    raise Stopped(f"stopped after step {number}; not saved, without a workdir")
                self._checkpoints.wait()
                raise Stopped(f"stopped and saved after step {number}")
        nnx.update(self._model, self.state.params, self.state.base)

    def _take_step(self, batch: data.Batch, hold: jax.Array) -> Metrics:
        self._program.compile(self.state, batch)
        state, self._state = self.state, None  # It is donated.
        self._state, metrics = self._program(state, batch, hold)
        self.steps_done += 1
        return metrics

    def _save(self) -> None:
        if self._checkpoints is None:
            return
        steps = self.metric_steps
        saved = {
            "batches": self._source.position() if self._source else self._position,
            "hooks": self._calls.get_state(),
            "metrics": {name: [steps[name], value] for name, value in self.metrics.items()},
        }
        self._checkpoints.save(self.steps_done, self.state, saved)

    def _open_source(self, batches: Batches, batch_size: int | None, seed: int) -> None:
        """Opens the batches at the position of the run."""
        if self._source is not None and self._source.wraps(batches):
            return
        position = self._source.position() if self._source else self._position
        self._source = BatchSource(batches, self.mesh, batch_size, seed)
        self._source.set_position(position, self.steps_done, self.say)


def _check(weighting: object, tx: object, hooks: object) -> None:
    """Raises TypeError if an argument is not an object of its kind."""
    if not isinstance(weighting, losses.Weighting):
        raise TypeError(f"weighting must be such as losses.RankTuner('one'): got {weighting!r}.")
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(f"tx must be such as optax.adamw(1e-5): got {tx!r}.")
    for hook in hooks if isinstance(hooks, Sequence) else [hooks]:
        if not isinstance(hook, Hook):
            raise TypeError(
                "hooks must be a list of hooks; wrap a function as Hook(function, every=10): got "
                f"{hook!r}."
            )
    if not isinstance(hooks, Sequence):
        raise TypeError(f"hooks must be a list of hooks: got {hooks!r}.")


def _mesh_of(model: models.Decoder, mesh: Mesh | None) -> Mesh:
    """The mesh to train on."""
    mesh = mesh or model.mesh
    if mesh is None:
        if jax.process_count() > 1:
            raise ValueError("mesh is required with several processes: see make_mesh.")
        [device] = model.unembed.devices()
        return make_mesh(MeshConfig(data=1), [device])
    if missing := {"data", "fsdp", "tensor"} - set(mesh.axis_names):
        raise ValueError(
            f"mesh must have the axes data, fsdp and tensor: got {mesh.axis_names}, without "
            f"{sorted(missing)}. `make_mesh` creates one."
        )
    return mesh
