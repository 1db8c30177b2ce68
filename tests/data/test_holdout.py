"""Which conversations are held out, and how many."""

from collections.abc import Callable
from typing import Any

import pytest

from ranktuner_jax.data import HOLDOUT, DataConfig, load_examples, load_rows
from ranktuner_jax.errors import UserError

WriteJsonl = Callable[..., str]


def sums(count: int, answers: int = 1) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{i} + 1", "completion": f"{i + 1}" + "." * a, "answer": str(i + 1)}
        for i in range(count)
        for a in range(answers)
    ]


def texts(source: str, tokenizer: Any, split: str, **options: Any) -> list[str]:
    """All conversations of one side."""
    config = DataConfig(source, row_length=128, packing=False, **options)
    rows = load_rows(config, tokenizer, split=split)
    return [
        tokenizer.decode([*row.tokens, row.labels[-1]])
        for row in map(rows.__getitem__, range(len(rows)))
    ]


@pytest.mark.parametrize(
    ("holdout", "held_out"), [(0.1, 10), (0.5, 50), (0.001, 1), (3.0, 3), (1.0, 1)]
)
def test_both_sides_are_the_whole_and_nothing_is_on_both(
    holdout: float, held_out: int, write_jsonl: WriteJsonl, tokenizer: Any
) -> None:
    source = write_jsonl(*sums(100))
    train, test = (texts(source, tokenizer, split, holdout=holdout) for split in ("train", HOLDOUT))
    assert len(test) == held_out
    assert not set(train) & set(test)
    assert sorted(train + test) == sorted(texts(source, tokenizer, "train"))


def test_all_answers_to_a_question_are_on_one_side(write_jsonl: WriteJsonl, tokenizer: Any) -> None:
    config = DataConfig(write_jsonl(*sums(30, answers=3)), row_length=128, holdout=0.2)
    held_out = load_examples(config, tokenizer, split=HOLDOUT)
    questions = [example.messages[0]["content"] for example in held_out]
    assert len(questions) == 18
    assert all(questions.count(question) == 3 for question in questions)


def test_neither_the_order_of_the_rows_nor_other_rows_move_a_conversation(
    write_jsonl: WriteJsonl, tokenizer: Any
) -> None:
    rows = sums(100)
    before = set(texts(write_jsonl(*rows), tokenizer, HOLDOUT, holdout=0.2))
    reversed_ = set(texts(write_jsonl(*rows[::-1]), tokenizer, HOLDOUT, holdout=0.2))
    more = set(texts(write_jsonl(*sums(105)), tokenizer, HOLDOUT, holdout=0.2))
    assert before == reversed_
    assert len(before - more) <= 2


def test_where_all_share_one_prompt_conversations_are_held_out(
    write_jsonl: WriteJsonl, tokenizer: Any
) -> None:
    source = write_jsonl(*({"prompt": "Go on.", "completion": f"{i}"} for i in range(40)))
    config = DataConfig(source, row_length=128, holdout=0.1)
    assert load_rows(config, tokenizer).summary.held_out == 4
    assert load_rows(config, tokenizer, split=HOLDOUT).summary.kept == 4


def test_the_summary_counts_each_side(write_jsonl: WriteJsonl, tokenizer: Any) -> None:
    config = DataConfig(write_jsonl(*sums(40)), row_length=128, holdout=0.1)
    assert str(load_rows(config, tokenizer).summary).startswith("36 conversations and 4 held out, ")
    assert str(load_rows(config, tokenizer, split=HOLDOUT).summary).startswith("4 conversations, ")


@pytest.mark.parametrize("holdout", [-0.1, 1.5, float("nan")])
def test_an_invalid_size_is_the_users_mistake(holdout: float) -> None:
    with pytest.raises(UserError, match=r"data\.holdout: expected a share below 1, or a whole"):
        DataConfig(holdout=holdout)


def test_without_a_holdout_there_is_no_such_split(write_jsonl: WriteJsonl, tokenizer: Any) -> None:
    config = DataConfig(write_jsonl(*sums(4)), row_length=128)
    with pytest.raises(UserError, match=r"expected data\.holdout above 0 for the split 'holdout'"):
        load_rows(config, tokenizer, split=HOLDOUT)


def test_one_conversation_leaves_nothing_to_train_on(
    write_jsonl: WriteJsonl, tokenizer: Any
) -> None:
    config = DataConfig(write_jsonl(*sums(1)), row_length=128, holdout=0.1)
    with pytest.raises(
        UserError,
        match=r"nothing to learn from .*: 0 conversations and 1 held out.*lower data\.holdout",
    ):
        load_rows(config, tokenizer)


def test_rows_are_packed_only_as_long_as_they_fill_a_batch(
    write_jsonl: WriteJsonl, tokenizer: Any
) -> None:
    config = DataConfig(write_jsonl(*sums(12)), row_length=128)
    packed = load_rows(config, tokenizer)
    assert 1 < len(packed) < 12
    assert load_rows(config, tokenizer, min_rows=len(packed)).fingerprint == packed.fingerprint
    alone = load_rows(config, tokenizer, min_rows=len(packed) + 1)
    assert len(alone) == 12
    assert "not packed" in str(alone.summary)
    assert [int(alone[i].segment_ids.max()) for i in range(12)] == [1] * 12
