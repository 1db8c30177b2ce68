"""Best fit: no item is lost, no row is too long, and little is wasted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranktuner_jax.data.packing import Groups, best_fit, packing_order


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=80), st.randoms())
def test_every_item_is_in_one_row_and_no_row_is_overfull(
    lengths: list[int], random: object
) -> None:
    order = list(range(len(lengths)))
    random.shuffle(order)  # type: ignore[attr-defined]
    rows = best_fit(lengths, 50, order)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in row) <= 50 for row in rows)


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_each_item_goes_into_the_fullest_row_with_room(lengths: list[int]) -> None:
    expected = Groups.of([])
    for item, length in enumerate(lengths):  # the definition, row by row
        frees = [20 - sum(lengths[i] for i in row) for row in expected]
        fits = [free for free in frees if free >= length]
        if fits:
            candidates = [row for row, free in enumerate(frees) if free == min(fits)]
            got = best_fit(lengths[: item + 1], 20, range(item + 1))
            assert any(item in got[row] for row in candidates)
        expected = best_fit(lengths[: item + 1], 20, range(item + 1))


@pytest.mark.parametrize("capacity", [512, 1024, 2048])
def test_lengths_like_those_of_gsm8k_fill_rows_to_95_percent(capacity: int) -> None:
    # Question and answer of GSM8K with SmolLM2's tokenizer: from 77 to 492 tokens, median 170.
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(170), 0.33, 7473), 77, 492).astype(int).tolist()
    rows = best_fit(lengths, capacity, packing_order(lengths, seed=0))
    assert sum(lengths) / (capacity * len(rows)) >= 0.95


def test_the_order_is_longest_first_within_windows_of_a_shuffle() -> None:
    lengths = list(range(1000))
    order = packing_order(lengths, seed=0).tolist()
    assert sorted(order) == lengths
    assert order[:256] == sorted(order[:256], reverse=True)
    assert order[256] > order[255]
    assert order == packing_order(lengths, seed=0).tolist()
    assert order != packing_order(lengths, seed=1).tolist()
    assert 400 < np.mean(order[:256]) < 600


def test_an_item_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="item 1 has length 9, a row holds 8"):
        best_fit([3, 9], 8, range(2))
