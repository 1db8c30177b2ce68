"""The order depends on the example's number alone, and a saved position resumes it."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ranktuner_jax.data import BatchIterator, DataConfig, Rows, load_rows
from ranktuner_jax.errors import UserError

WriteJsonl = Callable[..., str]
Sums = Callable[..., list[dict[str, Any]]]


def indices(rows: Rows, steps: int, processes: int, **options: Any) -> list[list[int]]:
    """Row indices of each global batch, gathered from all processes."""
    iterators = [
        BatchIterator(rows, process_index=p, process_count=processes, **options)
        for p in range(processes)
    ]
    return [
        [int(i) for iterator in iterators for i in next(iterator).row_index] for _ in range(steps)
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
def test_a_run_resumes_at_the_same_example_with_another_number_of_processes(
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
    states = [json.loads(json.dumps(iterator.get_state())) for iterator in iterators]
    assert all(state == states[0] for state in states)
    assert states[0]["next_row"] == 56
    resumed = [
        BatchIterator(rows, batch_size=8, seed=5, process_index=p, process_count=after)
        for p in range(after)
    ]
    for iterator in resumed:
        iterator.set_state(states[0])
    gathered = [
        [int(i) for iterator in resumed for i in next(iterator).row_index] for _ in range(5)
    ]
    assert gathered == unbroken[7:]
    assert resumed[0].epoch == 96 / 40


def test_another_batch_size_resumes_at_the_same_example(rows: Rows) -> None:
    iterator = BatchIterator(rows, batch_size=8)
    next(iterator)
    resumed = BatchIterator(rows, batch_size=4)
    resumed.set_state(iterator.get_state())
    expected = indices(rows, 2, 1, batch_size=8)[1]
    assert [*next(resumed).row_index, *next(resumed).row_index] == expected


def test_a_position_in_other_rows_is_refused(rows: Rows, path: str, tokenizer: Any) -> None:
    state = BatchIterator(rows, batch_size=8).get_state()
    other = load_rows(DataConfig(path, row_length=256), tokenizer)
    for wrong, seed in ((other, 0), (rows, 1)):
        iterator = BatchIterator(wrong, batch_size=8, seed=seed)
        with pytest.raises(UserError, match="the checkpoint's position belongs to other rows"):
            iterator.set_state(state)
        assert iterator.epoch == 0


def test_a_batch_that_does_not_divide_is_the_users_mistake(rows: Rows) -> None:
    with pytest.raises(UserError, match="expected a multiple of the 3 processes, got 8"):
        BatchIterator(rows, batch_size=8, process_count=3)


def test_a_mixture_takes_rows_by_weight_and_repeats_the_smaller_source(
    write_jsonl: WriteJsonl, tokenizer: Any, sums: Sums
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
