"""Qwen3: queries and keys are normalised; attention biases and windows are optional."""

from ranktuner_jax.models.families import llama
from ranktuner_jax.models.families.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    turn_ends=("<|im_end|>", "<|endoftext|>"),
    tensors={
        **llama.FAMILY.tensors,
        "q_norm": "model.layers.{}.self_attn.q_norm.weight",
        "k_norm": "model.layers.{}.self_attn.k_norm.weight",
    },
    keys={"qkv_bias": "attention_bias", "output_bias": "attention_bias"},
    fixed={"qk_norm": True},
    window_keys=("sliding_window", "use_sliding_window", "layer_types"),
)
