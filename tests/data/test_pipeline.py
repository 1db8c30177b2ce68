"""Rows hold every token once, and the order depends on the example's number alone."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ranktuner_jax.data import BatchIterator, DataConfig, Rows, load_examples, load_rows
from ranktuner_jax.errors import UserError

WriteJsonl = Callable[..., str]


def sums(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {"prompt": f"What is {a} + {b}?", "completion": f"It is {a + b}." * int(1 + a % 3), "id": i}
        for i, (a, b) in enumerate(rng.integers(0, 99, (count, 2)).tolist())
    ]


@pytest.fixture
def path(write_jsonl: WriteJsonl) -> str:
    return write_jsonl(*sums(40))


def samples(rows: Rows) -> list[tuple[Any, ...]]:
    """Every conversation of the rows: its inputs, labels, mask and weights, sorted."""
    found = []
    for i in range(len(rows)):
        row = rows[i]
        for segment in range(1, row["segment_ids"].max() + 1):
            here = row["segment_ids"] == segment
            keys = ("tokens", "labels", "mask", "token_weights", "positions")
            found.append(tuple(tuple(row[key][here].tolist()) for key in keys))
    return sorted(found)


def test_packed_and_padded_rows_hold_the_same_conversations(path: str, tokenizer: Any) -> None:
    packed = load_rows(DataConfig(path, row_length=256), tokenizer)
    padded = load_rows(DataConfig(path, row_length=256, packing=False), tokenizer)
    assert samples(packed) == samples(padded)
    assert len(samples(packed)) == len(padded) == 40
    assert len(packed) < 20


def test_a_row_is_laid_out_as_documented(path: str, tokenizer: Any) -> None:
    rows = load_rows(DataConfig(path, row_length=256), tokenizer)
    for i in range(len(rows)):
        row = rows[i]
        segments = row["segment_ids"]
        assert {key: value.dtype.name for key, value in row.items()} == {
            "tokens": "int32",
            "labels": "int32",
            "mask": "bool",
            "positions": "int32",
            "segment_ids": "int32",
            "token_weights": "float32",
            "row_index": "int32",
        }
        assert row["row_index"] == i
        # Segments 1, 2, ... from the left, then padding.
        used = segments[segments > 0]
        assert np.array_equal(segments[: len(used)], used)
        assert set(np.diff(used)) <= {0, 1}
        for segment in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == segment)
            assert np.array_equal(row["positions"][here], np.arange(len(here)))
            assert np.array_equal(row["labels"][here[:-1]], row["tokens"][here[1:]])
            # The last label ends the turn; it is no input.
            assert row["labels"][here[-1]] == tokenizer.eos_token_id
            assert row["mask"][here[-1]]
        padding = segments == 0
        for key in ("tokens", "labels", "mask", "positions", "token_weights"):
            assert not row[key][padding].any()
        assert np.array_equal(row["token_weights"] > 0, row["mask"])


def test_the_row_minus_1_is_padding(path: str, tokenizer: Any) -> None:
    rows = load_rows(DataConfig(path, row_length=256), tokenizer)
    batch = rows.take([1, -1])
    assert not any(batch[key][1].any() for key in batch if key != "row_index")
    assert np.array_equal(batch["tokens"][0], rows[1]["tokens"])


def test_a_row_beyond_the_end_is_an_error(path: str, tokenizer: Any) -> None:
    rows = load_rows(DataConfig(path, row_length=256), tokenizer)
    with pytest.raises(IndexError, match=f"row {len(rows)} of {len(rows)}"):
        rows[len(rows)]


def test_weights_reach_their_labels(write_jsonl: WriteJsonl, tokenizer: Any) -> None:
    row = {"prompt": "2 + 2", "completion": "4", "weight": 0.25}
    rows = load_rows(DataConfig(write_jsonl(row), row_length=64), tokenizer)
    assert rows[0]["token_weights"].sum() == 0.25 * rows[0]["mask"].sum() > 0


def test_the_summary_counts_what_is_there(path: str, tokenizer: Any) -> None:
    rows = load_rows(DataConfig(path, row_length=256), tokenizer)
    batch = rows.take(range(len(rows)))
    summary = rows.summary
    assert summary.read == summary.kept == 40
    assert summary.rows == len(rows)
    assert summary.tokens == (batch["segment_ids"] > 0).sum() == summary.lengths.sum()
    assert summary.supervised == batch["mask"].sum()
    assert summary.fill == summary.tokens / (len(rows) * 256)
    assert str(summary).startswith(f"40 conversations, {len(rows)} rows of 256 (")


def test_the_same_seed_packs_the_same_rows(path: str, tokenizer: Any) -> None:
    config = DataConfig(path, row_length=256)
    first, again, other = (load_rows(config, tokenizer, seed=seed) for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert samples(first) == samples(other)


def test_gsm8k_fills_its_rows(tokenizer: Any) -> None:
    path = pathlib.Path(__file__).parents[3] / "shared/data/gsm8k_train.jsonl"
    if not path.is_file():
        pytest.skip(f"{path}, which is not part of this project, is not here")
    config = DataConfig(str(path), "train[:2000]", strip_calculator_marks=True, row_length=2048)
    rows = load_rows(config, tokenizer)
    assert rows.summary.fill >= 0.95
    assert not any("<<" in tokenizer.decode(rows[i]["tokens"]) for i in range(5))


# --- order ---


def indices(rows: Rows, steps: int, processes: int, **options: Any) -> list[list[int]]:
    """Row indices of each global batch, gathered from all processes."""
    iterators = [
        BatchIterator(rows, process_index=p, process_count=processes, **options)
        for p in range(processes)
    ]
    return [
        [int(i) for iterator in iterators for i in next(iterator)["row_index"]]
        for _ in range(steps)
    ]


@pytest.fixture
def rows(path: str, tokenizer: Any) -> Rows:
    return load_rows(DataConfig(path, row_length=256, packing=False), tokenizer)


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(
    rows: Rows, processes: int
) -> None:
    expected = indices(rows, 12, 1, batch_size=8)
    assert indices(rows, 12, processes, batch_size=8) == expected


def test_every_epoch_sees_every_row_once_in_an_order_of_its_own(rows: Rows) -> None:
    seen = [i for batch in indices(rows, 10, 1, batch_size=8, seed=3) for i in batch]
    assert sorted(seen[:40]) == sorted(seen[40:]) == list(range(40))
    assert seen[:40] != seen[40:]
    assert indices(rows, 10, 1, batch_size=8, seed=4) != indices(rows, 10, 1, batch_size=8, seed=3)


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 8)])
def test_a_run_goes_on_at_the_same_example_with_another_number_of_processes(
    rows: Rows, before: int, after: int
) -> None:
    unbroken = indices(rows, 12, 1, batch_size=8, seed=5)
    iterators = [
        BatchIterator(rows, batch_size=8, seed=5, process_index=p, process_count=before)
        for p in range(before)
    ]
    for iterator in iterators:
        for _ in range(7):  # into the second epoch
            next(iterator)
    states = [json.loads(json.dumps(iterator.state())) for iterator in iterators]
    assert all(state == states[0] for state in states)
    assert states[0]["next_row"] == 56
    resumed = [
        BatchIterator.from_state(
            rows, states[0], batch_size=8, seed=5, process_index=p, process_count=after
        )
        for p in range(after)
    ]
    gathered = [
        [int(i) for iterator in resumed for i in next(iterator)["row_index"]] for _ in range(5)
    ]
    assert gathered == unbroken[7:]
    assert resumed[0].epoch == 96 / 40


def test_another_batch_size_goes_on_at_the_same_example(rows: Rows) -> None:
    iterator = BatchIterator(rows, batch_size=8)
    next(iterator)
    resumed = BatchIterator.from_state(rows, iterator.state(), batch_size=4)
    expected = indices(rows, 2, 1, batch_size=8)[1]
    assert [*next(resumed)["row_index"], *next(resumed)["row_index"]] == expected


def test_a_position_in_other_rows_is_refused(rows: Rows, path: str, tokenizer: Any) -> None:
    state = BatchIterator(rows, batch_size=8).state()
    other = load_rows(DataConfig(path, row_length=256), tokenizer)
    for wrong, seed in ((other, 0), (rows, 1)):
        with pytest.raises(UserError, match="the checkpoint's position belongs to other rows"):
            BatchIterator.from_state(wrong, state, batch_size=8, seed=seed)


def test_a_batch_that_does_not_divide_is_the_users_mistake(rows: Rows) -> None:
    with pytest.raises(UserError, match="expected a multiple of the 3 processes, got 8"):
        BatchIterator(rows, batch_size=8, process_count=3)


# --- mixtures ---


def test_a_mixture_takes_rows_by_weight_and_repeats_the_smaller_source(
    write_jsonl: WriteJsonl, tokenizer: Any
) -> None:
    small = write_jsonl(*sums(10), name="small.jsonl")
    large = write_jsonl(*sums(200, seed=1), name="large.jsonl")
    config = DataConfig(mixture=((small, 3.0), (large, 1.0)), row_length=256, packing=False)
    rows = load_rows(config, tokenizer)
    assert len(rows) == 210
    seen = np.array(indices(rows, 50, 1, batch_size=8)).ravel()
    assert (seen < 10).sum() == 300
    assert len(set(seen[seen >= 10])) == 100
    assert np.ptp(np.bincount(seen[seen < 10])) == 0
    assert indices(rows, 50, 4, batch_size=8) == indices(rows, 50, 1, batch_size=8)


def test_examples_of_a_mixture_come_by_weight(write_jsonl: WriteJsonl, tokenizer: Any) -> None:
    small = write_jsonl(*sums(10), name="small.jsonl")
    large = write_jsonl(*sums(200, seed=1), name="large.jsonl")
    config = DataConfig(mixture=((small, 1.0), (large, 3.0)))
    examples = load_examples(config, tokenizer, split="train", limit=20)
    assert [example.row["id"] for example in examples] == [*range(5), *range(15)]
    assert [example.index for example in examples] == list(range(20))


# --- examples ---


def test_an_example_is_a_prompt_and_its_reference(path: str, tokenizer: Any) -> None:
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
    write_jsonl: WriteJsonl, tokenizer: Any, line: str, reason: str
) -> None:
    path = write_jsonl(*sums(3), line)
    with pytest.raises(UserError) as error:
        load_rows(DataConfig(path, row_length=256), tokenizer)
    assert str(error.value).startswith(f"{path}:4: ")
    assert reason in str(error.value)
    assert str(error.value).endswith("mend the row, or set data.on_bad_row=skip")
    assert "\n" not in str(error.value)


def test_skipped_rows_are_counted_and_reported(write_jsonl: WriteJsonl, tokenizer: Any) -> None:
    path = write_jsonl(*sums(3), *(line for line, _ in BAD), BAD[1][0])
    rows = load_rows(DataConfig(path, row_length=256, on_bad_row="skip"), tokenizer)
    summary = rows.summary
    assert (summary.read, summary.kept, summary.bad.total()) == (10, 3, 7)
    assert summary.bad["message 2: the assistant's answer is empty"] == 2
    assert f"7 bad and skipped, the first: {path}:4: broken JSON" in str(summary)


@pytest.fixture
def long_row(write_jsonl: WriteJsonl) -> str:
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
    assert (row["segment_ids"] == 1).all()
    assert row["mask"][-1]
    assert tokenizer.eos_token_id not in row["labels"][row["mask"]]


def test_ten_megabytes_in_one_row_are_one_long_conversation(
    write_jsonl: WriteJsonl, tokenizer: Any
) -> None:
    path = write_jsonl(*sums(3), {"prompt": "Copy.", "completion": "what " * 2_000_000})
    with pytest.raises(UserError, match=f"{path}:4: the conversation takes"):
        load_rows(DataConfig(path, row_length=256), tokenizer)


def test_a_source_with_nothing_to_learn_is_the_users_mistake(
    write_jsonl: WriteJsonl, tokenizer: Any
) -> None:
    with pytest.raises(UserError, match=r"nothing to learn from in .*: 0 conversations"):
        load_rows(DataConfig(write_jsonl()), tokenizer)
    path = write_jsonl(BAD[0][0])
    with pytest.raises(UserError, match=r"nothing to learn from in .* 1 bad and skipped"):
        load_rows(DataConfig(path, on_bad_row="skip"), tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_bad_row": "ignore"}, "data.on_bad_row: expected one of error, skip, got 'ignore'"),
        ({"too_long": "cut"}, "data.too_long: expected one of error, truncate, drop, got 'cut'"),
        ({"row_length": 1}, "data.row_length: expected at least 2, got 1"),
        ({"prompt_column": "q"}, "expected both or neither, got 'q' and ''"),
        (
            {"mixture": (("a", 0.0),)},
            r"expected pairs \(source, weight above 0\), got \('a', 0.0\)",
        ),
    ],
    ids=["on_bad_row", "too_long", "row_length", "columns", "mixture"],
)
def test_a_value_that_is_not_allowed_is_the_users_mistake(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        DataConfig(**options)


def test_a_mixture_that_was_saved_as_json_is_the_same() -> None:
    config = DataConfig(mixture=(("a", 1.0), ("b", 2.0)))
    assert DataConfig(mixture=json.loads(json.dumps(config.mixture))) == config
