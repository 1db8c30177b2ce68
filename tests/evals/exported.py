"""A small random model with a tokenizer that merges, as a Hugging Face folder."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import tokenizers
import transformers
from flax import nnx

from ranktuner_jax.models import Decoder, DecoderConfig, save_pretrained

__all__ = ["export"]

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def export(folder: pathlib.Path, texts: Sequence[str]) -> pathlib.Path:
    """Writes the model, with a tokenizer trained on the texts, and returns its folder."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=_TEMPLATE,
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    config = DecoderConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_positions=512,
        # Large enough for texts that do not repeat one token.
        initializer_range=0.3,
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    save_pretrained(
        model,
        folder / "model",
        tokenizer_from=folder / "tokenizer",
        stop_ids=[tokenizer.eos_token_id],
    )
    return folder / "model"
