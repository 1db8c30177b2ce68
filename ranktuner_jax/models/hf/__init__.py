"""Hugging Face folders, read and written tensor by tensor."""

from ranktuner_jax.models.hf.names import tensor_names
from ranktuner_jax.models.hf.reading import abstract_decoder, read_config, read_decoder
from ranktuner_jax.models.hf.writing import write_weights

__all__ = ["abstract_decoder", "read_config", "read_decoder", "tensor_names", "write_weights"]
