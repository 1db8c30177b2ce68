"""What a trace says about the rendering of a conversation's beginnings is so."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from ranktuner_jax.data import BadRowError, ChatEncoder, Conversation, to_conversation
from ranktuner_jax.data.prefixes import Tracer

# Templates that write message by message, each in its own way: (name, text).
STREAMING = {
    "plain": "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "slice": "{% set system = messages[0].content %}{% for m in messages[1:] %}"
    "{{ system if loop.first }}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "inside an if": "{% if messages %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "<|im_end|>{% endfor %}{% endif %}{{ '[assistant]' if add_generation_prompt }}",
    "previous": "{% for m in messages %}{{ loop.previtem.role if loop.previtem }}[{{ m.role }}]"
    "{{ m.content }}<|im_end|>{% endfor %}{{ '[assistant]' if add_generation_prompt }}",
    "tail": "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    "{{ '[assistant]' if add_generation_prompt else '\n' }}",
}
# Templates whose text for n messages is not, or might not be, the beginning of that for more.
LOOKING = {
    "last": "{% for m in messages %}[{{ m.role }}]{{ '!' if loop.last }}{{ m.content }}<|im_end|>"
    "{% endfor %}{{ '[assistant]' if add_generation_prompt }}",
    "last of some": "{% for m in messages %}[{{ m.role }}]{% if m.role == 'user' and loop.last %}!"
    "{% endif %}{{ m.content }}<|im_end|>{% endfor %}{{ '[assistant]' if add_generation_prompt }}",
    "length": "{{ messages | length }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "<|im_end|>{% endfor %}{{ '[assistant]' if add_generation_prompt }}",
    "next": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ loop.nextitem.role }}<|im_end|>"
    "{% endfor %}{{ '[assistant]' if add_generation_prompt }}",
    "next by index": "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{{ messages[loop.index].role }}<|im_end|>{% endfor %}"
    "{{ '[assistant]' if add_generation_prompt }}",
    "tail looks back": "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    "{{ '[assistant]' if add_generation_prompt and messages[-1].role == 'user' }}",
    "tail counts": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}{{ ns.n }}"
    "{{ '[assistant]' if add_generation_prompt }}",
    "tail cycles": "{% set c = cycler('a', 'b') %}{% for m in messages %}{{ c.next() }}"
    "[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}{{ c.current }}",
    "break": "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>"
    "{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %};"
    "{% for m in messages %}{{ m.role }}<|im_end|>{% endfor %}",
    "shared iterator": "{% set g = messages | map(attribute='content') %}{% for c in g %}{{ c }}"
    "{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %};{% for t in 'ab' %}{{ t }}"
    "{% endfor %}{% for c in g %}{{ c }}{% else %}none{% endfor %}",
    "else": "{% for m in messages %}{{ m.content }}{% else %}none{% endfor %}"
    "{% for m in messages[3:] %}{{ m.content }}{% else %}none{% endfor %}",
    "macro": "{% macro all() %}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    "{% endmacro %}{{ all() }}.",
    "set block": "{% set all %}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    "{% endset %}{{ all }}.",
    "filter block": "{% filter upper %}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    "{% endfilter %}.",
    "reversed": "{% for m in messages[::-1] %}{{ m.content }}<|im_end|>{% endfor %}",
    "twice": "{% for m in messages %}{{ m.role }}{% endfor %}{% for m in messages %}{{ m.content }}"
    "<|im_end|>{% endfor %}",
    "filtered": "{% for m in messages if m.role != 'tool' %}[{{ m.role }}]{{ m.content }}<|im_end|>"
    "{% endfor %}{{ '[assistant]' if add_generation_prompt }}",
    "rejected": "{% for m in messages | rejectattr('role', 'equalto', 'tool') %}[{{ m.role }}]"
    "{{ m.content }}<|im_end|>{% endfor %}{{ '[assistant]' if add_generation_prompt }}",
    "batched": "{% for pair in messages | batch(2) %}{% for m in pair %}{{ m.content }}<|im_end|>"
    "{% endfor %};{% endfor %}",
    "nested": "{% for m in messages %}{% for o in messages %}{{ o.role }}{% endfor %}"
    "{{ m.content }}<|im_end|>{% endfor %}",
    "member": "{% for m in messages %}{{ m in messages[1:] }}{{ m.content }}<|im_end|>{% endfor %}",
    "compared": "{{ messages == [] }}{{ messages.count is defined }}{% for m in messages %}"
    "{{ m.content }}<|im_end|>{% endfor %}",
    "third": "{% if messages[2] %}three{% endif %}{% for m in messages %}{{ m.content }}<|im_end|>"
    "{% endfor %}",
    "continue": "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
    "[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}",
    "asked inside": "{% for m in messages %}{{ '?' if add_generation_prompt }}[{{ m.role }}]"
    "{{ m.content }}<|im_end|>{% endfor %}{{ '[assistant]' if add_generation_prompt }}",
    "unpacked": "{% set a, b, c, d = messages %}{{ a.content }}{% for m in messages %}"
    "{{ m.content }}<|im_end|>{% endfor %}",
    "first": "{% for t in 'ab' %}{{ t }}{% endfor %}{{ (messages | first).role }}"
    "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
    "tool loop first": "{% for t in 'ab' %}{{ t }}{% endfor %}{{ messages[0].role }}"
    "{{ (messages | first).role }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
}


def chats(count: int) -> list[list[dict[str, Any]]]:
    """Conversations of one to seven messages."""
    rng = np.random.default_rng(0)
    roles = ["system", "user", "user", "assistant", "assistant", "tool"]
    return [
        [
            {"role": str(rng.choice(roles)), "content": f"{i} " * rng.integers(3)}
            for i in range(size)
        ]
        for size in rng.integers(1, 8, count)
    ]


def render(template: Any, messages: list[dict[str, Any]], **options: Any) -> str | None:
    try:
        return str(template.render(messages=messages, **options))
    except Exception:
        return None


@pytest.mark.parametrize(
    "source", [*STREAMING.values(), *LOOKING.values()], ids=[*STREAMING, *LOOKING]
)
@pytest.mark.parametrize("asks", [False, True])
def test_a_trace_tells_how_each_beginning_is_rendered(source: str, asks: bool) -> None:
    template = _compile_jinja_template(source)
    tracer = Tracer(template, source)
    for messages in chats(60):
        trace = tracer.trace(messages, add_generation_prompt=asks)
        if trace is None:
            continue
        assert trace.text == render(template, messages, add_generation_prompt=asks)
        for count, end in trace.ends.items():
            beginning = render(template, messages[:count], add_generation_prompt=asks)
            assert trace.text[:end] + trace.tail == beginning


@pytest.mark.parametrize("source", STREAMING.values(), ids=STREAMING)
def test_a_template_that_writes_message_by_message_is_rendered_once(source: str) -> None:
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant") * 3]
    trace = Tracer(_compile_jinja_template(source), source).trace(turns)
    assert trace is not None
    assert trace.ends.keys() >= set(range(2, 10))


@pytest.mark.parametrize("name", ["smollm2", "qwen2_5", "llama3_1", "gemma3"])
def test_templates_that_models_ship_are_rendered_once(
    shipped: Callable[[str], Any], name: str
) -> None:
    source = shipped(name).chat_template
    turns = [{"role": role, "content": role} for role in ("user", "assistant") * 100]
    trace = Tracer(_compile_jinja_template(source), source).trace(turns, tools=None)
    assert trace is not None
    assert trace.ends.keys() >= set(range(1, 201))


# --- the masks are those of rendering every prefix ---


ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")


def by_prefix(tokenizer: Any, conversation: Conversation) -> Any:
    """Texts and supervised spans by two renderings for each turn; None if that is refused."""
    template = _compile_jinja_template(tokenizer.chat_template)
    options = {
        **tokenizer.special_tokens_map,
        "enable_thinking": True,
        "date_string": "26 Jul 2024",
        "tools": list(conversation.tools) or None,
    }
    last = max(i for i, weight in enumerate(conversation.weights) if weight)
    messages = list(conversation.messages[: last + 1])
    whole = render(template, messages, add_generation_prompt=False, **options)
    merged: list[tuple[int, int, float]] = []
    samples = []
    for i, weight in enumerate(conversation.weights[: last + 1]):
        if not weight:
            continue
        before = render(template, messages[:i], add_generation_prompt=True, **options)
        through = render(template, messages[: i + 1], add_generation_prompt=False, **options)
        if whole is None or before is None or through is None or not through.startswith(before):
            return None
        stop = len(through.rstrip())
        if stop <= len(before) or not through[:stop].endswith(ENDS):
            return None
        span = (len(before), stop, weight)
        if whole.startswith(through[:stop]):
            merged.append(span)
        else:
            samples.append((through, [span]))
    return [*samples, (whole, merged)]


def tokens_of(tokenizer: Any, text: str, spans: list[tuple[int, int, float]]) -> Any:
    """Token ids and weights by the characters that each token covers."""
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    weights = np.zeros(len(encoding.ids))
    for start, stop, weight in spans:
        for index, (first, past) in enumerate(encoding.offsets):
            if first >= start and past <= stop:
                weights[index] = weight
    length = int(np.flatnonzero(weights)[-1]) + 1
    return encoding.ids[:length], weights[:length].tolist()


def conversations(count: int) -> list[Conversation]:
    """Turns of any roles, with reasoning, calls and weights."""
    rng = np.random.default_rng(0)
    words = ["It", "is", "42", "so", "<think>", "</think>", "yes."]

    def text() -> str:
        return " ".join(rng.choice(words, rng.integers(1, 5)))

    def answer(message: dict[str, Any]) -> dict[str, Any]:
        message |= {"role": "assistant", "weight": float(rng.choice([0, 0.5, 1, 1]))}
        return message | ({"reasoning_content": text()} if rng.random() < 0.3 else {})

    def make() -> Conversation:
        messages: list[dict[str, Any]] = []
        if rng.random() < 0.3:
            messages.append({"role": "system", "content": text()})
        for _ in range(rng.integers(1, 5)):
            messages.append({"role": "user", "content": text()})
            while rng.random() < 0.2:
                call = {"name": "add", "arguments": {"a": int(rng.integers(9))}}
                messages.append(answer({"content": None, "tool_calls": [call]}))
                messages.append({"role": "tool", "content": text()})
            messages.append(answer({"content": text()}))
        messages[-1]["weight"] = 1.0
        return to_conversation({"messages": messages})

    return [make() for _ in range(count)]


def test_masks_are_those_of_rendering_every_prefix(
    shipped: Callable[[str], Any], shipped_model: str
) -> None:
    tokenizer = shipped(shipped_model)
    given = conversations(300)
    exact = 0
    for conversation, samples in zip(given, ChatEncoder(tokenizer).encode(given), strict=True):
        expected = by_prefix(tokenizer, conversation)
        if isinstance(samples, BadRowError):
            keys = {key for message in conversation.messages for key in message}
            ignored = {"tool_calls", "reasoning_content"} & keys
            ignored = {key for key in ignored if key not in tokenizer.chat_template}
            assert expected is None or ignored, samples
            continue
        assert expected is not None
        for sample, (text, spans) in itertools.zip_longest(samples, expected):
            ids, weights = tokens_of(tokenizer, text, spans)
            assert sample.tokens.tolist() == ids
            assert sample.weights.tolist() == weights
        exact += 1
    assert exact > 50


@pytest.mark.parametrize(
    "source", [*STREAMING.values(), *LOOKING.values()], ids=[*STREAMING, *LOOKING]
)
def test_templates_that_look_ahead_get_the_same_masks_or_are_refused(
    make_tokenizer: Callable[..., Any], source: str
) -> None:
    tokenizer = make_tokenizer("qwen", source)
    turns = [{"role": "assistant" if i % 2 else "user", "content": f"It is {i}."} for i in range(6)]
    given = [to_conversation({"messages": turns[:count]}) for count in (2, 4, 6)]
    for conversation, samples in zip(given, ChatEncoder(tokenizer).encode(given), strict=True):
        expected = by_prefix(tokenizer, conversation)
        if expected is None:
            assert isinstance(samples, BadRowError)
            continue
        assert not isinstance(samples, BadRowError)
        assert [(sample.tokens.tolist(), sample.weights.tolist()) for sample in samples] == [
            tokens_of(tokenizer, text, spans) for text, spans in expected
        ]
