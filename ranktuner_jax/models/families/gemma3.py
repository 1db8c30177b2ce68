"""Gemma 3, or the text model in a multimodal one: local layers have rotary embeddings of their own.

Each five of six layers are local, which `layer_types` in config.json says. Norms stand before
and after attention and feed-forward network, and scale by one more than their parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ranktuner_jax.errors import UserError
from ranktuner_jax.models.families import qwen3
from ranktuner_jax.models.families.family import Family
from ranktuner_jax.models.rope import RopeConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ranktuner_jax.models.config import DecoderConfig

__all__ = ["FAMILY"]

# Keys of config.json that would change the arithmetic; no Gemma 3 that Google released has them.
_UNSUPPORTED = ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention")


class _Gemma3(Family):
    def from_hf(self, hf: PretrainedConfig) -> dict[str, Any]:
        for key in _UNSUPPORTED:
            if value := getattr(hf, key):
                raise UserError(f"{self.name}: {key} is not supported, got {value}; expected none")
        return super().from_hf(hf)

    def read_ropes(self, hf: PretrainedConfig) -> dict[str, Any]:
        ropes = {
            kind: RopeConfig.from_parameters(parameters)
            for kind, parameters in hf.rope_parameters.items()
        }
        return {
            "rope": ropes["full_attention"],
            "ropes": tuple(ropes[kind] for kind in hf.layer_types),
        }

    def write_ropes(self, config: DecoderConfig) -> dict[str, Any]:
        windows = config.windows or (None,) * config.num_layers
        layers = zip(config.ropes, windows, strict=True)
        local = next((rope for rope, window in layers if rope and window), RopeConfig())
        ropes = {"full_attention": config.rope, "sliding_attention": local}
        return {"rope_parameters": {kind: rope.to_parameters() for kind, rope in ropes.items()}}


FAMILY = _Gemma3(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    turn_ends=("<end_of_turn>", "<eos>"),
    tensors={
        **qwen3.FAMILY.tensors,
        "attention_post_norm": "model.layers.{}.post_attention_layernorm.weight",
        "mlp_norm": "model.layers.{}.pre_feedforward_layernorm.weight",
        "mlp_post_norm": "model.layers.{}.post_feedforward_layernorm.weight",
    },
    keys={
        "activation": "hidden_activation",
        "query_scalar": "query_pre_attn_scalar",
        "qkv_bias": "attention_bias",
        "output_bias": "attention_bias",
    },
    fixed={
        "scale_embeddings": True,
        "post_norm": True,
        "qk_norm": True,
        "norm_offset": 1.0,
        "norm_rounds_last": True,
    },
    window_keys=("sliding_window", "layer_types"),
    multimodal="gemma3",
    text_prefix="language_model.",
)
