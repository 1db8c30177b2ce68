"""A tiny decoder, a tokenizer with one token per character, held-out rows and questions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import cast

import jax
import numpy as np
import pytest
from flax import nnx
from transformers import PreTrainedTokenizerBase

from ranktuner_jax.data import Batch, Example
from ranktuner_jax.evals import generate
from ranktuner_jax.models import Decoder, DecoderConfig


@pytest.fixture(scope="module")
def model() -> Decoder:
    config = DecoderConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        # Large enough for completions that do not repeat one token.
        initializer_range=0.5,
    )
    return Decoder(config, rngs=nnx.Rngs(0))


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
def tokenizer() -> PreTrainedTokenizerBase:
    return cast("PreTrainedTokenizerBase", Letters())


@pytest.fixture
def rows() -> list[Batch[np.ndarray]]:
    """Seven rows: two conversations and padding, a third of the real tokens supervised."""
    rng = np.random.default_rng(0)
    segment_ids = np.repeat(np.array([1, 2, 0], np.int32), [5, 4, 3])
    made = []
    for i in range(7):
        made.append(
            Batch(
                tokens=rng.integers(1, 23, 12).astype(np.int32),
                labels=rng.integers(1, 23, 12).astype(np.int32),
                mask=(rng.random(12) < 0.4) & (segment_ids > 0),
                positions=np.concatenate([np.arange(n, dtype=np.int32) for n in (5, 4, 3)]),
                segment_ids=segment_ids,
                token_weights=rng.random(12).astype(np.float32),
                row_index=np.array(i, np.int32),
            )
        )
    return made


@pytest.fixture
def examples(model: Decoder, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Questions; every second one expects what the model writes, the others nonsense."""
    prompts = ["a1", "b22", "c", "d4", "e55"]
    tokens = [tokenizer.encode(prompt) for prompt in prompts]
    written = generate(model, tokens, max_new_tokens=3, stop_ids=[0])
    made = []
    for i, (prompt, completion) in enumerate(zip(prompts, written, strict=True)):
        text = str(tokenizer.decode(completion.tokens, skip_special_tokens=True))
        answer = text if i % 2 == 0 else "nonsense"
        made.append(
            Example(
                index=i,
                messages=(
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": answer},
                ),
                prompt_tokens=tuple(tokens[i]),
                completion_tokens=(*completion.tokens, 0),
                row={"answer": answer},
            )
        )
    return made


@pytest.fixture
def compiled(caplog: pytest.LogCaptureFixture) -> Callable[[Callable[[], object]], list[str]]:
    """Calls a function, and lists what that compiles."""

    def messages(function: Callable[[], object]) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING), jax.log_compiles():
            function()
        return [message for message in caplog.messages if message.startswith("Compiling")]

    return messages
