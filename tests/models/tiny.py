"""Tiny checkpoints of every family, with every option on and weights from a seed."""

import pathlib
import zlib
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ranktuner_jax.models.config import DecoderConfig
from ranktuner_jax.models.families import FAMILIES
from ranktuner_jax.models.hf import tensor_names

_SHAPE = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-2,  # Large enough to be seen.
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 4,
}

_GEMMA3 = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 8.0},
}

# name -> (model_type, what config.json says beside the shape)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": (
        "llama",
        {"rope_parameters": _LLAMA3, "attention_bias": True, "mlp_bias": True, "head_dim": 6},
    ),
    "llama2": (
        "llama",
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0},
            "tie_word_embeddings": True,
        },
    ),
    "llama_dynamic": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 2.0},
            "max_position_embeddings": 8,
            "num_key_value_heads": 4,
        },
    ),
    "mistral": ("mistral", {"sliding_window": 5, "head_dim": 8}),
    "qwen2": (
        "qwen2",
        {"rope_parameters": _YARN, "use_sliding_window": True, "sliding_window": 4,
         "max_window_layers": 1},
    ),
    "qwen3": (
        "qwen3",
        {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "gemma3": (
        "gemma3_text",  # Five local layers, a global one and a local one.
        {"num_hidden_layers": 7, "head_dim": 6, "sliding_window": 4, "query_pre_attn_scalar": 12,
         "attention_bias": True, "rope_parameters": _GEMMA3},
    ),
    "olmo2": ("olmo2", {"attention_bias": True}),
    "smollm3": (
        "smollm3",
        {"num_hidden_layers": 5, "no_rope_layers": [1, 0, 1, 0, 1, 0], "use_sliding_window": True,
         "sliding_window": 5, "attention_bias": True, "mlp_bias": True,
         "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    ),
}  # fmt: skip

TOKENS = np.random.default_rng(7).integers(3, 31, (2, 12)).astype(np.int32)


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor's values: they follow from its name alone, on every machine."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = rng.normal(size=shape)
    if name.endswith("norm.weight"):
        values = 1 + 0.2 * values
    elif name.endswith("bias"):
        values = 0.3 * values
    else:
        values /= np.sqrt(shape[-1])
    return values.astype(np.float32)


def hf_config(case: str) -> Any:
    """The transformers config of a case."""
    import transformers

    model_type, options = CASES[case]
    return transformers.AutoConfig.for_model(model_type, **_SHAPE | options)


def write_checkpoint(case: str, folder: pathlib.Path) -> DecoderConfig:
    """A Hugging Face folder (no tokenizer) of a case."""
    hf = hf_config(case)
    config = DecoderConfig.from_hf(hf)
    hf.architectures = [FAMILIES[config.family].architecture]
    hf.save_pretrained(folder)
    tensors = {name: tensor(name, shape) for name, (_, _, shape) in tensor_names(config).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return config
