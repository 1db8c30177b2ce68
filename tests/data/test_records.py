"""Rows of every form become conversations, or are refused with a reason."""

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
        ({"messages": [{**TURNS[1], "tool_calls": [1]}]}, "'tool_calls' is not supported"),
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
