"""Rows of every form become conversations, or are refused with a reason."""

import json
from typing import Any

import pytest

from ranktuner_jax.data import BadRowError, to_conversation

TURNS = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"prompt": "2 + 2", "completion": "4"},
        {"problem": "2 + 2", "solution": "4", "messages": None, "prompt": None, "completion": None},
        {"question": "2 + 2", "answer": "4"},
        {"instruction": "2 + 2", "input": "", "output": "4"},
        {"conversations": [{"from": "human", "value": "2 + 2"}, {"from": "gpt", "value": "4"}]},
        {"conversations": TURNS},
    ],
    ids=["messages", "prompt", "problem", "question", "alpaca", "sharegpt", "conversations"],
)
def test_the_usual_columns_are_found(row: dict[str, Any]) -> None:
    conversation = to_conversation(row)
    assert list(conversation.messages) == TURNS
    assert conversation.weights == (0.0, 1.0)
    assert conversation.row is row


def test_named_columns_win_over_the_usual_ones() -> None:
    row = {"prompt": "no", "completion": "no", "q": "2 + 2", "a": "4"}
    conversation = to_conversation(row, prompt_column="q", completion_column="a")
    assert list(conversation.messages) == TURNS


def test_the_input_of_an_instruction_follows_it() -> None:
    row = {"instruction": "Add.", "input": "2 + 2", "output": "4"}
    assert to_conversation(row).messages[0]["content"] == "Add.\n\n2 + 2"


def test_the_weights_of_row_and_turn_multiply() -> None:
    turns = [TURNS[0], {**TURNS[1], "weight": 0.5}, *TURNS]
    assert to_conversation({"messages": turns, "weight": 3}).weights == (0.0, 1.5, 0.0, 3.0)


def test_train_flags_of_row_and_turn_leave_turns_unsupervised() -> None:
    turns = [TURNS[0], {**TURNS[1], "train": False, "weight": 2}, TURNS[0], TURNS[1]]
    kept = {**TURNS[1], "train": True, "weight": 2}
    row = {"messages": [*turns, TURNS[0], kept], "train": True}
    assert to_conversation(row).weights == (0.0, 0.0, 0.0, 1.0, 0.0, 2.0)
    for flag in (False, 0):
        with pytest.raises(BadRowError, match="every assistant turn has weight 0"):
            to_conversation({**row, "train": flag})
    sharegpt = [
        {"from": "human", "value": "2 + 2"},
        {"from": "gpt", "value": "5", "train": False},
        {"from": "human", "value": "2 + 2"},
        {"from": "gpt", "value": "4", "weight": 0.5},
    ]
    assert to_conversation({"conversations": sharegpt}).weights == (0.0, 0.0, 0.0, 0.5)


ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}


