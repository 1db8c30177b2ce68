"""Rows of any source as conversations: messages with weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
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
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant"}

# <<48/2=24>>, as GSM8K writes for a calculator.
_CALCULATOR_MARK = re.compile(r"<<[^<>=\n]*=[^<>\n]*>>")

# Content that templates render but a Conversation cannot hold: refused, not silently dropped.
_REFUSED_KEYS = ("tool_calls", "reasoning_content", "reasoning", "thinking")


class BadRowError(ValueError):
    """A row cannot be used; `data.on_bad_row` says whether to stop or to skip it."""


@dataclass(frozen=True)
class Conversation:
    """Messages with the weight of each assistant turn.

    Attributes:
      messages: Dicts of `role` and `content`, in order.
      weights: One per message; 0 if it is not supervised.
      row: The row of the source, for graders.
      where: File and line, or data set and row number.
    """

    messages: tuple[dict[str, str], ...]
    weights: tuple[float, ...]
    row: Mapping[str, Any]
    where: str = ""


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
      row: The row. An optional `weight` (in each message, and in the row)
        multiplies the loss of its tokens; 0 leaves them unsupervised.
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

    row_weight = _weight(row.get("weight"), "weight")
    messages, weights = [], []
    for number, turn in enumerate(turns, 1):
        message = _message(turn, f"message {number}")
        if strip_calculator_marks and message["role"] == "assistant":
            message["content"] = _CALCULATOR_MARK.sub("", message["content"])
        weight = _weight(turn.get("weight"), f"message {number}: weight") * row_weight
        messages.append(message)
        weights.append(weight if message["role"] == "assistant" else 0.0)
        if message["role"] == "assistant" and not message["content"].strip():
            raise BadRowError(f"message {number}: the assistant's answer is empty")
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRowError("the conversation has no assistant turn, so there is nothing to learn")
    if not any(weights):
        raise BadRowError("every assistant turn has weight 0, so there is nothing to learn")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
        weights.insert(0, 0.0)
    return Conversation(tuple(messages), tuple(weights), row, where)


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
        role = turn["from"]
        role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
        return {**turn, "role": role, "content": turn["value"]}

    return [renamed(turn) for turn in turns]


def _message(turn: Any, name: str) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise BadRowError(f"{name}: expected an object with role and content, got {_short(turn)}")
    refused = [key for key in _REFUSED_KEYS if turn.get(key)]
    if refused:
        raise BadRowError(
            f"{name}: {refused[0]!r} is not supported; write it into the content the way the "
            "model's chat template would"
        )
    role = _text(turn.get("role"), f"{name}: role")
    return {"role": role, "content": _text(turn.get("content"), f"{name}: content")}


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


def _weight(value: Any, name: str) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRowError(f"{name}: expected a number, got {_short(value)}")
    if not math.isfinite(value) or value < 0:
        raise BadRowError(f"{name}: expected a finite number of at least 0, got {value}")
    return float(value)


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
