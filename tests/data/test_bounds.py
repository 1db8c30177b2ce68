"""No text has fewer tokens than its length says."""

from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from ranktuner_jax.data import bounds
from ranktuner_jax.data.bounds import TokenBound

FAMILIES = ["smollm2", "qwen", "llama", "mistral", "qwen3", "gemma"]


def texts(count: int) -> list[str]:
    """Texts of words that are tokens, of special tokens, white space, marks and other alphabets."""
    rng = np.random.default_rng(0)
    parts = [
        "answer",
        " numbers",
        "\n\n\n",
        "  ",
        "<|im_end|>",
        "</s>",
        "é",
        "e\u0301",
        "ǖ",
        "u\u0308",
    ]
    parts += ["\u0304", "漢字", "\U0001f600", "क्षि", "\u0958", "\x00", "<0x41>", "▁"]
    return ["".join(rng.choice(parts, rng.integers(1, 60))) for _ in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()], ids=["as it is", "nfc"])
def test_every_text_has_at_least_the_tokens_that_its_length_asks_for(
    backends: dict[str, str], family: str, normalizer: Any
) -> None:
    backend = tokenizers.Tokenizer.from_str(backends[family])
    backend.normalizer = normalizer
    bound = TokenBound(backend)
    longest = max(backend.get_vocab(), key=len)
    for text in (*texts(300), longest * 50):
        tokens = len(backend.encode(text, add_special_tokens=False).ids)
        assert bound.fewest_above(text, 0) <= tokens
        assert bound.fewest_above(text, tokens) == 0
    assert bound.fewest_above("x" * 10_000, 10) > 10


def test_the_letters_of_bytes_are_the_librarys() -> None:
    assert set(bounds._LETTERS.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    for text in map(chr, range(0x250)):
        [(letters, _)] = pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=False
        ).pre_tokenize_str(text)
        assert letters == "".join(bounds._LETTERS[byte] for byte in text.encode())


def test_bytes_that_a_vocabulary_lacks_count_for_nothing() -> None:
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"Ġ", "Ċ"})
    backend = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = "a b\n" * 100
    assert len(backend.encode(text).ids) == 200
    assert TokenBound(backend).fewest_above(text, 100) == 200


def unbounded() -> dict[str, tokenizers.Tokenizer]:
    """Tokenizers that may make few tokens of any amount of text."""
    words = tokenizers.Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    unknown = tokenizers.Tokenizer(models.BPE({"?": 0}, [], unk_token="?", fuse_unk=True))
    alphabet = {letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}

    def byte_level(vocabulary: dict[str, int], *before: Any) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [*before, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        return tokenizer

    strips = byte_level(alphabet)
    strips.normalizer = normalizers.Strip()
    takes_spaces = byte_level(alphabet)
    takes_spaces.add_special_tokens([tokenizers.AddedToken("<mask>", rstrip=True)])
    return {
        "words": words,
        "unknown": unknown,
        "drops spaces": byte_level(alphabet, pre_tokenizers.WhitespaceSplit()),
        "drops a pattern": byte_level(alphabet, pre_tokenizers.Split(" ", "removed")),
        "lacks a byte": byte_level({k: v for k, v in alphabet.items() if k != "Ġ"}),
        "strips": strips,
        "takes spaces": takes_spaces,
    }


@pytest.mark.parametrize("name", unbounded())
def test_a_tokenizer_that_may_skip_text_gives_no_bound(name: str) -> None:
    backend = unbounded()[name]
    text = "<mask>" + " " * 10_000
    assert len(backend.encode(text).ids) < 100, "the text must show why there is no bound"
    assert TokenBound(backend).fewest_above(text, 100) == 0
