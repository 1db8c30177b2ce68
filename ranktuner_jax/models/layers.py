"""The parameters of all layers, and what one of them computes but attention."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from ranktuner_jax.models import partition, rope
from ranktuner_jax.models.config import ACTIVATIONS, DecoderConfig
from ranktuner_jax.models.linear import linear
from ranktuner_jax.models.lora import Lora, drop_inputs
from ranktuner_jax.models.quantized import Quantized, quantized_linear

if TYPE_CHECKING:
    from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

__all__ = ["Layers", "init_param", "rms_norm"]


class Layers(nnx.Module):
    """The layers' parameters, each `[L, ...]`; called on one layer's slice of them."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        self.config = config
        self.lora: Lora | None = None  # Set by `add_adapters`, which adds the parameters too.
        for name, axes in partition.param_axes(config).items():
            if "layers" in axes:
                setattr(self, name, init_param(name, axes, config, rngs, param_dtype))

    def project(
        self, name: str, x: Float[Array, "B T *inputs"], dropout: PRNGKeyArray | None = None
    ) -> Float[Array, "B T *outputs"]:
        """One linear map, in the dtype of `x`, with its adapter and its bias if there are any."""
        kernel = getattr(self, name).get_value()
        outputs = kernel.shape[: len(kernel.shape) - x.ndim + 2]
        flat = x.reshape(*x.shape[:2], -1)
        if isinstance(kernel, Quantized):
            y = quantized_linear(flat, kernel, math.prod(outputs))
        else:
            y = linear(flat, kernel.reshape(math.prod(outputs), -1))
        if self.lora is not None and name in self.lora.targets:
            a, b = (getattr(self, f"{name}_lora_{factor}")[...] for factor in "ab")
            if dropout is not None:
                flat = drop_inputs(flat, self.lora.dropout, dropout, name)
            low = linear(flat, a.reshape(self.lora.rank, -1))
            y = y + linear(low * self.lora.scale, b.reshape(-1, self.lora.rank))
        y = y.reshape(*x.shape[:2], *outputs)
        if (bias := getattr(self, f"{name}_bias", None)) is not None:
            y = y + bias[...].astype(x.dtype)[None, None]
        return checkpoint_name(y, "projection")

    def norm(self, name: str, x: Array) -> Array:
        """Root-mean-square norm, in float32; `x` itself if the layers have none of this name."""
        param = getattr(self, name, None)
        return x if param is None else rms_norm(x, param[...], self.config)

    def heads(
        self, x: Array, tables: tuple[Array, Array], dropout: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "B T H d"], Float[Array, "B T K d"], Float[Array, "B T K d"]]:
        """Queries, keys and values, rotated."""
        x = self.norm("attention_norm", x)
        q, k, v = (self.project(name, x, dropout) for name in "qkv")
        for norm in ("norm", "joint_norm"):
            q, k = self.norm(f"q_{norm}", q), self.norm(f"k_{norm}", k)
        return rope.apply_rotary(q, tables), rope.apply_rotary(k, tables), v

    def add(
        self,
        x: Float[Array, "B T D"],
        mixed: Float[Array, "B T H d"],
        mesh: Mesh | None,
        dropout: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T D"]:
        """The residual plus attention's output, and plus the gated feed-forward network's."""
        x = x + self.norm("attention_post_norm", self.project("o", mixed, dropout))
        y = self.norm("mlp_norm", x)
        gate, up = (self.project(name, y, dropout) for name in ("gate", "up"))
        inner = ACTIVATIONS[self.config.activation](gate) * up
        inner = partition.constrain(inner, mesh, "batch", "time", "mlp")
        return x + self.norm("mlp_post_norm", self.project("down", inner, dropout))


def init_param(
    name: str, axes: dict[str, int], config: DecoderConfig, rngs: nnx.Rngs, dtype: DTypeLike
) -> nnx.Param:
    """The initial values of a parameter: norms 1, biases 0, matrices normal."""
    shape = tuple(axes.values())
    if name.endswith("norm"):
        return nnx.Param(jnp.full(shape, 1 - config.norm_offset, dtype))
    if name.endswith("bias"):
        return nnx.Param(jnp.zeros(shape, dtype))
    value = config.initializer_range * jax.random.normal(rngs.params(), shape, dtype)
    if "vocab" in axes:  # Padded rows stay zero: nothing ever reads or trains them.
        rows = jnp.arange(axes["vocab"])[:, None] < config.vocab_size
        value = jnp.where(rows, value, jnp.zeros((), dtype))
    return nnx.Param(value)


def rms_norm(x: Array, param: Array, config: DecoderConfig) -> Array:
    """The norm over the axes that `param` has, which are the last ones of `x`."""
    axes = tuple(range(-param.ndim, 0))
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=axes, keepdims=True) + config.norm_eps)
    scale = param.reshape((1,) * (x.ndim - param.ndim) + param.shape)
    if config.norm_offset:
        scale = scale.astype(jnp.float32) + config.norm_offset
    if config.norm_rounds_last:
        return (wide * scale.astype(jnp.float32)).astype(x.dtype)
    return wide.astype(x.dtype) * scale.astype(x.dtype)
