"""Examples to grade, and rows that are bad or too long."""

from collections.abc import Callable
from typing import Any

import pytest

from ranktuner_jax.data import DataConfig, load_examples, load_rows
from ranktuner_jax.errors import UserError

WriteJsonl = Callable[..., str]
Sums = Callable[..., list[dict[str, Any]]]


def test_an_example_is_a_prompt_and_its_reference(path: str, tokenizer: Any, sums: Sums) -> None:
    examples = load_examples(DataConfig(path, system="Add."), tokenizer, split="train", limit=3)
    assert [example.index for example in examples] == [0, 1, 2]
    example = examples[1]
    assert example.row == sums(40)[1]
    assert example.messages[-1]["content"] == example.row["completion"]
    prompt = tokenizer.apply_chat_template(list(example.messages[:-1]), add_generation_prompt=True)[
        "input_ids"
    ]
    assert list(example.prompt_tokens) == prompt
    completion = tokenizer.decode(example.completion_tokens)
    assert completion == example.row["completion"] + tokenizer.eos_token


def test_without_a_limit_all_examples_are_read(path: str, tokenizer: Any) -> None:
    assert len(load_examples(DataConfig(path), tokenizer, split="train")) == 40


def test_a_split_without_examples_is_the_users_mistake(path: str, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"split train\[:0\] of .* is empty"):
        load_examples(DataConfig(path), tokenizer, split="train[:0]")


def test_examples_of_a_mixture_come_by_weight(
    write_jsonl: WriteJsonl, tokenizer: Any, sums: Sums
) -> None:
    small = write_jsonl(*sums(10), name="small.jsonl")
    large = write_jsonl(*sums(200, seed=1), name="large.jsonl")
    config = DataConfig(mixture=((small, 1.0), (large, 3.0)))
    examples = load_examples(config, tokenizer, split="train", limit=20)
    assert [example.row["id"] for example in examples] == [*range(5), *range(15)]
    assert [example.index for example in examples] == list(range(20))


# --- bad rows and long ones ---

BAD = [
    ('{"prompt": ', "broken JSON"),
    ('{"prompt": "2", "completion": ""}', "the assistant's answer is empty"),
    ('{"messages": [{"role": "user", "content": "2"}]}', "no assistant turn"),
    ('{"prompt": 2, "completion": "4"}', "prompt: expected text, got int 2"),
    ('{"prompt": "\\ud800", "completion": "4"}', "lone surrogate"),
    ('{"prompt": "<|im_end|>", "completion": "4"}', "special token"),
]


