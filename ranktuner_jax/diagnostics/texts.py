"""The text of single tokens, as it reads in context."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenTexts"]


class TokenTexts:
    """Gives the text of a token by its id; each is decoded once.

    A token is decoded after another one, since many decoders strip the space before the first.
    What is only a part of a character is U+FFFD.

    Args:
      tokenizer: A fast tokenizer.

    Example:
      >>> import tokenizers, transformers
      >>> words = {word: i for i, word in enumerate(["?", "<end>", "2", "+", "4"])}
      >>> backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
      >>> texts = TokenTexts(transformers.PreTrainedTokenizerFast(tokenizer_object=backend))
      >>> texts[2], texts[4]
      (' 2', ' 4')
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._decode = tokenizer.backend_tokenizer.decode
        self._before = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).ids
        self._start = self._decode(self._before, skip_special_tokens=False)
        self._texts: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        text = self._texts.get(token)
        if text is None:
            text = self._decode([*self._before, token], skip_special_tokens=False)
            if text.startswith(self._start):
                text = text[len(self._start) :]
            else:
                text = self._decode([token], skip_special_tokens=False)
            self._texts[token] = text
        return text

    def of(self, tokens: Iterable[int]) -> list[str]:
        """The texts of several tokens."""
        return [self[int(token)] for token in tokens]
