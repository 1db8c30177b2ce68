"""Conversations as tokens, with a mask of the assistant's turns."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from ranktuner_jax.data.bounds import TokenBound
from ranktuner_jax.data.records import BadRowError, Conversation, to_conversation
from ranktuner_jax.data.rendering import ChatRenderer, Rendering
from ranktuner_jax.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32, Int32
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatEncoder", "TokenizedChat", "TooLong", "turn_end_id"]


@dataclass(frozen=True, slots=True)
class TokenizedChat:
    """The tokens of one conversation, up to the last one that is supervised.

    Attributes:
      tokens: Token ids.
      weights: The loss weight of each supervised token (the assistant's text
        and the token that ends its turn), 0 elsewhere.
    """

    tokens: Int32[np.ndarray, " length"]
    weights: Float32[np.ndarray, " length"]

    @property
    def mask(self) -> Bool[np.ndarray, " length"]:
        """True where the token is supervised."""
        return self.weights > 0

    def split_last_turn(self) -> tuple[list[int], list[int]]:
        """The tokens before the last supervised turn, and the tokens of that turn.

        The first is a sampler's prompt, the second the reference answer.

        Example:
          >>> TokenizedChat(np.array([5, 6, 7, 8]), np.array([0, 0, 1, 1])).split_last_turn()
          ([5, 6], [7, 8])
        """
        start = int(np.flatnonzero(~self.mask)[-1]) + 1
        return self.tokens[:start].tolist(), self.tokens[start:].tolist()


@dataclass(frozen=True, slots=True)
class TooLong:
    """A sample that was not tokenized, because its text alone is too long.

    Attributes:
      fewest: The tokens that it has at least.
    """

    fewest: int


class ChatEncoder:
    """Tokenizes conversations and marks what is learned of them.

    A chat template writes the text, and tells which characters are the assistant's: see
    `ChatRenderer`. What comes before a turn must be its beginning in tokens, too, or the turn is
    tokenized apart, as it is generated; where that changes the text, the row is refused.

    Args:
      tokenizer: A fast tokenizer with a chat template.
      enable_thinking: Passed to the template; Qwen3's uses it.

    Raises:
      UserError: If the tokenizer has no chat template or no special tokens.

    Example:
      >>> import tokenizers, transformers
      >>> words = {word: i for i, word in enumerate(["?", "<end>", "2", "+", "4"])}
      >>> backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
      >>> backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
      >>> tokenizer = transformers.PreTrainedTokenizerFast(
      ...     tokenizer_object=backend,
      ...     eos_token="<end>",
      ...     chat_template="{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
      ... )
      >>> turns = ({"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"})
      >>> [[sample]] = ChatEncoder(tokenizer).encode([Conversation(turns, (0.0, 1.0), row={})])
      >>> sample.tokens.tolist(), sample.mask.tolist()
      ([2, 3, 2, 1, 4, 1], [False, False, False, False, True, True])
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, enable_thinking: bool = True):
        self._renderer = ChatRenderer(tokenizer, enable_thinking=enable_thinking)
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        self._bound = TokenBound(self._backend)
        self._tail_tokens = functools.lru_cache(maxsize=4096)(self._encode_text)

    @overload
    def encode(
        self, conversations: Sequence[Conversation]
    ) -> list[tuple[TokenizedChat, ...] | BadRowError]: ...

    @overload
    def encode(
        self, conversations: Sequence[Conversation], max_tokens: int | None
    ) -> list[tuple[TokenizedChat | TooLong, ...] | BadRowError]: ...

    def encode(self, conversations: Sequence[Conversation], max_tokens: int | None = None) -> Any:
        """Tokenizes a batch of conversations.

        The tokenizer encodes all texts of the batch in one call, on all cores:
        batches of several hundred conversations are fastest.

        Args:
          conversations: The batch.
          max_tokens: A sample whose text is so long that it certainly has more tokens is not
            tokenized. Shorter ones may have more tokens all the same.

        Returns:
          For each conversation its samples, or the reason why it is refused. The last
          sample is the conversation as a whole; before it comes one for each turn that
          the template renders differently later on. With `max_tokens`, a sample may be `TooLong`.
        """
        rendered = [
            self._try(self._renderer.render, conversation) for conversation in conversations
        ]
        if max_tokens is not None:
            rendered = [
                renderings
                if isinstance(renderings, BadRowError)
                else [self._unless_too_long(rendering, max_tokens) for rendering in renderings]
                for renderings in rendered
            ]
        every = [r for rs in rendered if not isinstance(rs, BadRowError) for r in rs]
        texts = [r.text for r in every if isinstance(r, Rendering)]
        encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        return [
            renderings
            if isinstance(renderings, BadRowError)
            # The list consumes all encodings of the conversation, even if one is refused.
            else self._try(
                self._tokenize_all,
                [(r, isinstance(r, Rendering) and next(encodings)) for r in renderings],
            )
            for renderings in rendered
        ]

    def encode_prompt(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """The tokens of a conversation up to where the model's answer begins.

        Args:
          messages: Its turns, the last of which is not the assistant's.

        Raises:
          BadRowError: If the chat template refuses them.
        """
        return self._encode_text(self._renderer.prompt(messages))

    def _unless_too_long(self, rendering: Rendering, max_tokens: int) -> Rendering | TooLong:
        text = rendering.text[: rendering.spans[-1].stop]
        return (
            TooLong(fewest) if (fewest := self._bound.fewest_above(text, max_tokens)) else rendering
        )

    def _tokenize_all(
        self, pairs: Iterable[tuple[Rendering | TooLong, Any]]
    ) -> tuple[TokenizedChat | TooLong, ...]:
        return tuple(
            self._tokenize(rendering, encoding) if isinstance(rendering, Rendering) else rendering
            for rendering, encoding in pairs
        )

    def _tokenize(self, rendering: Rendering, encoding: Any) -> TokenizedChat:
        ids = encoding.ids
        bounds = self._token_bounds(rendering, encoding, ids)
        if bounds is None:
            ids, bounds = self._tokenize_in_pieces(rendering)
        if bounds[0][0] == 0:
            raise BadRowError(
                "there is nothing before the assistant's first token to predict it from"
            )
        length = bounds[-1][1]
        weights = np.zeros(length, np.float32)
        for (start, stop), span in zip(bounds, rendering.spans, strict=True):
            weights[start:stop] = span.weight
        return TokenizedChat(np.array(ids[:length], np.int32), weights)

    def _token_bounds(
        self, rendering: Rendering, encoding: Any, ids: list[int]
    ) -> list[tuple[int, int]] | None:
        """The spans in tokens; None if a token crosses the start of one.

        Text is split at special tokens before it is tokenized, so it is enough to
        compare from the last special token before the span.
        """
        text = rendering.text
        bounds = []
        cut = past = 0
        for span in rendering.spans:
            for found in self._renderer.special.finditer(text, past, span.start):
                cut, past = found.span()
            first = _token_at(encoding, cut) if cut else 0
            tail = self._tail_tokens(text[cut : span.start])
            start = first + len(tail)
            if ids[first:start] != tail:
                return None
            bounds.append((start, _token_at(encoding, span.stop - 1) + 1))
        return bounds

    def _encode_text(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _tokenize_in_pieces(self, rendering: Rendering) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenizes each prompt as at inference, and each answer separately.

        The newline that begins an answer may merge with the newline that ends the
        prompt into one token, which generation can never produce.
        """
        ids: list[int] = []
        bounds = []
        done = 0
        for span in rendering.spans:
            ids += self._encode_text(rendering.text[done : span.start])
            start = len(ids)
            ids += self._encode_text(rendering.text[span.start : span.stop])
            bounds.append((start, len(ids)))
            done = span.stop
        whole = self._encode_text(rendering.text[:done])
        decode = functools.partial(self._backend.decode, skip_special_tokens=False)
        if decode(ids) != decode(whole):
            raise BadRowError(
                "a token crosses the start of an assistant turn; remove the white space at the "
                "start of the answer"
            )
        return ids, bounds

    @staticmethod
    def _try(function: Any, argument: Any) -> Any:
        try:
            return function(argument)
        except BadRowError as error:
            return error


def _token_at(encoding: Any, position: int) -> int:
    """The token with the character at `position`, the last of a special token or its first.

    As `encoding.char_to_token`, which looks through all tokens before it.
    """
    return bisect.bisect_right(
        range(len(encoding)), position, key=lambda token: encoding.token_to_chars(token)[1]
    )


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an assistant's turn under the tokenizer's chat template.

    Found by encoding a short conversation, with a system prompt if the template requires one.

    Args:
      tokenizer: As in `ChatEncoder`.

    Raises:
      UserError: If the tokenizer has no chat template or no special tokens, or the template
        refuses such a conversation.

    Example:
      >>> import tokenizers, transformers
      >>> words = {word: i for i, word in enumerate(["?", "<eos>", "<end>"])}
      >>> backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
      >>> backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
      >>> tokenizer = transformers.PreTrainedTokenizerFast(
      ...     tokenizer_object=backend,
      ...     eos_token="<eos>",
      ...     additional_special_tokens=["<end>"],
      ...     chat_template="{% for m in messages %}{{ m.content + '<end>' }}{% endfor %}",
      ... )
      >>> turn_end_id(tokenizer)
      2
    """
    roles = ("system", "user", "assistant")
    messages = [{"role": role, "content": "Hello."} for role in roles]
    probes = [to_conversation({"messages": turns}) for turns in (messages[1:], messages)]
    results = ChatEncoder(tokenizer).encode(probes)
    for samples in results:
        if not isinstance(samples, BadRowError):
            return int(samples[-1].tokens[-1])
    raise UserError(
        "model: expected a chat template that takes a user's and an assistant's turn, got one "
        f"that does not, with or without a system prompt: {results[0]}; set data.chat_template"
    )