@pytest.mark.parametrize(
    "calls",
    [
        [ADD],
        [ADD["function"]],
        [{**ADD, "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}],
        json.dumps([ADD]),
        json.dumps(ADD["function"]),
        [json.dumps(ADD)],
    ],
)
def test_calls_of_every_form_are_one_form(calls: Any) -> None:
    turn = {"role": "assistant", "content": None, "tool_calls": calls, "reasoning": None}
    rows = [
        {"messages": [TURNS[0], turn]},
        {"conversations": [TURNS[0], {"from": "function_call", "value": calls}]},
    ]
    for row in rows:
        expected = {"role": "assistant", "content": "", "tool_calls": [ADD]}
        assert to_conversation(row).messages[1] == expected


def test_a_tools_answer_keeps_what_it_answers() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", **ADD}]}
    answer = {"role": "tool", "content": "4", "name": "add", "tool_call_id": "c1"}
    row = {"messages": [TURNS[0], call, {**answer, "extra": 1}, {**TURNS[1], "name": "me"}]}
    assert list(to_conversation(row).messages) == [TURNS[0], call, answer, TURNS[1]]


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_are_given_as_functions(as_text: bool) -> None:
    wrapped = {"type": "function", "function": {"name": "add"}}
    tools: Any = [{"name": "add"}, wrapped, {"type": "web_search"}]
    row = {"messages": TURNS, "tools": json.dumps(tools) if as_text else tools}
    assert to_conversation(row).tools == (wrapped, wrapped, {"type": "web_search"})
    nothing: tuple[Any, ...] = (None, [], "", "[]", "null")
    for empty in nothing:
        assert to_conversation({"messages": TURNS, "tools": empty}).tools == ()


def test_a_system_prompt_is_added_where_there_is_none() -> None:
    added = to_conversation({"messages": TURNS}, system="Think.")
    assert added.messages[0] == {"role": "system", "content": "Think."}
    assert added.weights == (0.0, 0.0, 1.0)
    assert to_conversation({"messages": added.messages}, system="No.").messages == added.messages


def test_calculator_marks_go_and_other_brackets_stay() -> None:
    answer = "She has 48/2 = <<48/2=24>>24 and 3*$2=$<<3*2=6>>6. cout << x >> y;\ncin >> y\n#### 24"
    row = {"question": "How many?", "answer": answer}
    kept = "She has 48/2 = 24 and 3*$2=$6. cout << x >> y;\ncin >> y\n#### 24"
    assert to_conversation(row, strip_calculator_marks=True).messages[1]["content"] == kept
    assert to_conversation(row).messages[1]["content"] == answer


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x"}, r"expected a column 'messages'.*got the columns \['text'\]; name yours"),
        ({"messages": []}, r"messages: expected a list of turns, got list \[\]"),
        ({"messages": "hi"}, "messages: expected a list of turns, got str 'hi'"),
        ({"conversations": "hi"}, "messages: expected a list of turns, got str 'hi'"),
        ({"conversations": [{"from": 1, "value": "x"}]}, "message 1: role: expected text, got int"),
        ({"messages": ["hi"]}, "message 1: expected an object with role and content"),
        ({"messages": [{"content": "x"}]}, "message 1: role: expected text, got NoneType"),
        ({"messages": [{"role": "user"}]}, "message 1: content: expected text, got NoneType"),
        ({"messages": TURNS[:1]}, "has no assistant turn"),
        ({"messages": [TURNS[0], {**TURNS[1], "content": " \n"}]}, "message 2: .* is empty"),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": 0}]}, "every assistant turn has weight 0"),
        ({"messages": TURNS, "weight": -1}, "weight: expected a finite number of at least 0"),
        ({"messages": TURNS, "weight": float("nan")}, "weight: expected a finite number"),
        ({"messages": TURNS, "weight": "1"}, "weight: expected a number, got str '1'"),
        ({"messages": TURNS, "weight": True}, "weight: expected a number, got bool True"),
        ({"messages": TURNS, "train": "yes"}, "train: expected true or false, got str 'yes'"),
        (
            {"messages": [TURNS[0], {**TURNS[1], "train": "no"}]},
            "message 2: train: expected true or false, got str 'no'",
        ),
        (
            {"messages": [TURNS[0], {**TURNS[1], "train": False}]},
            "every assistant turn has weight 0, so",
        ),
        (
            {"messages": [{**TURNS[1], "tool_calls": [1]}]},
            "message 1: tool_calls: expected a list of objects, got int 1",
        ),
        (
            {"messages": [{**TURNS[1], "tool_calls": "{"}]},
            "message 1: tool_calls: expected JSON, got str '{': Expecting property name",
        ),
        (
            {"messages": [{**TURNS[1], "tool_calls": [{"id": "a"}]}]},
            "message 1: tool_calls: expected calls with the name of a function, got {'id': 'a'}",
        ),
        (
            {"messages": [{**TURNS[1], "tool_calls": [{"name": "a", "arguments": "[2]"}]}]},
            r"message 1: tool_calls: arguments: expected an object, got list \[2\]",
        ),
        (
            {"messages": [{**TURNS[1], "tool_calls": [{"name": "a", "arguments": {1, 2}}]}]},
            "message 1: tool_calls: expected JSON, got list .*not JSON serializable",
        ),
        (
            {"messages": [{**TURNS[0], "tool_calls": [{"name": "a"}]}]},
            "message 1: expected tool_calls in the assistant's messages only, got the role 'user'",
        ),
        (
            {"messages": [{**TURNS[1], "thinking": "a", "reasoning": "b"}]},
            "message 1: expected one of reasoning_content, reasoning, thinking, got several",
        ),
        (
            {"messages": [TURNS[0], {**TURNS[1], "content": "", "thinking": "a"}]},
            "message 2: the assistant's answer is empty",
        ),
        ({"messages": TURNS, "tools": ["add"]}, "tools: expected JSON, got str 'add'"),
        ({"messages": TURNS, "tools": [["add"]]}, "tools: expected a list of objects, got list"),
        (
            {"messages": [{**TURNS[1], "tool_calls": [{"name": "\ud800"}]}]},
            r"message 1: tool_calls: .*lone surrogate '\\ud800'",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "add(2, 2)"}]},
            r"message 1: tool_calls: expected JSON, got str 'add\(2, 2\)'",
        ),
        ({"prompt": "2 + 2", "completion": 4}, "completion: expected text, got int 4"),
        ({"prompt": "2 + 2", "completion": ""}, "message 2: the assistant's answer is empty"),
        ({"prompt": "\ud800", "completion": "4"}, r"prompt: character 0 .*surrogate '\\ud800'"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
def test_a_bad_row_says_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError, match=reason):
        to_conversation(row)


def test_a_missing_named_column_lists_what_there_is() -> None:
    with pytest.raises(
        BadRowError, match=r"columns 'q' and 'answer', got \['answer', 'question'\]"
    ):
        to_conversation(
            {"question": "2 + 2", "answer": "4"}, prompt_column="q", completion_column="answer"
        )


def test_a_long_value_is_shortened_in_the_message() -> None:
    with pytest.raises(BadRowError, match=r"got str 'x{56}\.\.\."):
        to_conversation({"messages": "x" * 1000})
