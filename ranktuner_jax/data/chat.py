"""Conversations as tokens, with a mask of the assistant's turns."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

from ranktuner_jax.data.records import BadRowError, Conversation, to_conversation
from ranktuner_jax.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32, Int32
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatEncoder", "TokenizedChat", "turn_end_id"]


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
class _Span:
    """Characters [start, stop) of an assistant turn, generated from all text before it."""

    start: int
    stop: int
    weight: float


@dataclass(frozen=True, slots=True)
class _Rendering:
    text: str
    spans: tuple[_Span, ...]


class ChatEncoder:
    """Renders conversations with a chat template and locates the assistant's turns.

    A template with `{% generation %}` marks the assistant's turns itself. With
    others, the conversation is rendered up to each assistant turn, ending in the
    generation prompt as at inference, and again including the turn: the
    difference is the turn. The first must be a prefix of the second, in
    characters and in tokens, or the row is refused.

    A template may render an earlier turn differently once more turns follow
    (Qwen3 drops its thinking, Mistral moves the system prompt). Such a turn
    becomes a separate sample that ends there, so that each turn is learned in
    exactly the context in which it is generated.

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
        if not tokenizer.chat_template:
            raise UserError(
                f"model: the tokenizer of {tokenizer.name_or_path} has no chat template; set "
                "data.chat_template to plain (built in) or to the path of a Jinja file"
            )
        self._template = tokenizer.get_chat_template()
        self._marks_generation = bool(re.search(r"\{%-?\s*generation\s*-?%\}", self._template))
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        self._options = {
            **tokenizer.special_tokens_map,
            "enable_thinking": enable_thinking,
            # Llama 3 writes today's date into the system prompt unless it is given one. With the
            # fallback date of Meta's template, tokens are the same every day.
            "date_string": "26 Jul 2024",
        }
        special = {
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        }
        special.update(tokenizer.all_special_tokens)
        if not special:
            raise UserError(
                f"model: the tokenizer of {tokenizer.name_or_path} has no special tokens, so "
                "nothing can end a turn"
            )
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)))
        self._tail_tokens = functools.lru_cache(maxsize=4096)(self._encode_text)

    def encode(
        self, conversations: Sequence[Conversation]
    ) -> list[tuple[TokenizedChat, ...] | BadRowError]:
        """Tokenizes a batch of conversations.

        The tokenizer encodes all texts of the batch in one call, on all cores:
        batches of several hundred conversations are fastest.

        Args:
          conversations: The batch.

        Returns:
          For each conversation its samples, or the reason why it is refused. The last
          sample is the conversation as a whole; before it comes one for each turn that
          the template renders differently later on.
        """
        rendered = [self._try(self._render, conversation) for conversation in conversations]
        texts = [r.text for rs in rendered if not isinstance(rs, BadRowError) for r in rs]
        encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        return [
            renderings
            if isinstance(renderings, BadRowError)
            # The list consumes all encodings of the conversation, even if one is refused.
            else self._try(
                self._tokenize_all, [(rendering, next(encodings)) for rendering in renderings]
            )
            for renderings in rendered
        ]

    # --- text ---

    def _render(self, conversation: Conversation) -> list[_Rendering]:
        for number, message in enumerate(conversation.messages, 1):
            if found := self._special.search(message["content"]):
                raise BadRowError(
                    f"message {number} contains {found.group()!r}, which the tokenizer takes for "
                    "a special token; remove it from the text"
                )
        last = max(i for i, weight in enumerate(conversation.weights) if weight)
        messages = [dict(message) for message in conversation.messages[: last + 1]]
        weights = conversation.weights[: last + 1]
        if self._marks_generation:
            return [self._render_marked(messages, weights)]
        return self._render_by_prefix(messages, weights)

    def _template_text(self, messages: list[dict[str, str]], **options: Any) -> tuple[str, Any]:
        render: Any = render_jinja_template  # its annotations are wrong
        try:
            texts, spans = render(
                [messages], chat_template=self._template, **self._options, **options
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"the chat template is not valid Jinja: line {error.lineno}: {error.message}"
            ) from error
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise BadRowError(f"the chat template refuses the conversation: {reason}") from error
        return texts[0], spans[0] if spans else ()

    def _render_marked(
        self, messages: list[dict[str, str]], weights: Sequence[float]
    ) -> _Rendering:
        text, marked = self._template_text(messages, return_assistant_tokens_mask=True)
        turns = [
            weight
            for message, weight in zip(messages, weights, strict=True)
            if message["role"] == "assistant"
        ]
        if len(marked) != len(turns):
            raise BadRowError(
                f"the chat template marks {len(marked)} generations for {len(turns)} assistant "
                "turns; correct its {% generation %} blocks, or remove all of them"
            )
        spans = (
            _Span(start, self._turn_end(text, stop), weight)
            for (start, stop), weight in zip(marked, turns, strict=True)
            if weight
        )
        return _Rendering(text, tuple(spans))

    def _render_by_prefix(
        self, messages: list[dict[str, str]], weights: Sequence[float]
    ) -> list[_Rendering]:
        whole, _ = self._template_text(messages)
        merged: list[_Span] = []
        alone: list[_Rendering] = []
        for i, weight in enumerate(weights):
            if not weight:
                continue
            before, _ = self._template_text(messages[:i], add_generation_prompt=True)
            through = whole
            if i + 1 < len(messages):
                through, _ = self._template_text(messages[: i + 1])
            if not through.startswith(before):
                raise BadRowError(
                    f"message {i + 1}: the chat template does not begin the assistant turn with "
                    "its generation prompt, so training would not match inference; mark the turns "
                    "in the template with {% generation %}"
                )
            span = _Span(len(before), self._turn_end(through, len(through)), weight)
            if whole.startswith(through[: span.stop]):
                merged.append(span)
            else:
                alone.append(_Rendering(through, (span,)))
        # `merged` always contains the last turn, so samples are in the order of their ends.
        return [*alone, _Rendering(whole, tuple(merged))]

    def _turn_end(self, text: str, stop: int) -> int:
        """The end of the turn at `stop`, including its end-of-turn token."""
        turn = text[:stop].rstrip()  # Templates write a newline after the token.
        for found in self._special.finditer(turn, max(0, len(turn) - 256)):
            if found.end() == len(turn):
                return len(turn)
        following = self._special.match(text, stop)
        if following is None:
            raise BadRowError(
                "the chat template writes no end-of-turn token after the assistant's turn, so the "
                "model would never learn to stop; add the tokenizer's eos_token to the template"
            )
        return following.end()

    # --- tokens ---

    def _tokenize_all(self, pairs: Iterable[tuple[_Rendering, Any]]) -> tuple[TokenizedChat, ...]:
        return tuple(self._tokenize(rendering, encoding) for rendering, encoding in pairs)

    def _tokenize(self, rendering: _Rendering, encoding: Any) -> TokenizedChat:
        ids = encoding.ids
        bounds: list[tuple[int, int]] = []
        for span in rendering.spans:
            bound = self._token_bounds(rendering.text, span, encoding)
            if bound is None:
                ids, bounds = self._tokenize_in_pieces(rendering)
                break
            bounds.append(bound)
        if bounds[0][0] == 0:
            raise BadRowError(
                "there is nothing before the assistant's first token to predict it from"
            )
        length = bounds[-1][1]
        weights = np.zeros(length, np.float32)
        for (start, stop), span in zip(bounds, rendering.spans, strict=True):
            weights[start:stop] = span.weight
        return TokenizedChat(np.array(ids[:length], np.int32), weights)

    def _token_bounds(self, text: str, span: _Span, encoding: Any) -> tuple[int, int] | None:
        """The span in tokens; None if a token crosses its start.

        Text is split at special tokens before it is tokenized, so it is enough to
        compare from the last special token before the span.
        """
        cut = 0
        for found in self._special.finditer(text, 0, span.start):
            cut = found.start()
        first = encoding.char_to_token(cut) if cut else 0
        tail = self._tail_tokens(text[cut : span.start])
        start = first + len(tail)
        if encoding.ids[first:start] != tail:
            return None
        return start, encoding.char_to_token(span.stop - 1) + 1

    def _encode_text(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _tokenize_in_pieces(self, rendering: _Rendering) -> tuple[list[int], list[tuple[int, int]]]:
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
