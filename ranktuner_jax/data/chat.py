"""Conversations as tokens, with a mask of the assistant's turns."""

from __future__ import annotations

import bisect
import functools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import jinja2
import numpy as np

from ranktuner_jax.data.bounds import TokenBound
from ranktuner_jax.data.prefixes import Tracer
from ranktuner_jax.data.records import BadRowError, Conversation, to_conversation
from ranktuner_jax.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32, Int32
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatEncoder", "TokenizedChat", "TooLong", "turn_end_id"]

# What templates call the text that an assistant thought; the first is the usual name.
_REASONING = ("reasoning_content", "thinking", "reasoning")


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
    characters and in tokens, or the row is refused. (Where the template writes
    message by message, one rendering shows what all of these are: see `Tracer`.)

    A template may render an earlier turn differently once more turns follow
    (Qwen3 drops its thinking, Mistral moves the system prompt). Such a turn
    becomes a separate sample that ends there, so that each turn is learned in
    exactly the context in which it is generated.

    Tools, tool calls and reasoning are written where the template writes them.
    A template that never reads one of them refuses the row, as does a turn
    without the calls that it should make.

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
        # Imported here, so that a command is refused before it has waited for transformers.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self._template = tokenizer.get_chat_template()
        try:
            self._compiled = _compile_jinja_template(self._template)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"the chat template is not valid Jinja: line {error.lineno}: {error.message}"
            ) from error
        self._tracer = Tracer(self._compiled, self._template)
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
        rendered = [self._try(self._render, conversation) for conversation in conversations]
        if max_tokens is not None:
            rendered = [
                renderings
                if isinstance(renderings, BadRowError)
                else [self._unless_too_long(rendering, max_tokens) for rendering in renderings]
                for renderings in rendered
            ]
        every = [r for rs in rendered if not isinstance(rs, BadRowError) for r in rs]
        texts = [r.text for r in every if isinstance(r, _Rendering)]
        encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        return [
            renderings
            if isinstance(renderings, BadRowError)
            # The list consumes all encodings of the conversation, even if one is refused.
            else self._try(
                self._tokenize_all,
                [(r, isinstance(r, _Rendering) and next(encodings)) for r in renderings],
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
        turns = [self._for_template(message) for message in messages]
        return self._encode_text(self._template_text(turns, add_generation_prompt=True))

    def _unless_too_long(self, rendering: _Rendering, max_tokens: int) -> _Rendering | TooLong:
        text = rendering.text[: rendering.spans[-1].stop]
        return (
            TooLong(fewest) if (fewest := self._bound.fewest_above(text, max_tokens)) else rendering
        )

    # --- text ---

    def _render(self, conversation: Conversation) -> list[_Rendering]:
        named = [(f"message {i}", m) for i, m in enumerate(conversation.messages, 1)]
        for name, texts in (*named, ("tools", conversation.tools)):
            for text in _texts(texts):
                if found := self._special.search(text):
                    raise BadRowError(
                        f"{name} contains {found.group()!r}, which the tokenizer takes for a "
                        "special token; remove it from the text"
                    )
        last = max(i for i, weight in enumerate(conversation.weights) if weight)
        messages = [self._for_template(m) for m in conversation.messages[: last + 1]]
        weights = conversation.weights[: last + 1]
        self._check_read("tools", conversation.tools)
        options = {"tools": list(conversation.tools) or None}
        if self._marks_generation:
            return [self._render_marked(messages, weights, options)]
        return self._render_by_prefix(messages, weights, options)

    def _for_template(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message under the names and types that the template expects."""
        message = dict(message)
        reasoning = message.pop("reasoning_content", None)
        calls = message.get("tool_calls")
        self._check_read("tool_calls", calls)
        if reasoning:
            names = [name for name in _REASONING if self._reads(name)]
            self._check_read(names[0] if names else _REASONING[0], reasoning)
            message |= dict.fromkeys(names, reasoning)
        if calls and self._arguments_are_text:
            message["tool_calls"] = [_with_text_arguments(call) for call in calls]
        return message

    def _reads(self, name: str) -> bool:
        return bool(re.search(rf"\b{name}\b", self._template))

    def _check_read(self, name: str, value: Any) -> None:
        if value and not self._reads(name):
            raise BadRowError(
                f"the row has {name}, which the chat template never reads; use a template that "
                "does, or write them into the content"
            )

    @functools.cached_property
    def _arguments_are_text(self) -> bool:
        """Whether the template takes a call's arguments as JSON text only (DeepSeek's)."""
        call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {}}}
        works = []
        for probe in (call, _with_text_arguments(call)):
            turns = [
                {"role": "user", "content": "Hello."},
                {"role": "assistant", "content": "", "tool_calls": [probe]},
            ]
            works.append(not isinstance(self._try(self._template_text, turns), BadRowError))
        return works == [False, True]

    def _template_text(self, messages: list[dict[str, Any]], **options: Any) -> str:
        try:
            return str(self._compiled.render(**self._given(messages, options)))
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise _refused(error) from error

    def _given(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> dict[str, Any]:
        """What a template is given, as by `PreTrainedTokenizer.apply_chat_template`."""
        defaults = {"tools": None, "documents": None, "add_generation_prompt": False}
        return {"messages": messages, **defaults, **self._options, **options}

    def _render_marked(
        self, messages: list[dict[str, Any]], weights: Sequence[float], options: dict[str, Any]
    ) -> _Rendering:
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # its annotations are wrong
        try:
            [text], [marked] = render(
                [messages],
                chat_template=self._template,
                return_assistant_tokens_mask=True,
                **self._options,
                **options,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise _refused(error) from error
        turns = [
            (i, weight)
            for i, (message, weight) in enumerate(zip(messages, weights, strict=True))
            if message["role"] == "assistant"
        ]
        if len(marked) != len(turns):
            raise BadRowError(
                f"the chat template marks {len(marked)} generations for {len(turns)} assistant "
                "turns; correct its {% generation %} blocks, or remove all of them"
            )
        spans = []
        for (start, stop), (i, weight) in zip(marked, turns, strict=True):
            if weight:
                end = self._turn_end(text, start, stop)
                _check_calls(messages[i], text[start:end], i)
                spans.append(_Span(start, end, weight))
        return _Rendering(text, tuple(spans))

    def _render_by_prefix(
        self, messages: list[dict[str, Any]], weights: Sequence[float], options: dict[str, Any]
    ) -> list[_Rendering]:
        asking = {**options, "add_generation_prompt": True}
        trace = self._tracer.trace(**self._given(messages, options))
        whole = trace.text if trace else self._template_text(messages, **options)
        ends: dict[int, int] = {}
        prompt = tail = ""
        if trace and trace.ends:
            asked = self._tracer.trace(**self._given(messages, asking))
            size = len(whole) - len(trace.tail)
            if asked and asked.ends == trace.ends and asked.text[:size] == whole[:size]:
                ends, prompt, tail = trace.ends, asked.tail, trace.tail
        merged: list[_Span] = []
        alone: list[_Rendering] = []
        for i, weight in enumerate(weights):
            if not weight:
                continue
            # `before` and `through` are the texts up to the turn, and including it. Both begin with
            # `base` characters of the whole, which are left out.
            if {i, i + 1} <= ends.keys():
                base = ends[i]
                before = prompt
                through = whole[base : ends[i + 1]] + tail
            else:
                base = 0
                before = self._template_text(messages[:i], **asking)
                through = whole
                if i + 1 < len(messages):
                    through = self._template_text(messages[: i + 1], **options)
            if not through.startswith(before):
                raise BadRowError(
                    f"message {i + 1}: the chat template does not begin the assistant turn with "
                    "its generation prompt, so training would not match inference; mark the turns "
                    "in the template with {% generation %}"
                )
            stop = self._turn_end(through, len(before), len(through))
            _check_calls(messages[i], through[len(before) : stop], i)
            span = _Span(base + len(before), base + stop, weight)
            if whole.startswith(through[:stop], base):
                merged.append(span)
            else:
                alone.append(_Rendering(whole[:base] + through, (span,)))
        # `merged` always contains the last turn, so samples are in the order of their ends.
        return [*alone, _Rendering(whole, tuple(merged))]

    def _turn_end(self, text: str, start: int, stop: int) -> int:
        """The end of the turn at [start, stop), including its end-of-turn token."""
        end = start + len(text[start:stop].rstrip())  # Templates write a newline after the token.
        for found in self._special.finditer(text, max(start, end - 256), end):
            if found.end() == end:
                return end
        following = self._special.match(text, stop)
        if following is None:
            raise BadRowError(
                "the chat template writes no end-of-turn token after the assistant's turn, so the "
                "model would never learn to stop; add the tokenizer's eos_token to the template"
            )
        return following.end()

    # --- tokens ---

    def _tokenize_all(
        self, pairs: Iterable[tuple[_Rendering | TooLong, Any]]
    ) -> tuple[TokenizedChat | TooLong, ...]:
        return tuple(
            self._tokenize(rendering, encoding) if isinstance(rendering, _Rendering) else rendering
            for rendering, encoding in pairs
        )

    def _tokenize(self, rendering: _Rendering, encoding: Any) -> TokenizedChat:
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
        self, rendering: _Rendering, encoding: Any, ids: list[int]
    ) -> list[tuple[int, int]] | None:
        """The spans in tokens; None if a token crosses the start of one.

        Text is split at special tokens before it is tokenized, so it is enough to
        compare from the last special token before the span.
        """
        text = rendering.text
        bounds = []
        cut = past = 0
        for span in rendering.spans:
            for found in self._special.finditer(text, past, span.start):
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


def _token_at(encoding: Any, position: int) -> int:
    """The token with the character at `position`, the last of a special token or its first.

    As `encoding.char_to_token`, which looks through all tokens before it.
    """
    return bisect.bisect_right(
        range(len(encoding)), position, key=lambda token: encoding.token_to_chars(token)[1]
    )


def _texts(value: Any) -> Iterable[str]:
    """Every text in a value of JSON's types, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in (*value, *value.values()):
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def _check_calls(message: dict[str, Any], turn: str, index: int) -> None:
    """Refuses a turn that lacks a call, or the text that goes with it (Llama 3.1 drops it)."""
    calls = message.get("tool_calls", ())
    texts = [call["function"]["name"] for call in calls]
    texts += [message["content"].split("</think>")[-1].strip()] if calls else []
    for text in texts:
        if text not in turn:
            raise BadRowError(
                f"message {index + 1}: the chat template does not write {text[:60]!r} into the "
                "turn, so the tool call would be learned without it; use another template, or "
                "write the call into the content"
            )


def _refused(error: Exception) -> BadRowError:
    reason = " ".join(str(error).split())
    return BadRowError(f"the chat template refuses the conversation: {reason}")


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
