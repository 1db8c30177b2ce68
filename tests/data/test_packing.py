"""Packing: no item is lost, no row is too long, and little is wasted."""

import itertools
import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranktuner_jax.data import packing
from ranktuner_jax.data.packing import (
    PACKERS,
    Groups,
    best_fit,
    fewest_rows,
    packing_order,
    subset_sum,
)
from ranktuner_jax.errors import UserError
from ranktuner_jax.train import read_config, to_dict
from ranktuner_jax.train.config import load_config
from ranktuner_jax.train.saving.workdir import claim_workdir


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
@given(
    st.integers(2, 50).flatmap(
        lambda capacity: st.tuples(
            st.just(capacity), st.lists(st.integers(1, capacity), max_size=80)
        )
    ),
    st.integers(0, 3),
)
def test_rows_filled_by_sums_hold_every_item_once_and_are_not_overfull(
    drawn: tuple[int, list[int]], seed: int
) -> None:
    capacity, lengths = drawn
    rows = [row.tolist() for row in subset_sum(lengths, capacity, seed)]
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in row) <= capacity for row in rows)
    assert rows == [row.tolist() for row in subset_sum(lengths, capacity, seed)]


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=9))
def test_the_longest_item_shares_its_row_with_those_that_fill_it_best(lengths: list[int]) -> None:
    left = sorted(lengths, reverse=True)
    plan = packing._fills(np.bincount(lengths, minlength=21).tolist(), 20, spare=0)
    for row in (row for row, times in plan for _ in range(times)):
        longest, *others = left
        best = max(
            sum(some)
            for number in range(len(others) + 1)
            for some in itertools.combinations(others, number)
            if longest + sum(some) <= 20
        )
        assert (row[0], sum(row)) == (longest, longest + best)
        for length in row:
            left.remove(length)
    assert not left


def test_what_fills_rows_worse_in_the_end_is_not_kept() -> None:
    # 7 + 5 + 4 fills a row, but then there are 7 + 6, 6 + 6, and 5 alone.
    lengths = [7, 7, 6, 6, 6, 5, 5, 4]
    fullest = list(packing._fills(np.bincount(lengths, minlength=17).tolist(), 16, spare=0))
    assert sum(times for _, times in fullest) == 4
    assert len(subset_sum(lengths, 16, 0)) == fewest_rows(lengths, 16) == 3


@pytest.mark.parametrize("capacity", [4097, 5000, 100_000])
def test_long_rows_are_as_full_within_their_4096ths(capacity: int) -> None:
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(1, capacity // 3, 3000), capacity, capacity]
    rows = subset_sum(lengths, capacity, seed=0)
    sums = [sum(lengths[item] for item in row) for row in rows]
    assert max(sums) == capacity
    assert sum(sums) / capacity / len(rows) > 0.99


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_no_packing_has_fewer_rows_than_the_bound(lengths: list[int]) -> None:
    optimum = min(len(best_fit(lengths, 12, order)) for order in _orders(len(lengths)))
    assert fewest_rows(lengths, 12) <= optimum
    if min(lengths) > 6:
        assert fewest_rows(lengths, 12) == len(lengths)


def _orders(count: int) -> list[tuple[int, ...]]:
    """In one of all orders best fit packs as well as can be."""
    return list(itertools.permutations(range(count)))


def test_the_bound_of_numbers_that_fit_exactly_is_their_number() -> None:
    assert fewest_rows([5, 4, 3, 5, 4, 3], 12) == 2
    assert fewest_rows([7, 7, 5, 5, 6, 6], 12) == 3
    assert fewest_rows([7, 7, 6, 6], 12) == 3  # Of 26 positions.
    assert fewest_rows([11, 11, 2, 2], 12) == 3


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


@pytest.mark.parametrize(("packer", "least"), [("best_fit", 0.95), ("subset_sum", 0.99)])
@pytest.mark.parametrize("capacity", [512, 1024, 2048])
def test_lengths_like_those_of_gsm8k_fill_rows(capacity: int, packer: str, least: float) -> None:
    # Question and answer of GSM8K with SmolLM2's tokenizer: from 77 to 492 tokens, median 170.
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(170), 0.33, 7473), 77, 492).astype(int)
    rows = PACKERS[packer](lengths, capacity, 0)
    assert lengths.sum() / (capacity * len(rows)) >= least
    assert fewest_rows(lengths, capacity) <= len(rows)


def test_rows_come_in_any_order_and_items_of_a_length_in_any_row() -> None:
    lengths = np.repeat([90, 50, 10], [100, 200, 100])
    rows = subset_sum(lengths, 100, seed=0)
    assert len(rows) == 200
    firsts = np.array([len(row) == 2 and lengths[row].max() == 90 for row in rows])
    assert 35 < firsts[:100].sum() < 65
    assert [row.tolist() for row in rows] != [row.tolist() for row in subset_sum(lengths, 100, 1)]
    pairs = [row.tolist() for row in rows if lengths[row].min() == 50]
    assert np.mean([abs(a - b) for a, b in pairs]) > 20


def test_a_run_begun_before_there_were_packers_goes_on_with_its_own(tmp_path: pathlib.Path) -> None:
    config = load_config("smollm2_chain_sum")
    saved = to_dict(config)
    assert saved["data"].pop("packer") == "subset_sum"
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert read_config(tmp_path).data.packer == "best_fit"
    with pytest.raises(UserError, match=r"another config \(data.packer: .*best_fit.*subset_sum"):
        claim_workdir(tmp_path, config)
    claim_workdir(tmp_path, load_config("smollm2_chain_sum", ["--config.data.packer=best_fit"]))


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
    with pytest.raises(ValueError, match="item 1 has length 9, a row holds 8"):
        subset_sum([3, 9], 8, 0)
