"""The configuration of a decoder: one frozen dataclass for every family."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax

from ranktuner_jax.errors import UserError
from ranktuner_jax.models.families import FAMILIES, find_family
from ranktuner_jax.models.rope import RopeConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["ACTIVATIONS", "DecoderConfig"]

# Functions that gate the feed-forward network, by Hugging Face's names.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape and the options of one decoder.

    Attributes:
      family: Hugging Face's `model_type`, one of `FAMILIES`.
      vocab_size: Rows of the vocabulary, without padding.
      rope: Rotary embedding of the layers for which `ropes` names no other.
      ropes: Rotary embedding of each layer, `None` for a layer without one; empty if all
        layers have `rope`.
      windows: Attention window of each layer in tokens, `None` for a layer without one;
        empty if no layer has one.
      activation: What gates the feed-forward network, one of `ACTIVATIONS`.
      scale_embeddings: Whether embeddings are multiplied by the root of `hidden_size`.
      query_scalar: Attention scores are divided by its root; `head_dim` if left out.
      pre_norm: Whether the inputs of attention and feed-forward network are normalised.
      post_norm: Whether their outputs are, before they are added to the residual.
      qk_norm: Whether each head's queries and keys are normalised.
      qk_norm_joint: Whether they are, over all heads at once.
      norm_offset: What norms add to their parameters to scale by.
      norm_rounds_last: Whether norms round to the compute dtype after that scaling, not before.
      vocab_multiple: The embedding's rows are padded to a multiple of this many, so that
        they divide over the `tensor` axis of a mesh. Padded rows are zero and never exported.

    Example:
      >>> config = DecoderConfig(vocab_size=101, hidden_size=8, num_layers=2, vocab_multiple=4)
      >>> config.padded_vocab_size
      104
    """

    family: str = "llama"
    vocab_size: int = 49152
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_layers: int = 30
    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64
    norm_eps: float = 1e-5
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    ropes: tuple[RopeConfig | None, ...] = ()
    max_positions: int = 8192
    windows: tuple[int | None, ...] = ()
    tie_embeddings: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    scale_embeddings: bool = False
    query_scalar: float | None = None
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: bool = False
    qk_norm_joint: bool = False
    norm_offset: float = 0.0
    norm_rounds_last: bool = False
    initializer_range: float = 0.02
    vocab_multiple: int = 1
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        find_family(self.family)
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f"hidden_act {self.activation!r} is not supported; "
                f"supported: {', '.join(ACTIVATIONS)}"
            )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads must be a multiple of num_kv_heads, "
                f"got {self.num_heads} and {self.num_kv_heads}"
            )
        for name in ("windows", "ropes"):
            if (given := len(getattr(self, name))) not in (0, self.num_layers):
                raise UserError(
                    f"{name} must name one for each of {self.num_layers} layers, got {given}"
                )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding, padding included."""
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    @property
    def attention_scale(self) -> float:
        """What attention multiplies scores by."""
        return (self.query_scalar or self.head_dim) ** -0.5

    @classmethod
    def from_hf(cls, hf: PretrainedConfig) -> DecoderConfig:
        """Reads a transformers config; of a multimodal model, that of its text model.

        Raises:
          UserError: If the architecture, the rope type or the activation is not supported.
        """
        if any(hf.model_type == family.multimodal for family in FAMILIES.values()):
            hf = hf.get_text_config()
        return cls(**find_family(hf.model_type).from_hf(hf))

    def to_hf(self) -> PretrainedConfig:
        """The transformers config that `from_hf` reads back as this one."""
        from transformers import AutoConfig

        return AutoConfig.for_model(self.family, **FAMILIES[self.family].to_hf(self))
