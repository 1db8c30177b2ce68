"""Llama 2 and 3, and SmolLM2: biases are optional."""

from ranktuner_jax.models.families.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    # SmolLM2, Llama 3, their base models, Llama 2.
    turn_ends=("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "</s>"),
    tensors={
        "embed": "model.embed_tokens.weight",
        "attention_norm": "model.layers.{}.input_layernorm.weight",
        "q": "model.layers.{}.self_attn.q_proj.weight",
        "k": "model.layers.{}.self_attn.k_proj.weight",
        "v": "model.layers.{}.self_attn.v_proj.weight",
        "q_bias": "model.layers.{}.self_attn.q_proj.bias",
        "k_bias": "model.layers.{}.self_attn.k_proj.bias",
        "v_bias": "model.layers.{}.self_attn.v_proj.bias",
        "o": "model.layers.{}.self_attn.o_proj.weight",
        "o_bias": "model.layers.{}.self_attn.o_proj.bias",
        "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
        "gate": "model.layers.{}.mlp.gate_proj.weight",
        "up": "model.layers.{}.mlp.up_proj.weight",
        "gate_bias": "model.layers.{}.mlp.gate_proj.bias",
        "up_bias": "model.layers.{}.mlp.up_proj.bias",
        "down": "model.layers.{}.mlp.down_proj.weight",
        "down_bias": "model.layers.{}.mlp.down_proj.bias",
        "final_norm": "model.norm.weight",
        "head": "lm_head.weight",
    },
    keys={
        "qkv_bias": "attention_bias",
        "output_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
    },
)
