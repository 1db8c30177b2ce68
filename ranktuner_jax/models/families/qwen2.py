"""Qwen2 and Qwen2.5: queries, keys and values have biases, and some layers may have a window."""

from ranktuner_jax.models.families import llama
from ranktuner_jax.models.families.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    turn_ends=("<|im_end|>", "<|endoftext|>"),
    tensors=llama.FAMILY.tensors,
    fixed={"qkv_bias": True},
    window_keys=("sliding_window", "use_sliding_window", "layer_types"),
)
