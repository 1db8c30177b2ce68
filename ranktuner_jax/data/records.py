"""Rows of any source as conversations: messages with weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["BadRowError", "Conversation", "to_conversation"]

# Pairs of columns that are tried in this order: the common form, NuminaMath-CoT, GSM8K, Alpaca.
_COLUMNS = (
    ("prompt", "completion"),
    ("problem", "solution"),
    ("question", "answer"),
    ("instruction", "output"),
)
# Roles as ShareGPT's rows name them, and what chat templates call them.
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function-response": "tool",
}
# ShareGPT's turns whose value is the JSON of a call, or of several.
_SHAREGPT_CALLS = ("function_call", "function-call")

# <<48/2=24>>, as GSM8K writes for a calculator.
_CALCULATOR_MARK = re.compile(r"<<[^<>=\n]*=[^<>\n]*>>")

# The names under which data sets keep what an assistant thought before its answer.
_REASONING = ("reasoning_content", "reasoning", "thinking")


class BadRowError(ValueError):
    """A row cannot be used; `data.on_bad_row` says whether to stop or to skip it."""


@dataclass(frozen=True)
class Conversation:
    """Messages with the weight of each assistant turn.

    Attributes:
      messages: Dicts of `role` and `content`, in order; an assistant's may have
        `reasoning_content` (text) and `tool_calls`, a tool's `name` and `tool_call_id`. A call is
        `{"type": "function", "function": {"name": ..., "arguments": {...}}}`.
      weights: One per message; 0 if it is not supervised.
      row: The row of the source, for graders.
      where: File and line, or data set and row number.
      tools: What the assistant may call: JSON schemas,
        `{"type": "function", "function": {...}}`.
    """

    messages: tuple[dict[str, Any], ...]
    weights: tuple[float, ...]
    row: Mapping[str, Any]
    where: str = ""
    tools: tuple[dict[str, Any], ...] = ()


def to_conversation(
    row: Mapping[str, Any],
    *,
    where: str = "",
    prompt_column: str = "",
    completion_column: str = "",
    system: str = "",
    strip_calculator_marks: bool = False,
) -> Conversation:
    """Reads a row that has `messages`, or a column for the prompt and one for the completion.

    Args:
      row: The row. An optional `weight` (in each message, and in the row) multiplies the loss of
        its tokens; 0 leaves them unsupervised, and so does `train: false`. `tools` and the
        messages' `tool_calls` may be JSON text, and so may the arguments of a call.
      where: File and line, or data set and row number.
      prompt_column: Column of the prompt; when empty, `messages`, ShareGPT's `conversations`,
        then `prompt`/`completion`, `problem`/`solution`, `question`/`answer` and Alpaca's
        `instruction`/`output`, where `input` follows the instruction.
      completion_column: Column of the completion.
      system: A system prompt for conversations that have none.
      strip_calculator_marks: Whether to remove GSM8K's `<<48/2=24>>`.

    Raises:
      BadRowError: If the row has no usable conversation, with the reason.

    Example:
      >>> row = {"question": "Half of 48?", "answer": "It is 48/2 = <<48/2=24>>24."}
      >>> to_conversation(row, strip_calculator_marks=True).messages[1]["content"]
      'It is 48/2 = 24.'
    """
    if prompt_column or completion_column:
        turns = _from_columns(row, prompt_column, completion_column)
    elif row.get("messages") is not None:
        turns = row["messages"]
    elif row.get("conversations") is not None:
        turns = _from_sharegpt(row["conversations"])
    else:
        pair = next((pair for pair in _COLUMNS if None not in map(row.get, pair)), None)
        if pair is None:
            raise BadRowError(
                "expected a column 'messages' or 'conversations', or prompt/completion, "
                "problem/solution, question/answer or instruction/output, got the columns "
                f"{sorted(row)}; name yours in data.prompt_column and data.completion_column"
            )
        turns = _from_columns(row, *pair)
    if not isinstance(turns, list | tuple) or not turns:
        raise BadRowError(f"messages: expected a list of turns, got {_short(turns)}")

    row_weight = _weight(row)
    messages, weights = [], []
    for number, turn in enumerate(turns, 1):
        name = f"message {number}"
        message = _message(turn, name)
        if strip_calculator_marks and message["role"] == "assistant":
            message["content"] = _CALCULATOR_MARK.sub("", message["content"])
        weight = _weight(turn, f"{name}: ") * row_weight
        messages.append(message)
        weights.append(weight if message["role"] == "assistant" else 0.0)
        empty = not message["content"].strip() and "tool_calls" not in message
        if message["role"] == "assistant" and empty:
            raise BadRowError(f"{name}: the assistant's answer is empty")
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRowError("the conversation has no assistant turn, so there is nothing to learn")
    if not any(weights):
        raise BadRowError("every assistant turn has weight 0, so there is nothing to learn")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
        weights.insert(0, 0.0)
    return Conversation(tuple(messages), tuple(weights), row, where, _tools(row.get("tools")))


def _from_columns(row: Mapping[str, Any], prompt: str, completion: str) -> list[dict[str, Any]]:
    missing = [repr(column) for column in (prompt, completion) if column not in row]
    if missing:
        raise BadRowError(f"expected the columns {prompt!r} and {completion!r}, got {sorted(row)}")
    question = _text(row[prompt], prompt)
    if prompt == "instruction" and row.get("input"):
        question += "\n\n" + _text(row["input"], "input")
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": _text(row[completion], completion)},
    ]


def _from_sharegpt(turns: Any) -> Any:
    """Renames `from` and `value` to `role` and `content`; other turns stay unchanged."""
    if not isinstance(turns, list | tuple):
        return turns

    def renamed(turn: Any) -> Any:
        if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys():
            return turn
        role, value = turn["from"], turn["value"]
        if role in _SHAREGPT_CALLS:
            return {**turn, "role": "assistant", "content": None, "tool_calls": value}
        role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
        return {**turn, "role": role, "content": value}

    return [renamed(turn) for turn in turns]


def _message(turn: Any, name: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise BadRowError(f"{name}: expected an object with role and content, got {_short(turn)}")
    message: dict[str, Any] = {"role": _text(turn.get("role"), f"{name}: role")}
    calls = _calls(turn.get("tool_calls"), f"{name}: tool_calls")
    # Templates join content to text, and would write a missing one as None.
    content = "" if calls and turn.get("content") is None else turn.get("content")
    message["content"] = _text(content, f"{name}: content")
    # The extra keys of templates exist only where they have a value: Llama's asks whether they do.
    thoughts = [_text(turn[key], f"{name}: {key}") for key in _REASONING if turn.get(key)]
    if len(set(thoughts)) > 1:
        raise BadRowError(f"{name}: expected one of {', '.join(_REASONING)}, got several")
    extra: dict[str, Any] = {"reasoning_content": thoughts[0]} if thoughts else {}
    extra |= {"tool_calls": calls} if calls else {}
    if extra and message["role"] != "assistant":
        raise BadRowError(
            f"{name}: expected {next(iter(extra))} in the assistant's messages only, got the role "
            f"{message['role']!r}"
        )
    if message["role"] == "tool":
        extra = {
            key: _text(turn[key], f"{name}: {key}")
            for key in ("name", "tool_call_id")
            if turn.get(key) is not None
        }
    return message | extra


def _calls(value: Any, name: str) -> list[dict[str, Any]]:
    """The calls of a message, each with its arguments as an object."""
    calls = []
    for call in _objects(value, name):
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRowError(f"{name}: expected calls with the name of a function, got {call}")
        arguments = _json(function.get("arguments") or {}, f"{name}: arguments")
        if not isinstance(arguments, Mapping):
            raise BadRowError(f"{name}: arguments: expected an object, got {_short(arguments)}")
        own = {"id": call["id"]} if call.get("id") is not None else {}
        function = {"name": function["name"], "arguments": arguments}
        calls.append({"type": "function", **own, "function": function})
    return calls


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    return tuple(
        {"type": "function", "function": tool}
        if "function" not in tool and "name" in tool
        else tool
        for tool in _objects(value, "tools")
    )


def _objects(value: Any, name: str) -> Iterator[dict[str, Any]]:
    """The objects of a list; it, or they, may be JSON text, and one may stand for a list of it."""
    value = _json(value or [], name) or []
    for item in value if isinstance(value, list | tuple) else [value]:
        item = _json(item, name)
        if not isinstance(item, dict):
            raise BadRowError(f"{name}: expected a list of objects, got {_short(item)}")
        yield item


def _json(value: Any, name: str) -> Any:
    """A value of JSON's types, read from text if it is text."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return json.loads(_text(text, name) or "null")
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, BadRowError):
            raise
        raise BadRowError(f"{name}: expected JSON, got {_short(value)}: {error}") from error


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRowError(f"{name}: expected text, got {_short(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(
            f"{name}: character {error.start} is the lone surrogate {value[error.start]!a}, "
            "which is not valid text"
        ) from error
    return value


def _weight(holder: Mapping[str, Any], name: str = "") -> float:
    """The weight of a row or a message; 0 if its `train` is false."""
    train, value = holder.get("train"), holder.get("weight")
    if train not in (None, False, True):
        raise BadRowError(f"{name}train: expected true or false, got {_short(train)}")
    if value is None:
        value = 1.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRowError(f"{name}weight: expected a number, got {_short(value)}")
    if not math.isfinite(value) or value < 0:
        raise BadRowError(f"{name}weight: expected a finite number of at least 0, got {value}")
    return 0.0 if train is not None and not train else float(value)


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
