"""Losses of supervised fine-tuning that weight each token. Needs jax alone.

`weighted_nll` takes logits and is the definition; `fused_weighted_nll` takes hidden
states and never holds the logits; `sharded_weighted_nll` is the same over a mesh.
All return a `LossOutput` and take any `Weighting`, by default `RankTuner()`.
"""

from ranktuner_jax.losses.dense import weighted_nll
from ranktuner_jax.losses.fused import fused_token_stats, fused_weighted_nll
from ranktuner_jax.losses.methods import (
    DEFT,
    DFT,
    EAFT,
    IDFT,
    SFT,
    TALR,
    WEIGHTINGS,
    Entropy,
    ProFit,
)
from ranktuner_jax.losses.plan import default_chunk_size
from ranktuner_jax.losses.ranktuner import RankTuner, relative_rank
from ranktuner_jax.losses.sharded import sharded_token_stats, sharded_weighted_nll
from ranktuner_jax.losses.stats import TokenStats, token_stats
from ranktuner_jax.losses.sums import HISTOGRAM_EDGES, NOISE_WIDTH, LossOutput, summarize
from ranktuner_jax.losses.weighting import Weighting

__all__ = [
    "DEFT",
    "DFT",
    "EAFT",
    "HISTOGRAM_EDGES",
    "IDFT",
    "NOISE_WIDTH",
    "SFT",
    "TALR",
    "WEIGHTINGS",
    "Entropy",
    "LossOutput",
    "ProFit",
    "RankTuner",
    "TokenStats",
    "Weighting",
    "default_chunk_size",
    "fused_token_stats",
    "fused_weighted_nll",
    "relative_rank",
    "sharded_token_stats",
    "sharded_weighted_nll",
    "summarize",
    "token_stats",
    "weighted_nll",
]
