"""Conversations as text, with the characters of the assistant's turns."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from ranktuner_jax.data.prefixes import Tracer
from ranktuner_jax.data.records import BadRowError, Conversation
from ranktuner_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatRenderer", "Rendering", "Span"]

# What templates call the text that an assistant thought; the first is the usual name.
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, stop) of an assistant turn, generated from all text before it."""

    start: int
    stop: int
    weight: float


@dataclass(frozen=True, slots=True)
class Rendering:
    """A text, and the turns in it that are learned, in their order."""

    text: str
    spans: tuple[Span, ...]


class ChatRenderer:
    """Renders conversations with a chat template and locates the assistant's turns.

    A template with `{% generation %}` marks the assistant's turns itself. With
    others, the conversation is rendered up to each assistant turn, ending in the
    generation prompt as at inference, and again including the turn: the
    difference is the turn. The first must be a prefix of the second, or the row
    is refused. (Where the template writes message by message, one rendering
    shows what all of these are: see `Tracer`.)

    A template may render an earlier turn differently once more turns follow
    (Qwen3 drops its thinking, Mistral moves the system prompt). Such a turn
    becomes a separate sample that ends there, so that each turn is learned in
    exactly the context in which it is generated.

    Tools, tool calls and reasoning are written where the template writes them.
    A template that never reads one of them refuses the row, as does a turn
    without the calls that it should make.

    Attributes:
      special: Finds the tokenizer's special tokens in a text, the longest first.

    Args:
      tokenizer: A tokenizer with a chat template.
      enable_thinking: Passed to the template; Qwen3's uses it.

    Raises:
      UserError: If the tokenizer has no chat template or no special tokens.

    Example:
      >>> import tokenizers, transformers
      >>> tokenizer = transformers.PreTrainedTokenizerFast(
      ...     tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({}, unk_token="?")),
      ...     eos_token="<end>",
      ...     chat_template="{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
      ... )
      >>> turns = ({"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"})
      >>> [rendering] = ChatRenderer(tokenizer).render(Conversation(turns, (0.0, 1.0), row={}))
      >>> rendering.text, rendering.spans
      ('2 + 2<end>4<end>', (Span(start=10, stop=16, weight=1.0),))
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
        self.special = re.compile("|".join(map(re.escape, longest_first)))

    def render(self, conversation: Conversation) -> list[Rendering]:
        """The texts of which the turns of a conversation are learned.

        Returns:
          The conversation up to its last turn that is learned; before it comes one text for each
          turn that the template renders differently later on.

        Raises:
          BadRowError: If the template cannot show what the conversation holds.
        """
        named = [(f"message {i}", m) for i, m in enumerate(conversation.messages, 1)]
        for name, texts in (*named, ("tools", conversation.tools)):
            for text in _texts(texts):
                if found := self.special.search(text):
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

    def prompt(self, messages: Sequence[dict[str, Any]]) -> str:
        """The text of a conversation up to where the model's answer begins.

        Args:
          messages: Its turns, the last of which is not the assistant's.

        Raises:
          BadRowError: If the chat template refuses them.
        """
        turns = [self._for_template(message) for message in messages]
        return self._template_text(turns, add_generation_prompt=True)

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
            turns: list[dict[str, Any]] = [
                {"role": "user", "content": "Hello."},
                {"role": "assistant", "content": "", "tool_calls": [probe]},
            ]
            try:
                self._template_text(turns)
            except BadRowError:
                works.append(False)
            else:
                works.append(True)
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
    ) -> Rendering:
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
                spans.append(Span(start, end, weight))
        return Rendering(text, tuple(spans))

    def _render_by_prefix(
        self, messages: list[dict[str, Any]], weights: Sequence[float], options: dict[str, Any]
    ) -> list[Rendering]:
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
        merged: list[Span] = []
        alone: list[Rendering] = []
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
            span = Span(base + len(before), base + stop, weight)
            if whole.startswith(through[:stop], base):
                merged.append(span)
            else:
                alone.append(Rendering(whole[:base] + through, (span,)))
        # `merged` always contains the last turn, so samples are in the order of their ends.
        return [*alone, Rendering(whole, tuple(merged))]

    def _turn_end(self, text: str, start: int, stop: int) -> int:
        """The end of the turn at [start, stop), including its end-of-turn token."""
        end = start + len(text[start:stop].rstrip())  # Templates write a newline after the token.
        for found in self.special.finditer(text, max(start, end - 256), end):
            if found.end() == end:
                return end
        following = self.special.match(text, stop)
        if following is None:
            raise BadRowError(
                "the chat template writes no end-of-turn token after the assistant's turn, so the "
                "model would never learn to stop; add the tokenizer's eos_token to the template"
            )
        return following.end()


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
