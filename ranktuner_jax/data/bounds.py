"""How few tokens a text can have, from its length alone."""

from __future__ import annotations

import functools
import json
from typing import Any

import tokenizers
from tokenizers import models

__all__ = ["TokenBound"]

# Those that keep every character, and whose result on a text is no longer than on its parts.
_SPLITTERS = {"ByteLevel", "Metaspace", "Split", "Digits"}
_NORMALIZERS = {"NFC", "Prepend", "Replace"}
_FALLBACKS = {f"<0x{byte:02X}>" for byte in range(256)}
# How byte-level vocabularies write bytes: those that can be seen as themselves.
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_LETTERS = {byte: chr(byte) for byte in _VISIBLE}
_LETTERS |= {
    byte: chr(0x100 + i) for i, byte in enumerate(b for b in range(256) if b not in _LETTERS)
}


class TokenBound:
    """The fewest tokens that a tokenizer can make of a text.

    Each token of a byte-level BPE tokenizer, or of one that falls back to bytes, stands for at
    most as many bytes (characters) as the longest in its vocabulary. Other tokenizers may drop
    text, or make one unknown token of all of it, and are given the bound 0.

    Args:
      backend: The tokenizer.

    Example:
      >>> model = models.BPE({letter: i for i, letter in enumerate([*_FALLBACKS, "aaa"])}, [],
      ...                    byte_fallback=True)
      >>> bound = TokenBound(tokenizers.Tokenizer(model))
      >>> bound.fewest_above("a" * 60, 9), bound.fewest_above("a" * 60, 10)
      (10, 0)
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend

    def fewest_above(self, text: str, count: int) -> int:
        """The fewest tokens of the text if they are more than `count`, otherwise 0.

        It is 0 also where there is no telling.
        """
        # UTF-8 has at most four bytes a character. Most texts are short, and settled here.
        if not self._longest or 4 * len(text) <= count * self._longest:
            return 0
        if self._backend.normalizer is not None:
            text = self._backend.normalizer.normalize_str(text)
        size = len(text)
        if self._byte_level:
            size = len(text.encode().translate(None, self._unknown))
        fewest = -(-size // self._longest)
        return fewest if fewest > count else 0

    @functools.cached_property
    def _byte_level(self) -> bool:
        return "ByteLevel" in [part["type"] for part in _parts(self._backend.pre_tokenizer)]

    @functools.cached_property
    def _unknown(self) -> bytes:
        """Bytes that the vocabulary lacks, of which no tokens may be made."""
        vocabulary = self._backend.get_vocab(with_added_tokens=False)
        return bytes(byte for byte, letter in _LETTERS.items() if letter not in vocabulary)

    @functools.cached_property
    def _longest(self) -> int:
        """Bytes (characters without a byte-level alphabet) of the longest token; 0 if unbounded."""
        backend = self._backend
        vocabulary = backend.get_vocab(with_added_tokens=False)
        added = backend.get_added_tokens_decoder().values()
        splitters, normalizers = _parts(backend.pre_tokenizer), _parts(backend.normalizer)
        covered = (
            isinstance(backend.model, models.BPE)
            and (
                self._byte_level
                or (backend.model.byte_fallback and vocabulary.keys() >= _FALLBACKS)
            )
            and {part["type"] for part in splitters} <= _SPLITTERS
            and {part["type"] for part in normalizers} <= _NORMALIZERS
            and not any(part.get("behavior") == "Removed" for part in splitters)
            and all(
                len(part["pattern"].get("String", "")) == 1 == len(part["content"])
                for part in normalizers
                if part["type"] == "Replace"
            )
            # Such tokens take in the white space beside them, as much as there is.
            and not any(token.lstrip or token.rstrip for token in added)
        )
        if not covered:
            return 0
        return max([*map(len, vocabulary), *(len(token.content.encode()) for token in added)])


def _parts(component: Any) -> list[dict[str, Any]]:
    """The settings of a normalizer or pre-tokenizer, or of each in a sequence."""
    if component is None:
        return []
    try:
        state = json.loads(component.__getstate__())
    except Exception:  # A component written in Python: the library raises nothing more specific.
        return [{"type": "Python"}]
    nested = [part for key in ("pretokenizers", "normalizers") for part in state.get(key, ())]
    return nested or [state]
