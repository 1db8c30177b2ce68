"""Hugging Face folders, read and written tensor by tensor."""

from ranktuner_jax.models.hf.names import tensor_names
from ranktuner_jax.models.hf.peft import ADAPTER_CONFIG, read_adapter, write_adapter
from ranktuner_jax.models.hf.reading import abstract_decoder, read_config, read_decoder
from ranktuner_jax.models.hf.writing import write_weights

__all__ = [
    "ADAPTER_CONFIG",
    "abstract_decoder",
    "read_adapter",
    "read_config",
    "read_decoder",
    "tensor_names",
    "write_adapter",
    "write_weights",
]
