"""The configuration of a run: its keys, where they are read from, and how they are shown."""

from ranktuner_jax.train.config.files import config_names
from ranktuner_jax.train.config.load import load_config, read_config
from ranktuner_jax.train.config.lora import LoraConfig
from ranktuner_jax.train.config.schema import (
    CheckpointConfig,
    HooksConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    StepConfig,
    TelemetryConfig,
    TrainConfig,
)
from ranktuner_jax.train.config.show import describe, differences, to_dict

__all__ = [
    "CheckpointConfig",
    "HooksConfig",
    "LoraConfig",
    "LossConfig",
    "MeshConfig",
    "OptimizerConfig",
    "StepConfig",
    "TelemetryConfig",
    "TrainConfig",
    "config_names",
    "describe",
    "differences",
    "load_config",
    "read_config",
    "to_dict",
]
