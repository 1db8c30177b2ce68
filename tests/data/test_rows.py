"""Rows hold every token once, laid out as `Batch` documents."""

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ranktuner_jax.data import DataConfig, Rows, load_rows

WriteJsonl = Callable[..., str]


def samples(rows: Rows) -> list[tuple[Any, ...]]:
    """Every conversation of the rows: its inputs, labels, mask and weights, sorted."""
    found = []
    for i in range(len(rows)):
        row = rows[i]
        for segment in range(1, row.segment_ids.max() + 1):
            here = row.segment_ids == segment
            names = ("tokens", "labels", "mask", "token_weights", "positions")
            found.append(tuple(tuple(getattr(row, name)[here].tolist()) for name in names))
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
        segments = row.segment_ids
        assert {name: array.dtype.name for name, array in vars(row).items()} == {
            "tokens": "int32",
            "labels": "int32",
            "mask": "bool",
            "positions": "int32",
            "segment_ids": "int32",
            "token_weights": "float32",
            "row_index": "int32",
        }
        assert row.row_index == i
        # Segments 1, 2, ... from the left, then padding.
        used = segments[segments > 0]
        assert np.array_equal(segments[: len(used)], used)
        assert set(np.diff(used)) <= {0, 1}
        for segment in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == segment)
            assert np.array_equal(row.positions[here], np.arange(len(here)))
            assert np.array_equal(row.labels[here[:-1]], row.tokens[here[1:]])
            # The last label ends the turn; it is no input.
            assert row.labels[here[-1]] == tokenizer.eos_token_id
            assert row.mask[here[-1]]
        padding = segments == 0
        for name in ("tokens", "labels", "mask", "positions", "token_weights"):
            assert not getattr(row, name)[padding].any()
        assert np.array_equal(row.token_weights > 0, row.mask)


def test_the_row_minus_1_is_padding(path: str, tokenizer: Any) -> None:
    rows = load_rows(DataConfig(path, row_length=256), tokenizer)
    batch = rows.take([1, -1])
    assert not any(array[1].any() for name, array in vars(batch).items() if name != "row_index")
    assert np.array_equal(batch.tokens[0], rows[1].tokens)


def test_a_row_beyond_the_end_is_an_error(path: str, tokenizer: Any) -> None:
    rows = load_rows(DataConfig(path, row_length=256), tokenizer)
    with pytest.raises(IndexError, match=f"row {len(rows)} of {len(rows)}"):
        rows[len(rows)]


def test_weights_reach_their_labels(write_jsonl: WriteJsonl, tokenizer: Any) -> None:
    row = {"prompt": "2 + 2", "completion": "4", "weight": 0.25}
    rows = load_rows(DataConfig(write_jsonl(row), row_length=64), tokenizer)
    assert rows[0].token_weights.sum() == 0.25 * rows[0].mask.sum() > 0


def test_the_summary_counts_what_is_there(path: str, tokenizer: Any) -> None:
    rows = load_rows(DataConfig(path, row_length=256), tokenizer)
    batch = rows.take(range(len(rows)))
    summary = rows.summary
    assert summary.read == summary.kept == 40
    assert summary.rows == len(rows)
    assert summary.tokens == (batch.segment_ids > 0).sum() == summary.lengths.sum()
    assert summary.supervised == batch.mask.sum()
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
    assert not any("<<" in tokenizer.decode(rows[i].tokens) for i in range(5))
