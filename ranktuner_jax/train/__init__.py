"""Training: one config in, a fine-tuned model and its numbers out."""

from ranktuner_jax.train.checkpoint import Checkpoints, claim_workdir
from ranktuner_jax.train.config import (
    CheckpointConfig,
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
from ranktuner_jax.train.loop import FINISHED, PREEMPTED, train_and_evaluate
from ranktuner_jax.train.nonfinite import replay
from ranktuner_jax.train.sharding import check_batch, make_mesh, place_batch, row_share
from ranktuner_jax.train.state import init_state, make_optimizer, make_schedule
from ranktuner_jax.train.step import make_train_step, sequence_ids
from ranktuner_jax.train.writer import Writer

__all__ = [
    "FINISHED",
    "PREEMPTED",
    "CheckpointConfig",
    "Checkpoints",
    "LossConfig",
    "MeshConfig",
    "OptimizerConfig",
    "StepConfig",
    "TelemetryConfig",
    "TrainConfig",
    "Writer",
    "check_batch",
    "claim_workdir",
    "config_names",
    "describe",
    "differences",
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
