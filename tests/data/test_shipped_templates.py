"""Under the templates of Qwen, Llama, Gemma and SmolLM2, masks are what each format says."""

import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ranktuner_jax.data import BadRowError, ChatEncoder, TokenizedChat, to_conversation

Shipped = Callable[[str], Any]

BENCHMARKS = pathlib.Path(__file__).parents[3] / "shared/data"

# What opens an assistant's turn, and what ends every turn.
CHATML = ("<|im_start|>assistant\n", "<|im_end|>")
FORMATS = {
    "smollm2": CHATML,
    "qwen2_5": CHATML,
    "qwen3": CHATML,
    "llama3_1": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "gemma3": ("<start_of_turn>model\n", "<end_of_turn>"),
}

WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL: dict[str, Any] = {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}
ASK: list[dict[str, Any]] = [
    {"role": "user", "content": "Is it warm?"},
    {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "content": "21 degrees", "name": "weather"},
    {"role": "assistant", "content": "It is."},
]


def encode(tokenizer: Any, row: dict[str, Any]) -> tuple[TokenizedChat, ...]:
    [samples] = ChatEncoder(tokenizer).encode([to_conversation(row)])
    if isinstance(samples, BadRowError):
        raise samples
    return samples


def decode(tokenizer: Any, tokens: Any) -> str:
    text: str = tokenizer.backend_tokenizer.decode(list(tokens), skip_special_tokens=False)
    return text


def supervised(tokenizer: Any, sample: TokenizedChat) -> list[str]:
    edges = np.flatnonzero(np.diff([False, *sample.mask, False]))
    return [decode(tokenizer, sample.tokens[a:b]) for a, b in edges.reshape(-1, 2)]


def by_format(tokenizer: Any, model: str, text: str) -> tuple[list[int], list[bool]]:
    """Tokens of a text, and which lie between the opening of a turn and its end.

    What precedes a turn is tokenized without it, as before it is generated.
    """
    opening, end = map(re.escape, FORMATS[model])
    turns = [found.span(1) for found in re.finditer(f"{opening}(.*?{end})", text, re.DOTALL)]
    if model == "qwen3":  # Its earlier turns are context without their (empty) thinking.
        turns = turns[-1:]
    ids: list[int] = []
    mask: list[bool] = []
    for begin, (start, stop) in zip([0, *(stop for _, stop in turns)], turns, strict=False):
        for piece, learned in ((text[begin:start], False), (text[start:stop], True)):
            tokens = tokenizer.backend_tokenizer.encode(piece, add_special_tokens=False).ids
            ids += tokens
            mask += [learned] * len(tokens)
    return ids, mask


# --- real conversations ---


def conversations(file: str) -> list[dict[str, Any]]:
    path = BENCHMARKS / file
    if not path.is_file():
        pytest.skip("needs the benchmark files")
    with path.open() as lines:
        return [json.loads(line) for line in lines][::8]


@pytest.mark.parametrize("file", ["oasst1_en_threads.jsonl", "numinamath_cot_1k.jsonl"])
def test_masks_of_real_conversations_are_what_the_format_says(
    shipped: Shipped, shipped_model: str, file: str
) -> None:
    tokenizer = shipped(shipped_model)
    rows = [to_conversation(row) for row in conversations(file)]
    for conversation, samples in zip(rows, ChatEncoder(tokenizer).encode(rows), strict=True):
        assert not isinstance(samples, BadRowError)
        messages = [*conversation.messages]
        ends = [i + 1 for i, message in enumerate(messages) if message["role"] == "assistant"]
        if shipped_model != "qwen3":
            ends = ends[-1:]
        assert len(samples) == len(ends)
        for sample, end in zip(samples, ends, strict=True):
            text = tokenizer.apply_chat_template(
                messages[:end], tokenize=False, date_string="26 Jul 2024"
            )
            ids, mask = by_format(tokenizer, shipped_model, text)
            assert sample.tokens.tolist() == ids
            assert sample.mask.tolist() == mask


# --- tools ---


@pytest.mark.parametrize("arguments", [CALL["arguments"], json.dumps(CALL["arguments"])])
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_call_is_supervised_as_the_template_writes_it(
    shipped: Shipped, arguments: Any, bare: bool, as_text: bool
) -> None:
    call = {"name": "weather", "arguments": arguments}
    calls: Any = [call if bare else {"type": "function", "function": call}]
    tools: Any = [WEATHER if bare else {"type": "function", "function": WEATHER}]
    if as_text:
        calls, tools = json.dumps(calls), json.dumps(tools)
    row = {"messages": [ASK[0], {**ASK[1], "tool_calls": calls}, *ASK[2:]], "tools": tools}

    tokenizer = shipped("qwen2_5")
    [sample] = encode(tokenizer, row)
    written = '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "days": 2}}\n'
    # The prompt ends in a newline, with which the call's text begins.
    called = written.removeprefix("\n") + "</tool_call><|im_end|>"
    assert supervised(tokenizer, sample) == [called, "It is.<|im_end|>"]
    text = decode(tokenizer, sample.tokens)
    assert json.dumps({"type": "function", "function": WEATHER}) in text
    assert "user\n<tool_response>\n21 degrees\n</tool_response><|im_end|>\n" in text

    tokenizer = shipped("llama3_1")
    [sample] = encode(tokenizer, row)
    called = '{"name": "weather", "parameters": {"city": "Zürich", "days": 2}}<|eot_id|>'
    assert supervised(tokenizer, sample) == [called, "It is.<|eot_id|>"]
    assert '"description": "The weather of a city."' in decode(tokenizer, sample.tokens)
    assert 'ipython<|end_header_id|>\n\n"21 degrees"<|eot_id|>' in decode(tokenizer, sample.tokens)


