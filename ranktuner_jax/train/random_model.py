"""A model of a config without its weights: for plans and benchmarks."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ranktuner_jax import models
from ranktuner_jax.train.config import TrainConfig

__all__ = ["random_model"]


def random_model(config: TrainConfig, shape: models.DecoderConfig, mesh: Mesh) -> models.Decoder:
    """The model that a run begins with, but of another shape and with random weights.

    Types, remat, quantisation and new adapters are the config's.

    Args:
      config: The config of the run.
      shape: The shape of the model.
      mesh: Its devices.

    Example:
      >>> from ranktuner_jax.train import load_config, make_mesh
      >>> config = load_config("own_data", ["--config.lora.rank=2", "--config.mesh.data=-1"])
      >>> shape = models.DecoderConfig(vocab_size=11, num_layers=1)
      >>> model = nnx.eval_shape(lambda: random_model(config, shape, make_mesh(config.mesh)))
      >>> model.layers.q_lora_a.shape
      (1, 2, 576)
    """
    train, lora = config.train, config.lora
    types = lora.types(train.param_dtype)
    model = models.Decoder(
        shape,
        rngs=nnx.Rngs(0),
        param_dtype=types["param_dtype"],
        dtype=jnp.dtype(train.compute_dtype),
        remat=train.remat,
        mesh=mesh,
    )
    if types["quantized"]:
        models.quantize_layers(model, types["quantized"])
    if lora.new_adapters is not None:
        dtype = jnp.dtype(train.param_dtype)
        models.add_adapters(model, lora.new_adapters, rngs=nnx.Rngs(0), dtype=dtype)
    return model
