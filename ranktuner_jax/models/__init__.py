"""One decoder for the models of several families, from and to Hugging Face folders."""

from ranktuner_jax.models.cache import Cache
from ranktuner_jax.models.config import DecoderConfig
from ranktuner_jax.models.decoder import REMAT_POLICIES, Decoder
from ranktuner_jax.models.families import FAMILIES, turn_ends
from ranktuner_jax.models.hf import read_config
from ranktuner_jax.models.lora import (
    Frozen,
    Lora,
    adapter_factors,
    adapter_shapes,
    add_adapters,
    dropout_keys,
    merge_adapters,
    quantize_layers,
    set_adapters,
)
from ranktuner_jax.models.partition import constrain, param_shardings
from ranktuner_jax.models.pretrained import (
    load_adapter,
    load_pretrained,
    resolve,
    save_adapter,
    save_pretrained,
)
from ranktuner_jax.models.quantized import Quantized
from ranktuner_jax.models.rope import RopeConfig

__all__ = [
    "FAMILIES",
    "REMAT_POLICIES",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "Frozen",
    "Lora",
    "Quantized",
    "RopeConfig",
    "adapter_factors",
    "adapter_shapes",
    "add_adapters",
    "constrain",
    "dropout_keys",
    "load_adapter",
    "load_pretrained",
    "merge_adapters",
    "param_shardings",
    "quantize_layers",
    "read_config",
    "resolve",
    "save_adapter",
    "save_pretrained",
    "set_adapters",
    "turn_ends",
]
