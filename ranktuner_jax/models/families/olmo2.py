"""OLMo 2: norms stand after attention and feed-forward network, and over all heads at once."""

from ranktuner_jax.models.families import llama
from ranktuner_jax.models.families.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    turn_ends=("<|endoftext|>",),
    tensors={
        **llama.FAMILY.tensors,
        "q_joint_norm": "model.layers.{}.self_attn.q_norm.weight",
        "k_joint_norm": "model.layers.{}.self_attn.k_norm.weight",
        "attention_post_norm": "model.layers.{}.post_attention_layernorm.weight",
        "mlp_post_norm": "model.layers.{}.post_feedforward_layernorm.weight",
    },
    keys={"qkv_bias": "attention_bias", "output_bias": "attention_bias"},
    fixed={
        "pre_norm": False,
        "post_norm": True,
        "qk_norm_joint": True,
        "norm_rounds_last": True,
    },
)
