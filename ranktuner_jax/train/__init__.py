"""Training: one config in, a fine-tuned model and its numbers out."""

from ranktuner_jax.train.config import (
    CheckpointConfig,
    HooksConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    StepConfig,
    TelemetryConfig,
    TrainConfig,
    config_names,
    describe,
    differences,
    load_config,
    read_config,
    to_dict,
)
from ranktuner_jax.train.export import export
from ranktuner_jax.train.hooks import (
    Evaluate,
    Hook,
    KeepBest,
    Profile,
    SampleCompletions,
    StopEarly,
)
from ranktuner_jax.train.recipe import RunResult, train_and_evaluate
from ranktuner_jax.train.run import Run, replay
from ranktuner_jax.train.runtime.distributed import exit_without_waiting
from ranktuner_jax.train.runtime.mesh import check_batch, make_mesh, place_batch, row_share
from ranktuner_jax.train.runtime.preemption import Stopped
from ranktuner_jax.train.saving.checkpoint import Checkpoints
from ranktuner_jax.train.step.optimizers import OPTIMIZERS, make_optimizer
from ranktuner_jax.train.step.schedules import make_schedule
from ranktuner_jax.train.step.state import TrainState, init_state
from ranktuner_jax.train.step.train_step import make_train_step, sequence_ids
from ranktuner_jax.train.telemetry.writer import Writer
from ranktuner_jax.train.trainer import FitResult, Trainer

__all__ = [
    "OPTIMIZERS",
    "CheckpointConfig",
    "Checkpoints",
    "Evaluate",
    "FitResult",
    "Hook",
    "HooksConfig",
    "KeepBest",
    "LoraConfig",
    "LossConfig",
    "MeshConfig",
    "OptimizerConfig",
    "Profile",
    "Run",
    "RunResult",
    "SampleCompletions",
    "StepConfig",
    "StopEarly",
    "Stopped",
    "TelemetryConfig",
    "TrainConfig",
    "TrainState",
    "Trainer",
    "Writer",
    "check_batch",
    "config_names",
    "describe",
    "differences",
    "exit_without_waiting",
    "export",
    "init_state",
    "load_config",
    "make_mesh",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "place_batch",
    "read_config",
    "replay",
    "row_share",
    "sequence_ids",
    "to_dict",
    "train_and_evaluate",
]
