"""The keys of a config that are about LoRA."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from ranktuner_jax import models
from ranktuner_jax.errors import UserError
from ranktuner_jax.models.partition import PROJECTIONS
from ranktuner_jax.models.quantized import TYPES
from ranktuner_jax.train.config.checks import at_least, one_of

__all__ = ["LoraConfig"]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Adapters that are trained in the place of the model, which stays as it is.

    Attributes:
      rank: Rank of the adapters, such as 16; 0 trains the whole model.
      alpha: The adapters' outputs are multiplied by alpha / rank.
      rslora: Whether they are multiplied by alpha / sqrt(rank) instead.
      targets: The matrices with adapters, with commas between them: of the layers q, k, v, o,
        gate, up and down, or "all" for these; embed and head. Or the names of Hugging Face's
        modules (q_proj and so on, embed_tokens, lm_head).
      base: Type of the frozen parameters, "float32" or "bfloat16"; or "nf4" or "int8", which have
        the layers' matrices in 4 or 8 bits and the rest in bfloat16. "" is train.param_dtype,
        which the adapters always have.
      adapter: A folder of PEFT with the adapters to begin with, which decides rank, alpha, rslora
        and targets; empty for new adapters.
      dropout: Share of the adapters' inputs that each step of training leaves out.
    """

    rank: int = 0
    alpha: float = 32.0
    rslora: bool = False
    targets: str = "all"
    base: str = ""
    adapter: str = ""
    dropout: float = 0.0

    def __post_init__(self) -> None:
        at_least("lora.rank", self.rank, 0)
        one_of("lora.base", self.base, ("", "float32", "bfloat16", *TYPES))
        if self.rank and self.adapter:
            raise UserError(
                "lora.rank: expected 0 with lora.adapter, whose folder decides the rank, got "
                f"{self.rank}"
            )
        if self.base and not self.is_on:
            raise UserError(
                f"lora.base: expected a frozen model, got {self.base} with lora.rank=0; set "
                "lora.rank, or train.param_dtype"
            )
        _ = self.new_adapters  # Checks the targets.

    @property
    def is_on(self) -> bool:
        """Whether adapters are trained, and not the whole model."""
        return bool(self.rank or self.adapter)

    def types(self, param_dtype: str) -> dict[str, Any]:
        """The types of the model's parameters, as `models.load_pretrained` takes them.

        Args:
          param_dtype: The type that they have where `base` names none.

        Example:
          >>> LoraConfig(rank=16, base="nf4").types("float32")
          {'param_dtype': dtype(bfloat16), 'quantized': 'nf4'}
        """
        quantized = self.base if self.base in TYPES else ""
        dtype = "bfloat16" if quantized else self.base or param_dtype
        return {"param_dtype": jnp.dtype(dtype), "quantized": quantized}

    @property
    def new_adapters(self) -> models.Lora | None:
        """The adapters to begin with, if they are new."""
        if not self.rank:
            return None
        names: list[str] = []
        for name in self.targets.split(","):
            names += PROJECTIONS if name == "all" else [name]
        return models.Lora(self.rank, self.alpha, self.rslora, tuple(names), self.dropout)
