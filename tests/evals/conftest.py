"""A tiny decoder, and a tokenizer of one character a token."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from flax import nnx

from ranktuner_jax.models import Decoder, DecoderConfig


def tiny_config(**options: int) -> DecoderConfig:
    shape = {
        "vocab_size": 23,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
        # Large enough for completions that do not repeat one token.
        "initializer_range": 0.5,
    }
    return DecoderConfig(**{**shape, **options})


@pytest.fixture(scope="module")
def model() -> Decoder:
    return Decoder(tiny_config(), rngs=nnx.Rngs(0))


class Letters:
    """Token 0 ends a turn; 1 to 22 are letters and digits."""

    alphabet = "0123456789abcdefghijkl"
    eos_token_id = 0
    chat_template = None

    def encode(self, text: str) -> list[int]:
        return [self.alphabet.index(letter) + 1 for letter in text]

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(self.alphabet[token - 1] for token in tokens if token)

    def get_added_vocab(self) -> dict[str, int]:
        return {"<|im_end|>": 0, "<|im_start|>": 1}


@pytest.fixture
def tokenizer() -> Letters:
    return Letters()