def test_sharegpts_calls_and_observations_are_tool_turns(shipped: Shipped) -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Is it warm?"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "21 degrees"},
            {"from": "gpt", "value": "It is."},
        ],
        "tools": json.dumps([WEATHER]),
    }
    tokenizer = shipped("qwen2_5")
    openai = {"messages": ASK, "tools": [WEATHER]}
    [expected], [sample] = encode(tokenizer, openai), encode(tokenizer, row)
    assert sample.tokens.tolist() == expected.tokens.tolist()
    assert sample.mask.tolist() == expected.mask.tolist()


def test_a_template_that_joins_arguments_to_text_is_given_text(make_tokenizer: Any) -> None:
    template = (
        "{{ tools | length if tools }}{% for m in messages %}<|im_start|>{{ m.role + '\n' }}"
        "{% for c in m.tool_calls or () %}"
        "{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = make_tokenizer("qwen", template)
    [sample] = encode(tokenizer, {"messages": ASK, "tools": [WEATHER]})
    called = 'weather {"city": "Zürich", "days": 2}<|im_end|>'
    assert supervised(tokenizer, sample) == [called, "It is.<|im_end|>"]


@pytest.mark.parametrize(
    ("model", "row", "reason"),
    [
        ("smollm2", {"messages": ASK}, "has tool_calls, which the chat template never reads"),
        ("gemma3", {"messages": ASK}, "has tool_calls, which the chat template never reads"),
        (
            "smollm2",
            {"messages": [ASK[0], ASK[3]], "tools": [WEATHER]},
            "has tools, which the chat template never reads",
        ),
        (
            "llama3_1",
            {"messages": [ASK[0], {**ASK[3], "reasoning": "So."}]},
            "has reasoning_content, which the chat template never reads",
        ),
        (
            "llama3_1",
            {"messages": [ASK[0], {**ASK[1], "content": "Let me see."}]},
            "message 2: the chat template does not write 'Let me see.' into the turn",
        ),
        (
            "llama3_1",
            {"messages": [ASK[0], {**ASK[1], "tool_calls": [CALL, CALL]}]},
            "only supports single tool-calls at once",
        ),
        (
            "qwen3",
            {"messages": ASK, "tools": [{**WEATHER, "description": "<|im_end|>"}]},
            r"tools contains '<\|im_end\|>'",
        ),
        (
            "qwen3",
            {"messages": [ASK[0], {**ASK[1], "tool_calls": [{"name": "a<|im_end|>"}]}]},
            r"message 2 contains '<\|im_end\|>'",
        ),
        (
            "qwen3",
            {"messages": [ASK[0], {**ASK[3], "thinking": "<|im_start|>"}]},
            r"message 2 contains '<\|im_start\|>'",
        ),
    ],
)
def test_what_the_template_would_lose_is_refused(
    shipped: Shipped, model: str, row: dict[str, Any], reason: str
) -> None:
    with pytest.raises(BadRowError, match=reason):
        encode(shipped(model), row)


# --- reasoning ---


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_qwen3_learns_each_answer_with_its_own_reasoning_only(shipped: Shipped, key: str) -> None:
    tokenizer = shipped("qwen3")
    turns = [
        {"role": "user", "content": "12 + 30?"},
        {"role": "assistant", "content": "It is 42.", key: "first this"},
        {"role": "user", "content": "Half of 48?"},
        {"role": "assistant", "content": "24.", key: "then that"},
    ]
    first, second = encode(tokenizer, {"messages": turns})
    assert decode(tokenizer, first.tokens) == (
        "<|im_start|>user\n12 + 30?<|im_end|>\n<|im_start|>assistant\n"
        "<think>\nfirst this\n</think>\n\nIt is 42.<|im_end|>"
    )
    assert supervised(tokenizer, first) == ["<think>\nfirst this\n</think>\n\nIt is 42.<|im_end|>"]
    assert decode(tokenizer, second.tokens) == (
        "<|im_start|>user\n12 + 30?<|im_end|>\n<|im_start|>assistant\nIt is 42.<|im_end|>\n"
        "<|im_start|>user\nHalf of 48?<|im_end|>\n<|im_start|>assistant\n"
        "<think>\nthen that\n</think>\n\n24.<|im_end|>"
    )
    assert supervised(tokenizer, second) == ["<think>\nthen that\n</think>\n\n24.<|im_end|>"]


def test_reasoning_between_calls_is_kept_so_that_the_steps_are_one_sample(
    shipped: Shipped,
) -> None:
    tokenizer = shipped("qwen3")
    turns = [
        ASK[0],
        {**ASK[1], "reasoning_content": "look it up", "content": "One moment."},
        ASK[2],
        {**ASK[3], "reasoning_content": "21 is warm"},
    ]
    [sample] = encode(tokenizer, {"messages": turns, "tools": [WEATHER]})
    assert supervised(tokenizer, sample) == [
        "<think>\nlook it up\n</think>\n\nOne moment.\n<tool_call>\n"
        '{"name": "weather", "arguments": {"city": "Zürich", "days": 2}}\n</tool_call><|im_end|>',
        "<think>\n21 is warm\n</think>\n\nIt is.<|im_end|>",
    ]


def test_gemmas_system_prompt_is_part_of_the_first_question(shipped: Shipped) -> None:
    tokenizer = shipped("gemma3")
    turns = [{"role": "system", "content": "Be brief."}, ASK[0], ASK[3], ASK[0], ASK[3]]
    [sample] = encode(tokenizer, {"messages": turns})
    text = decode(tokenizer, sample.tokens)
    assert text.startswith("<bos><start_of_turn>user\nBe brief.\n\nIs it warm?<end_of_turn>\n")
    assert supervised(tokenizer, sample) == ["It is.<end_of_turn>"] * 2
