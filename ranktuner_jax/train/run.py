"""Everything that a run needs, opened once, in one place."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from ranktuner_jax import data, evals, files, losses, models
from ranktuner_jax.errors import UserError
from ranktuner_jax.models import hf
from ranktuner_jax.train.config import LoraConfig, TrainConfig, read_config, to_dict
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
from ranktuner_jax.train.saving.card import model_card
from ranktuner_jax.train.saving.checkpoint import Checkpoints, Restored
from ranktuner_jax.train.saving.workdir import claim_workdir
from ranktuner_jax.train.step.optimizers import make_optimizer
from ranktuner_jax.train.step.schedules import make_schedule
from ranktuner_jax.train.trainer import Trainer

__all__ = ["Run", "replay", "with_adapter", "with_trained"]


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
    def adapter(self) -> pathlib.Path | None:
        """PEFT's folder of the initial adapters; None if the model has none or new ones."""
        if not self.config.lora.adapter:
            return None
        folder = pathlib.Path(self.config.lora.adapter)
        if not (folder / hf.ADAPTER_CONFIG).is_file():
            raise UserError(
                f"lora.adapter: expected PEFT's folder, found no {folder / hf.ADAPTER_CONFIG}"
            )
        return folder

    @property
    def model_name(self) -> str:
        """The folder of the initial model, and that of its adapters if it has any."""
        return " with ".join(map(str, filter(None, (self.folder, self.adapter))))

    @property
    def model_stamp(self) -> str:
        """Changes when a file of the initial model does; see `files.stamp`."""
        return " ".join(map(files.stamp, filter(None, (self.folder, self.adapter))))

    @functools.cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer, with the chat template of the config."""
        return data.load_tokenizer(self.folder, self.config.data.chat_template)

    @functools.cached_property
    def stop_ids(self) -> list[int]:
        """The tokens that end a turn."""
        return evals.stop_ids(self.tokenizer)

    def check(self) -> None:
        """Checks what can be without a tokenizer and a model: the mesh, the batch and the sources.

        Raises:
          UserError: If a batch cannot be divided over the mesh, or a source or a split does not
            exist.
        """
        self._check_batch()
        data.check_sources(self.config.data, self.config.data.split, self.config.eval.split)

    def _check_batch(self) -> None:
        train = self.config.train
        check_batch(self.mesh, train.batch_size, train.accumulation)
        row_share(self.mesh)

    @functools.cached_property
    def rows(self) -> data.Rows:
        """The training rows; checks that a batch can be divided over the mesh."""
        self._check_batch()
        size = self.config.train.batch_size
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
        data.check_sources(self.config.data, self.config.eval.split)
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
        """The initial model, on the mesh, with the adapters of the config."""
        return self._load(self.mesh)

    def _load(self, mesh: Mesh) -> models.Decoder:
        model = self._load_base(mesh, **self.config.lora.types(self.config.train.param_dtype))
        self._adapt(model)
        return model

    def _load_base(self, mesh: Mesh, **types: Any) -> models.Decoder:
        train = self.config.train
        return models.load_pretrained(
            self.folder,
            mesh=mesh,
            dtype=jnp.dtype(train.compute_dtype),
            remat=train.remat,
            **types,
        )

    def _adapt(self, model: models.Decoder) -> None:
        """Adds the initial adapters of the config, if it has any."""
        new, dtype = self.config.lora.new_adapters, jnp.dtype(self.config.train.param_dtype)
        if self.adapter is not None:
            models.load_adapter(model, self.adapter, dtype=dtype)
            assert model.layers.lora is not None
            dropout = self.config.lora.dropout
            model.layers.lora = dataclasses.replace(model.layers.lora, dropout=dropout)
        elif new is not None:
            models.add_adapters(model, new, rngs=nnx.Rngs(self.config.seed), dtype=dtype)

    def unquantized(self, model: models.Decoder) -> models.Decoder:
        """A model whose frozen matrices are those of the run's folder, not rounded to 4 or 8 bits.

        That is what PEFT's users merge, and what vLLM serves an adapter with.

        Args:
          model: One of this run's, with adapters; itself if its base is not quantised.
        """
        types = self.config.lora.types(self.config.train.param_dtype)
        if not types["quantized"]:
            return model
        assert model.mesh is not None
        assert model.layers.lora is not None
        whole = self._load_base(model.mesh, **types | {"quantized": ""})
        models.set_adapters(whole, model.layers.lora, models.adapter_factors(model))
        return whole

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

    def save_pretrained(
        self,
        model: models.Decoder,
        output: str | os.PathLike[str],
        steps: int | None = None,
        results: Mapping[str, evals.EvalResult] | None = None,
    ) -> None:
        """Writes a model as a Hugging Face folder: tokenizer, chat template and model card as well.

        Of a model with adapters it is PEFT's folder, without the frozen parameters.

        Args:
          model: The model.
          output: The folder, which must not exist yet.
          steps: Steps after which the model was taken, for its card.
          results: Evaluations for its card, by the heading of their column.

        Raises:
          UserError: If the folder exists or cannot be written.
        """
        card = model_card(self.config, self.workdir or "", steps, results)
        template = self.config.data.chat_template and self.tokenizer.get_chat_template()
        if model.layers.lora is not None:
            models.save_adapter(
                model,
                output,
                base=self.config.model,
                tokenizer_from=self.folder,
                chat_template=template,
                card=card,
            )
            return
        models.save_pretrained(
            model,
            output,
            tokenizer_from=self.folder,
            chat_template=template,
            stop_ids=self.stop_ids,
            card=card,
        )

    def restore_model(
        self, mesh: Mesh, step: int | None = None, *, base: bool = True
    ) -> Restored[models.Decoder]:
        """The model of a checkpoint; the optimizer state is not read.

        Args:
          mesh: The mesh to place its parameters on, which may differ from the run's.
          step: Step of the checkpoint; by default the newest intact one.
          base: Whether to read the frozen parameters of a run with adapters too; without them the
            model has shapes in their place.

        Raises:
          UserError: If there is no such checkpoint.
        """
        assert self.workdir is not None
        base = base and self.config.lora.is_on
        if base:
            initial = self._load(mesh)
        else:
            # With a tensor axis, the vocabulary in the checkpoint is padded to a multiple of it.
            decoder = dataclasses.replace(
                models.read_config(self.folder), vocab_multiple=max(1, self.config.mesh.tensor)
            )
            initial = nnx.merge(
                *hf.abstract_decoder(
                    decoder, mesh=mesh, param_dtype=jnp.dtype(self.config.train.param_dtype)
                )
            )
            self._adapt(initial)
        graph, _ = nnx.split(initial)
        params, frozen = nnx.state(initial, nnx.Param, ...)
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            params,
        )
        with contextlib.closing(
            Checkpoints(
                self.workdir,
                self.config.checkpoint,
                to_dict(self.config),
                shapes,
                read_only=True,
                base=frozen if base else None,
            )
        ) as checkpoints:
            known = checkpoints.steps
            if not known or (step is not None and step not in known):
                raise UserError(
                    f"--step: expected one of the checkpoints of {self.workdir} "
                    f"({', '.join(map(str, known)) or 'it has none'}), got {step}"
                )
            restored = checkpoints.restore_params(shapes, step)
        model = nnx.merge(graph, restored.state, frozen)
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


def with_trained(config: TrainConfig, folder: str | os.PathLike[str]) -> TrainConfig:
    """The config with the model that a run of it has exported in the place of the initial one.

    Args:
      config: The config of the run.
      folder: The folder that it exported: a whole model, or adapters.
    """
    if pathlib.Path(folder, hf.ADAPTER_CONFIG).exists():
        return with_adapter(config, os.fspath(folder))
    return dataclasses.replace(config, model=os.fspath(folder), lora=LoraConfig())


def with_adapter(config: TrainConfig, folder: str) -> TrainConfig:
    """The config with trained adapters in the place of new ones; without any if `folder` is ""."""
    lora = LoraConfig(adapter=folder, base=config.lora.base if folder else "")
    return dataclasses.replace(config, lora=lora)


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
