"""Models of given shapes with random weights, and runs that train them."""

from __future__ import annotations

import numpy as np

from ranktuner_jax import data, models
from ranktuner_jax.train import Run, TrainConfig
from ranktuner_jax.train.random_model import random_model

__all__ = ["QWEN3_06B", "TINY", "random_batch", "random_run"]

QWEN3_06B = models.DecoderConfig(
    family="qwen3",
    vocab_size=151_936,
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    norm_eps=1e-6,
    rope=models.RopeConfig(rope_theta=1e6),
    qk_norm=True,
)
TINY = models.DecoderConfig(
    family="qwen3",
    vocab_size=509,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    qk_norm=True,
)


def random_run(model: models.DecoderConfig, config: TrainConfig) -> Run:
    """A run over all devices, of a model with random weights in the place of the config's."""
    run = Run.open(config)
    run.model = random_model(config, model, run.mesh)
    return run


def random_batch(model: models.DecoderConfig, rows: int, length: int) -> data.Batch:
    """Rows of random tokens, each one conversation, of which every token is supervised."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.vocab_size, (rows, length + 1))
    mask = np.ones((rows, length), bool)
    return data.Batch.of({"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "mask": mask})
