"""One decoder for the models of several families, from and to Hugging Face folders."""

from ranktuner_jax.models.config import DecoderConfig
from ranktuner_jax.models.decoder import REMAT_POLICIES, Cache, Decoder
from ranktuner_jax.models.families import FAMILIES, turn_ends
from ranktuner_jax.models.hf import read_config
from ranktuner_jax.models.partition import constrain, param_shardings
from ranktuner_jax.models.pretrained import load_pretrained, resolve, save_pretrained
from ranktuner_jax.models.rope import RopeConfig

__all__ = [
    "FAMILIES",
    "REMAT_POLICIES",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "RopeConfig",
    "constrain",
    "load_pretrained",
    "param_shardings",
    "read_config",
    "resolve",
    "save_pretrained",
    "turn_ends",
]
