"""Everything that a run needs, opened once, in one place."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import optax
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from ranktuner_jax import data, evals, losses, models
from ranktuner_jax.errors import UserError
from ranktuner_jax.models import hf
from ranktuner_jax.train.config import TrainConfig, read_config, to_dict
from ranktuner_jax.train.config.load import write_out
from ranktuner_jax.train.held_out import HeldOut
from ranktuner_jax.train.hooks import (
    Evaluate,
    Hook,
    KeepBest,
    Profile,
    SampleCompletions,
    StopEarly,
)
from ranktuner_jax.train.runtime.mesh import check_batch, make_mesh, row_share
from ranktuner_jax.train.saving.checkpoint import Checkpoints, Restored
from ranktuner_jax.train.saving.workdir import claim_workdir
from ranktuner_jax.train.step.optimizers import make_optimizer
from ranktuner_jax.train.step.schedules import make_schedule
from ranktuner_jax.train.trainer import Trainer

__all__ = ["Run", "replay"]


class Run:
    """A config and the objects that it describes, each created on first use and then kept.

    Training, evaluation, export, benchmarks and the replay of a step all start here.

    Attributes:
      config: The config.
      workdir: The folder of the run, or None.

    Example:
      >>> from ranktuner_jax.train import load_config
      >>> run = Run.open(load_config("smollm2_chain_sum", ["--config.loss.weighting=sft"]))
      >>> run.weighting, run.config.train.batch_size
      (SFT(), 2)
    """

    def __init__(self, config: TrainConfig, workdir: epath.Path | None) -> None:
        self.config, self.workdir = write_out(config), workdir

    @classmethod
    def open(
        cls,
        config_or_workdir: TrainConfig | str | os.PathLike[str],
        *,
        workdir: str | os.PathLike[str] | None = None,
    ) -> Run:
        """Opens a run.

        Args:
          config_or_workdir: A config (`load_config` reads one from a file), or the folder of an
            existing run: its config is read from there, and whatever its config file registers is
            registered.
          workdir: The folder of the run, if a config is given.

        Raises:
          UserError: If the folder does not hold a run.
        """
        if isinstance(config_or_workdir, TrainConfig):
            return cls(config_or_workdir, None if workdir is None else epath.Path(workdir))
        return cls(read_config(config_or_workdir), epath.Path(config_or_workdir))

    def claim(self) -> None:
        """Marks the workdir as this run's: writes config.json and a copy of the user's config file.

        Raises:
          UserError: If the folder cannot be written, or holds a run with another config.
          ValueError: If there is no workdir.
        """
        if self.workdir is None:
            raise ValueError("claim needs a run with a workdir.")
        claim_workdir(self.workdir, self.config)()

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The mesh."""
        return make_mesh(self.config.mesh)

    @functools.cached_property
    def folder(self) -> pathlib.Path:
        """The Hugging Face folder of the initial model."""
        return models.resolve(self.config.model)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer, with the chat template of the config."""
        return data.load_tokenizer(self.folder, self.config.data.chat_template)

    @functools.cached_property
    def stop_ids(self) -> list[int]:
        """The tokens that end a turn."""
        return evals.stop_ids(self.tokenizer)

    @functools.cached_property
    def rows(self) -> data.Rows:
        """The training rows; checks that a batch can be divided over the mesh."""
        size = self.config.train.batch_size
        check_batch(self.mesh, size, self.config.train.accumulation)
        row_share(self.mesh)
        rows = data.load_rows(
            self.config.data, self.tokenizer, seed=self.config.seed, min_rows=size
        )
        if size > len(rows):
            raise UserError(
                "train.batch_size: expected at most the number of rows in the data, "
                f"{len(rows)}, got {size}; reduce --config.train.batch_size, or add rows"
            )
        return rows

    @functools.cached_property
    def held_out(self) -> HeldOut:
        """The data that the run is evaluated on."""
        return HeldOut(self.config, self.folder, self.tokenizer)

    @functools.cached_property
    def steps(self) -> int:
        """The optimizer steps of the whole run."""
        train = self.config.train
        if train.epochs is None:
            return train.steps
        return max(1, math.floor(train.epochs * len(self.rows) / train.batch_size))

    @functools.cached_property
    def model(self) -> models.Decoder:
        """The initial model, on the mesh."""
        train = self.config.train
        return models.load_pretrained(
            self.folder,
            mesh=self.mesh,
            dtype=jnp.dtype(train.compute_dtype),
            param_dtype=jnp.dtype(train.param_dtype),
            remat=train.remat,
        )

    @functools.cached_property
    def weighting(self) -> losses.Weighting:
        """How tokens are weighted."""
        return self.config.loss.make_weighting()

    @functools.cached_property
    def tx(self) -> optax.GradientTransformation:
        """The optimizer."""
        return make_optimizer(self.config.optimizer, self.steps)

    @functools.cached_property
    def step_options(self) -> dict[str, Any]:
        """The keyword arguments of `make_train_step`."""
        loss = self.config.loss
        return {
            "weighting": self.weighting,
            "normalize": loss.normalize,
            "ramp_steps": loss.ramp_steps,
            "chunk_size": loss.chunk_size or None,
            "clip_norm": self.config.optimizer.clip_norm,
            "schedule": make_schedule(self.config.optimizer, self.steps),
        }

    def trainer(self, hooks: Sequence[Hook] = ()) -> Trainer:
        """A trainer of the run's model, with its optimizer and its workdir, which it claims.

        Args:
          hooks: Called between steps; `make_hooks` creates those of the config.
        """
        if self.workdir is not None:
            self.claim()
        train = self.config.train
        return Trainer(
            self.model,
            tx=self.tx,
            mesh=self.mesh,
            hooks=hooks,
            workdir=self.workdir,
            accumulation=train.accumulation,
            log_every=train.log_every,
            nonfinite_limit=train.nonfinite_limit if train.on_nonfinite == "skip" else 0,
            checkpoint=self.config.checkpoint,
            telemetry=self.config.telemetry,
            run=to_dict(self.config),
            **self.step_options,
        )

    def make_hooks(self) -> list[Hook]:
        """The hooks of the config; the evaluation comes first.

        Raises:
          UserError: If a hook needs answers to questions and there are none.
        """
        config, every = self.config.hooks, self.config.eval.every_steps
        for name in ("keep_best", "stop_early"):
            if getattr(config, name) == "eval/accuracy" and not self.held_out.questions:
                raise UserError(
                    f"hooks.{name}=eval/accuracy: expected questions to answer, found none in the "
                    "held-out rows; set eval.task, or use eval/nll"
                )
        hooks: list[Hook] = [Evaluate(self.held_out.evaluate, size=self.held_out.size, every=every)]
        if config.samples:
            chosen = self.held_out.examples(config.samples)
            length = self.config.eval.max_new_tokens
            hooks.append(
                SampleCompletions(self.tokenizer, chosen, max_new_tokens=length, every=every)
            )
        if config.keep_best:
            hooks.append(
                KeepBest(
                    config.keep_best,
                    mode=config.mode(config.keep_best),
                    every=every,
                    save=self.save_pretrained,
                )
            )
        if config.stop_early:
            hooks.append(
                StopEarly(
                    config.stop_early,
                    mode=config.mode(config.stop_early),
                    patience=config.patience,
                    every=every,
                )
            )
        if self.config.train.profile_steps:
            first, last = self.config.train.profile_steps
            hooks.append(Profile(first, last))
        return hooks

    def save_pretrained(self, model: models.Decoder, output: str | os.PathLike[str]) -> None:
        """Writes a model as a Hugging Face folder, with the run's tokenizer and chat template.

        Raises:
          UserError: If the folder exists or cannot be written.
        """
        template = self.config.data.chat_template and self.tokenizer.get_chat_template()
        models.save_pretrained(
            model,
            output,
            tokenizer_from=self.folder,
            chat_template=template,
            stop_ids=self.stop_ids,
        )

    def restore_model(self, mesh: Mesh, step: int | None = None) -> Restored[models.Decoder]:
        """The model of a checkpoint; the optimizer state is not read.

        Args:
          mesh: The mesh to place its parameters on, which may differ from the run's.
          step: Step of the checkpoint; by default the newest intact one.

        Raises:
          UserError: If there is no such checkpoint.
        """
        assert self.workdir is not None
        # With a tensor axis, the vocabulary in the checkpoint is padded to a multiple of its size.
        decoder = dataclasses.replace(
            models.read_config(self.folder), vocab_multiple=max(1, self.config.mesh.tensor)
        )
        graph, shapes = hf.abstract_decoder(
            decoder, mesh=mesh, param_dtype=jnp.dtype(self.config.train.param_dtype)
        )
        with contextlib.closing(
            Checkpoints(
                self.workdir, self.config.checkpoint, to_dict(self.config), shapes, read_only=True
            )
        ) as checkpoints:
            known = checkpoints.steps
            if not known or (step is not None and step not in known):
                raise UserError(
                    f"--step: expected one of the checkpoints of {self.workdir} "
                    f"({', '.join(map(str, known)) or 'it has none'}), got {step}"
                )
            restored = checkpoints.restore_params(shapes, step)
        model = nnx.merge(graph, restored.state)
        return Restored(model, restored.data, restored.step, restored.notes)


def replay(workdir: str | os.PathLike[str], step: int) -> dict[str, float]:
    """Repeats a non-finite step of a run, from the state and the batch saved when it stopped.

    Args:
      workdir: The folder of the run.
      step: The step that the error message named.

    Returns:
      The metrics of the step: "loss", "grad_norm" and so on.

    Raises:
      UserError: If no such step was saved.
    """
    return Run.open(workdir).trainer().replay(step)


def describe_devices(mesh: Mesh) -> str:
    """The devices of a mesh and how they are divided, as text.

    Example:
      >>> import jax
      >>> from ranktuner_jax.train import MeshConfig
      >>> describe_devices(make_mesh(MeshConfig(data=-1), jax.devices()[:1]))
      '1 cpu device'
    """
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    kind = mesh.devices.flat[0].device_kind
    return f"{mesh.size} {kind} device{'s' * (mesh.size > 1)}" + (f" ({axes})" if axes else "")