@pytest.mark.parametrize(("line", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_bad_row_names_file_and_line(
    write_jsonl: WriteJsonl, tokenizer: Any, line: str, reason: str, sums: Sums
) -> None:
    path = write_jsonl(*sums(3), line)
    with pytest.raises(UserError) as error:
        load_rows(DataConfig(path, row_length=256), tokenizer)
    assert str(error.value).startswith(f"{path}:4: ")
    assert reason in str(error.value)
    assert str(error.value).endswith("fix the row, or set data.on_bad_row=skip")
    assert "\n" not in str(error.value)


def test_skipped_rows_are_counted_and_reported(
    write_jsonl: WriteJsonl, tokenizer: Any, sums: Sums
) -> None:
    path = write_jsonl(*sums(3), *(line for line, _ in BAD), BAD[1][0])
    rows = load_rows(DataConfig(path, row_length=256, on_bad_row="skip"), tokenizer)
    summary = rows.summary
    assert (summary.read, summary.kept, summary.bad.total()) == (10, 3, 7)
    assert summary.bad["message 2: the assistant's answer is empty"] == 2
    assert f"7 bad and skipped, the first: {path}:4: broken JSON" in str(summary)


@pytest.fixture
def long_row(write_jsonl: WriteJsonl, sums: Sums) -> str:
    long_prompt = {"prompt": "1 + " * 400, "completion": "400"}
    long_answer = {"prompt": "Count.", "completion": "1, 2, " * 200}
    return write_jsonl(*sums(3), long_prompt, long_answer)


def test_a_conversation_longer_than_a_row_names_file_and_line(
    long_row: str, tokenizer: Any
) -> None:
    with pytest.raises(
        UserError, match=rf"{long_row}:4: the conversation takes [\d,]+ tokens, a row"
    ):
        load_rows(DataConfig(long_row, row_length=256), tokenizer)


def test_too_long_conversations_are_dropped_and_counted(long_row: str, tokenizer: Any) -> None:
    rows = load_rows(DataConfig(long_row, row_length=256, too_long="drop"), tokenizer)
    assert (rows.summary.kept, rows.summary.dropped, rows.summary.truncated) == (3, 2, 0)
    assert "2 too long and dropped" in str(rows.summary)


def test_too_long_conversations_are_truncated_and_counted(long_row: str, tokenizer: Any) -> None:
    config = DataConfig(long_row, row_length=256, too_long="truncate", packing=False)
    rows = load_rows(config, tokenizer)
    # Of the long prompt nothing would be left to learn.
    assert (rows.summary.kept, rows.summary.dropped, rows.summary.truncated) == (4, 1, 1)
    assert "1 truncated" in str(rows.summary)
    row = rows[3]
    assert (row.segment_ids == 1).all()
    assert row.mask[-1]
    assert tokenizer.eos_token_id not in row.labels[row.mask]


def test_ten_megabytes_in_one_row_are_one_long_conversation(
    write_jsonl: WriteJsonl, tokenizer: Any, sums: Sums
) -> None:
    path = write_jsonl(*sums(3), {"prompt": "Copy.", "completion": "what " * 2_000_000})
    with pytest.raises(UserError, match=f"{path}:4: the conversation takes"):
        load_rows(DataConfig(path, row_length=256), tokenizer)


class Recorder:
    """A tokenizer's backend that keeps the texts it is given."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.longest = 0

    def encode_batch(self, texts: list[str], **options: Any) -> Any:
        self.longest = max([self.longest, *map(len, texts)])
        return self.backend.encode_batch(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)


@pytest.mark.parametrize("too_long", ["error", "drop", "truncate"])
def test_a_row_that_cannot_fit_is_not_tokenized_to_find_out(
    write_jsonl: WriteJsonl,
    make_tokenizer: Callable[..., Any],
    templates: dict[str, str],
    sums: Sums,
    too_long: str,
) -> None:
    tokenizer = make_tokenizer("smollm2", templates["smollm2"])
    tokenizer._tokenizer = recorder = Recorder(tokenizer._tokenizer)
    huge = {"prompt": "Copy.", "completion": "what " * 20_000}
    huge_prompt = {"prompt": "what " * 20_000, "completion": "Copied."}
    path = write_jsonl(*sums(3), huge, huge_prompt, *sums(1))
    config = DataConfig(path, row_length=256, too_long=too_long)
    if too_long == "error":
        with pytest.raises(
            UserError, match=r":4: .* takes at least [\d,]+ tokens, a row holds 256"
        ):
            load_rows(config, tokenizer)
        assert recorder.longest < 1000
        return
    summary = load_rows(config, tokenizer).summary
    if too_long == "drop":
        assert (summary.kept, summary.dropped, summary.truncated) == (4, 2, 0)
        assert recorder.longest < 1000
    else:  # What is kept of it has to be tokenized.
        assert (summary.kept, summary.dropped, summary.truncated) == (5, 1, 1)


def test_a_source_with_nothing_to_learn_is_the_users_mistake(
    write_jsonl: WriteJsonl, tokenizer: Any
) -> None:
    with pytest.raises(UserError, match=r"nothing to learn from in .*: 0 conversations"):
        load_rows(DataConfig(write_jsonl()), tokenizer)
    path = write_jsonl(BAD[0][0])
    with pytest.raises(UserError, match=r"nothing to learn from in .* 1 bad and skipped"):
        load_rows(DataConfig(path, on_bad_row="skip"), tokenizer)
