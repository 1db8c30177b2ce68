"""The keys of a config: frozen dataclasses, validated on construction."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from ranktuner_jax import losses, models
from ranktuner_jax.data import HOLDOUT, DataConfig
from ranktuner_jax.errors import UserError
from ranktuner_jax.evals import EvalConfig
from ranktuner_jax.train.config.checks import at_least, one_of, suggestion
from ranktuner_jax.train.config.lora import LoraConfig
from ranktuner_jax.train.step.optimizers import OPTIMIZERS, make_optimizer
from ranktuner_jax.train.step.schedules import SCHEDULES

__all__ = [
    "CheckpointConfig",
    "HooksConfig",
    "LossConfig",
    "MeshConfig",
    "OptimizerConfig",
    "StepConfig",
    "TelemetryConfig",
    "TrainConfig",
    "keys",
]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """How tokens are weighted.

    Attributes:
      weighting: The method: ranktuner, sft, dft, eaft, talr, profit, deft, idft or entropy.
      options: Options of that method; its defaults for those left out.
      normalize: "tokens" divides the loss by the supervised tokens of the whole batch (the
        paper), "weights" by the sum of their weights.
      ramp_steps: Steps over which the weights ramp from 1 to their full values; 0 for no ramp.
      chunk_size: Tokens per chunk of logits; 0 lets the loss choose.
    """

    weighting: str = "ranktuner"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    normalize: Literal["tokens", "weights"] = "tokens"
    ramp_steps: int = 0
    chunk_size: int = 0

    def __post_init__(self) -> None:
        one_of("loss.weighting", self.weighting, losses.WEIGHTINGS)
        one_of("loss.normalize", self.normalize, ("tokens", "weights"))
        at_least("loss.ramp_steps", self.ramp_steps, 0)
        at_least("loss.chunk_size", self.chunk_size, 0)
        self.make_weighting()

    def make_weighting(self) -> Any:
        """The weighting, built from its name and options."""
        method = losses.WEIGHTINGS[self.weighting]
        known = [field.name for field in dataclasses.fields(method)]
        for name in self.options:
            if name not in known:
                raise UserError(
                    f"loss.options: {self.weighting} takes {', '.join(known) or 'no options'}, "
                    f"got {name!r}{suggestion(name, known)}"
                )
        try:
            return method(**self.options)
        except (TypeError, ValueError) as error:
            raise UserError(f"loss.options of {self.weighting}: {error}") from error


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule.

    Attributes:
      name: "adamw", "adafactor", "lion" or "muon", each as in optax, or one that the config file
        registers in train.OPTIMIZERS. adafactor factors second moments over the two largest axes of
        [layers, heads, head_dim, embed] and computes the RMS of all layers together. muon updates
        the matrices of the layers, each in the shape that Hugging Face uses; AdamW updates
        embeddings, head, norms and biases.
      options: Options of that optimizer; its defaults for those left out. adamw has eps and
        nesterov; adafactor has min_dim_size_to_factor, decay_rate, clipping_threshold,
        multiply_by_parameter_scale (off by default) and momentum; muon has beta (its momentum),
        ns_steps, nesterov and consistent_rms; lion has none. All are as in optax, with 0 for None.
      learning_rate: Peak learning rate. For lion, a third to a tenth of adamw's is usual.
      schedule: The schedule after the warmup: "cosine" and "linear" decay to zero at the last step,
        "constant" does not decay, "wsd" is constant until its linear decay to zero.
      warmup_ratio: Fraction of the steps over which the learning rate rises from zero.
      decay_ratio: Fraction of the steps, at the end, over which "wsd" decays; used by "wsd" only.
      b1: Decay of the first moment in adamw and in the AdamW of muon; in lion, the weight of the
        first moment in the update. adafactor does not use it.
      b2: Decay of the second moment in adamw and in the AdamW of muon; in lion, which has no second
        moment, that of the first (0.99 in its paper). adafactor does not use it.
      moment_dtype: Type of the first moment, "float32" or "bfloat16"; "" is the type of the
        parameters, which the second moment always has. adafactor takes it only with its option
        momentum, without which it has no first moment.
      weight_decay: Decoupled weight decay, multiplied by the learning rate, on matrices only (not
        on norms and biases).
      clip_norm: Maximum global gradient norm; 0 disables clipping.
    """

    name: str = "adamw"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    learning_rate: float = 1e-5
    schedule: str = "cosine"
    warmup_ratio: float = 0.1
    decay_ratio: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    moment_dtype: str = ""
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        one_of("optimizer.name", self.name, OPTIMIZERS)
        one_of("optimizer.schedule", self.schedule, SCHEDULES)
        one_of("optimizer.moment_dtype", self.moment_dtype, ("", "float32", "bfloat16"))
        for name in ("learning_rate", "weight_decay", "clip_norm"):
            at_least(f"optimizer.{name}", getattr(self, name), 0)
        for name in ("warmup_ratio", "decay_ratio", "b1", "b2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise UserError(f"optimizer.{name}: expected a number in [0, 1), got {value}")
        if self.schedule == "wsd" and self.warmup_ratio + self.decay_ratio > 1:
            raise UserError(
                "optimizer.decay_ratio: expected at most 1 with optimizer.warmup_ratio added to it"
                f" ({self.warmup_ratio}), got {self.decay_ratio}"
            )
        make_optimizer(self, steps=1)  # Checks the options.


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The number, batch size and dtypes of the training steps.

    Attributes:
      steps: Optimizer steps.
      epochs: Passes over the data; if set, it replaces `steps`, unless these are given as an
        argument.
      batch_size: Rows per step, over all devices and micro-batches.
      accumulation: Micro-batches per step; more of them need less memory.
      log_every: Steps between logged metrics.
      remat: What the backward pass recomputes instead of storing: "none", "dots" (all but
        projections) or "full".
      compute_dtype: Type of the activations, "float32" or "bfloat16".
      param_dtype: Type of the parameters, and of the optimizer state unless
        optimizer.moment_dtype is set.
      on_nonfinite: What to do after a step with a non-finite loss or gradient, which never changes
        the state: "stop" ends the run and saves what is needed to replay the step, "skip" continues
        with the next rows.
      nonfinite_limit: How many steps of a run "skip" may skip; one more ends the run.
      profile_steps: First and last step of a profiler trace, such as 10,12, written to profile/ in
        the workdir; () for none.
    """

    steps: int = 100
    epochs: float | None = None
    batch_size: int = 16
    accumulation: int = 1
    log_every: int = 1
    remat: str = "none"
    compute_dtype: str = "float32"
    param_dtype: str = "float32"
    on_nonfinite: str = "stop"
    nonfinite_limit: int = 10
    profile_steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every"):
            at_least(f"train.{name}", getattr(self, name), 1)
        if self.epochs is not None and self.epochs <= 0:
            raise UserError(f"train.epochs: expected more than 0, got {self.epochs}")
        if self.batch_size % self.accumulation:
            raise UserError(
                f"train.batch_size: expected a multiple of train.accumulation "
                f"({self.accumulation}), got {self.batch_size}"
            )
        one_of("train.remat", self.remat, models.REMAT_POLICIES)
        one_of("train.on_nonfinite", self.on_nonfinite, ("stop", "skip"))
        at_least("train.nonfinite_limit", self.nonfinite_limit, 0)
        if self.profile_steps and not (
            len(self.profile_steps) == 2 and 1 <= self.profile_steps[0] <= self.profile_steps[1]
        ):
            raise UserError(
                "train.profile_steps: expected the first and the last step to trace, such as "
                f"10,12, got {self.profile_steps}"
            )
        for name in ("compute_dtype", "param_dtype"):
            one_of(f"train.{name}", getattr(self, name), ("float32", "bfloat16"))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The sizes of the device mesh; one of them may be -1, for all remaining devices.

    Attributes:
      data: Data parallelism: replicas of the model, each with its own rows.
      fsdp: Fully sharded data parallelism: devices that share one copy of the parameters, each
        with its own rows.
      tensor: Tensor parallelism: devices that share the computation of the same rows.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise UserError(
                f"mesh: expected sizes of at least 1, of which one may be -1, got data={self.data}"
                f" fsdp={self.fsdp} tensor={self.tensor}"
            )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved, and which are kept.

    Attributes:
      every_steps: Steps between checkpoints; 0 saves at the end only.
      keep_last: How many of the newest checkpoints to keep.
      keep_every: Checkpoints at multiples of this step are never deleted; 0 for none.
      asynchronous: Whether training continues while a checkpoint is written; this needs host memory
        for a second copy of the state.
    """

    every_steps: int = 0
    keep_last: int = 2
    keep_every: int = 0
    asynchronous: bool = True

    def __post_init__(self) -> None:
        at_least("checkpoint.every_steps", self.every_steps, 0)
        at_least("checkpoint.keep_last", self.keep_last, 1)
        at_least("checkpoint.keep_every", self.keep_every, 0)


# Metric of an evaluation -> whether lower is better.
_LOWER_IS_BETTER = {
    "eval/nll": True,
    "eval/perplexity": True,
    "eval/token_accuracy": False,
    "eval/accuracy": False,
}


@dataclasses.dataclass(frozen=True)
class HooksConfig:
    """What to do after each evaluation during training (see `eval.every_steps`).

    Attributes:
      keep_best: Metric by which the best model is kept in best/ of the workdir: eval/nll,
        eval/perplexity, eval/token_accuracy or eval/accuracy; empty for none.
      stop_early: One of these metrics: training stops once it no longer improves; empty for never.
      patience: Evaluations without improvement before stop_early stops training.
      samples: Number of held-out prompts whose completions are written to samples/ of the workdir
        at each evaluation.
    """

    keep_best: str = ""
    stop_early: str = ""
    patience: int = 3
    samples: int = 0

    def __post_init__(self) -> None:
        for name in ("keep_best", "stop_early"):
            if getattr(self, name):
                one_of(f"hooks.{name}", getattr(self, name), _LOWER_IS_BETTER)
        at_least("hooks.patience", self.patience, 1)
        at_least("hooks.samples", self.samples, 0)

    @staticmethod
    def mode(metric: str) -> Literal["min", "max"]:
        """Whether a lower ("min") or higher ("max") value of a metric is better."""
        return "min" if _LOWER_IS_BETTER[metric] else "max"


@dataclasses.dataclass(frozen=True)
class TelemetryConfig:
    """Where metrics are logged, in addition to metrics.jsonl in the workdir.

    Attributes:
      progress: Whether to show the progress of training, as a bar or as lines.
      tensorboard: Whether to write TensorBoard event files to tensorboard/ in the workdir.
      wandb: The Weights & Biases project to log to, as project or entity/project; empty for none.
    """

    progress: bool = True
    tensorboard: bool = True
    wandb: str = ""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The config of a run.

    Attributes:
      model: The model to fine-tune: a Hugging Face folder, a hub id, or "smollm2-135m".
      seed: Seed of the order of the data, and of new adapters.
      code: The source of the user's config file, if any; not a config key.
    """

    model: str = "smollm2-135m"
    seed: int = 0
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: StepConfig = dataclasses.field(default_factory=StepConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    hooks: HooksConfig = dataclasses.field(default_factory=HooksConfig)
    telemetry: TelemetryConfig = dataclasses.field(default_factory=TelemetryConfig)
    code: str = dataclasses.field(default="", repr=False, compare=False, metadata={"key": False})

    def __post_init__(self) -> None:
        if (self.eval.split == HOLDOUT) != (self.data.holdout > 0):
            raise UserError(
                "eval.split: expected 'holdout' if and only if data.holdout is above 0, got "
                f"eval.split={self.eval.split!r} and data.holdout={self.data.holdout}; set "
                "both, or data.holdout=0 and a split of the source"
            )
        for name in ("keep_best", "stop_early"):
            if getattr(self.hooks, name) and not self.eval.every_steps:
                raise UserError(
                    f"hooks.{name}: expected evaluations during training, got "
                    "eval.every_steps=0; set it to the steps between them"
                )


def keys(cls: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a config that are config keys: all but those marked otherwise."""
    return [field for field in dataclasses.fields(cls) if field.metadata.get("key", True)]
