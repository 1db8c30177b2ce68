"""Mistral: Llama without biases, and with one sliding window for all layers."""

from ranktuner_jax.models.families import llama
from ranktuner_jax.models.families.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    turn_ends=("</s>",),
    tensors=llama.FAMILY.tensors,
    window_keys=("sliding_window",),
)
