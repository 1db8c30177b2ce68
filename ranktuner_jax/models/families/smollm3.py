"""SmolLM3: Llama in which one layer of four has no rotary embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ranktuner_jax.models.families import llama
from ranktuner_jax.models.families.family import Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ranktuner_jax.models.config import DecoderConfig

__all__ = ["FAMILY"]


class _SmolLM3(Family):
    def read_ropes(self, hf: PretrainedConfig) -> dict[str, Any]:
        fields = super().read_ropes(hf)
        # The list may be longer than the model.
        has_rope = hf.no_rope_layers[: hf.num_hidden_layers]
        return {**fields, "ropes": tuple(fields["rope"] if has else None for has in has_rope)}

    def write_ropes(self, config: DecoderConfig) -> dict[str, Any]:
        has_rope = [int(rope is not None) for rope in config.ropes]
        return {**super().write_ropes(config), "no_rope_layers": has_rope}


FAMILY = _SmolLM3(
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    turn_ends=("<|im_end|>", "<|end_of_text|>"),
    tensors=llama.FAMILY.tensors,
    keys=llama.FAMILY.keys,
    window_keys=("sliding_window", "use_sliding_window", "layer_types"),
)
