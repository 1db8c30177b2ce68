"""Rows of a few widths: as little padding as may be, and otherwise what one width does."""

import collections
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from ranktuner_jax import losses, models
from ranktuner_jax.data import (
    Batch,
    BatchIterator,
    DataConfig,
    Rows,
    Summary,
    TokenizedChat,
    load_rows,
)
from ranktuner_jax.data.widths import choose_widths
from ranktuner_jax.errors import UserError
from ranktuner_jax.train import MeshConfig, Trainer, make_mesh
from ranktuner_jax.train.step.program import StepProgram
from tests.tolerances import SAME_RUN_LOSS, SAME_RUN_PARAM

WriteJsonl = Callable[..., str]
Sums = Callable[..., list[dict[str, Any]]]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=60),
    st.integers(40, 50),
    st.integers(1, 3),
    st.integers(1, 8),
)
def test_no_other_widths_leave_less_padding(
    lengths: list[int], row_length: int, count: int, least: int
) -> None:
    shares = np.random.default_rng(0).random(len(lengths))
    chosen = choose_widths(np.array(lengths), shares, row_length, count=count, least=least)
    sixteenths = sorted({-(-row_length * part // 16) for part in range(1, 17)})

    def padded(widths: tuple[int, ...]) -> float:
        """Positions by the definition, row by row; infinite if the widths are not allowed."""
        mine = [next((w for w in widths if w >= length), None) for length in lengths]
        if None in mine or (len(widths) > 1 and min(map(mine.count, widths)) < least):
            return np.inf
        return sum(share * width for share, width in zip(shares, mine, strict=True) if width)

    every = itertools.chain.from_iterable(
        itertools.combinations(sixteenths, number) for number in range(1, count + 1)
    )
    assert set(chosen) <= set(sixteenths)
    assert padded(chosen) == pytest.approx(min(map(padded, every)))


@pytest.fixture
def path(write_jsonl: WriteJsonl) -> str:
    """40 rows, some of which are ten times as long as others."""
    rng = np.random.default_rng(0)
    answers = ["It is 4. " * number for number in rng.geometric(0.15, 40)]
    return write_jsonl(*({"prompt": "2 + 2?", "completion": answer} for answer in answers))


CONFIG = DataConfig("", row_length=256, packing=False, widths=3)


@pytest.fixture
def rows(path: str, tokenizer: Any) -> Rows:
    return load_rows(dataclasses.replace(CONFIG, source=path), tokenizer, min_rows=8)


def test_the_rows_of_a_batch_have_one_width_in_every_process(rows: Rows) -> None:
    assert len(rows.widths) == 3
    assert min(rows.widths.values()) >= 8
    iterators = [
        BatchIterator(rows, batch_size=8, seed=3, process_index=p, process_count=4)
        for p in range(4)
    ]
    seen: collections.Counter[int] = collections.Counter()
    drawn: collections.Counter[int] = collections.Counter()
    for _ in range(50):
        batches = [next(iterator) for iterator in iterators]
        [width] = {batch.tokens.shape[1] for batch in batches}
        drawn[width] += 8
        for batch in batches:
            for b, index in enumerate(batch.row_index.tolist()):
                seen[index] += 1
                full = rows[index]
                assert width == min(w for w in rows.widths if w >= (full.segment_ids > 0).sum())
                for name in ("tokens", "labels", "mask", "positions", "segment_ids"):
                    whole = getattr(full, name)
                    assert np.array_equal(getattr(batch, name)[b], whole[:width])
                    assert not whole[width:].any()
    # 400 rows are 10 passes; each width takes turns as often as its rows are drawn.
    assert set(seen) == set(range(40))
    assert 9 <= min(seen.values()) <= max(seen.values()) <= 11
    assert all(abs(drawn[width] - 10 * count) <= 8 for width, count in rows.widths.items())


def test_a_position_resumes_among_widths_with_the_same_batch_size_only(rows: Rows) -> None:
    iterator = BatchIterator(rows, batch_size=8, seed=5)
    for _ in range(11):
        next(iterator)
    state = iterator.get_state()
    resumed = BatchIterator(rows, batch_size=8, seed=5)
    resumed.set_state(state)
    for _ in range(12):
        one, other = next(iterator), next(resumed)
        assert all(np.array_equal(vars(one)[name], vars(other)[name]) for name in vars(one))
    with pytest.raises(UserError, match="or widths and batch size differ"):
        BatchIterator(rows, batch_size=4, seed=5).set_state(state)


def test_the_summary_says_the_widths_and_what_they_save(
    rows: Rows, path: str, tokenizer: Any
) -> None:
    one = load_rows(dataclasses.replace(CONFIG, source=path, widths=1), tokenizer)
    positions = sum(next(w for w in rows.widths if w >= length) for length in rows.lengths)
    assert rows.summary.fill == rows.lengths.sum() / positions > one.summary.fill
    widths = " / ".join(map(str, rows.widths))
    saved = f"40 rows of {widths} ({rows.summary.fill:.1%} filled, {one.summary.fill:.1%} if all"
    assert f"{saved} had 256)" in str(rows.summary)
    assert one.fingerprint != rows.fingerprint


def test_a_mixture_draws_its_sources_by_weight_in_all_widths(
    write_jsonl: WriteJsonl, tokenizer: Any, sums: Sums
) -> None:
    small = write_jsonl(*sums(20), name="small.jsonl")
    large = write_jsonl(*sums(200, seed=1), name="large.jsonl")
    mixture = ((small, 3.0), (large, 1.0))
    config = DataConfig(mixture=mixture, row_length=128, packing=False, widths=2)
    rows = load_rows(config, tokenizer, min_rows=8)
    assert len(rows.widths) == 2
    batches = BatchIterator(rows, batch_size=8)
    seen = np.concatenate([next(batches).row_index for _ in range(100)])
    assert abs((seen < 20).mean() - 0.75) < 0.02
    times = np.bincount(seen[seen < 20])
    assert len(times) == 20
    assert np.ptp(times) <= 4  # Of 30.


def test_too_few_rows_for_two_widths_have_one() -> None:
    chats = [TokenizedChat(np.arange(n), np.ones(n)) for n in (3, 9, 33, 60)]
    lengths = np.array([2, 8, 32, 59])
    assert choose_widths(lengths, np.ones(4), 64, count=4, least=3) == (60,)
    rows = Rows(
        chats, [[i] for i in range(4)], row_length=64, summary=Summary(64), widths=(8, 32, 60)
    )
    assert rows.widths == {8: 2, 32: 1, 60: 1}


LENGTHS = np.random.default_rng(0).integers(3, 14, 40)
MODEL = models.DecoderConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
)


@pytest.fixture(scope="module")
def numbers() -> Rows:
    """Rows of 5 or 13 tokens."""
    rng = np.random.default_rng(1)
    chats = [TokenizedChat(rng.integers(0, 31, n + 1), np.ones(n + 1)) for n in LENGTHS]
    groups = [[i] for i in range(len(chats))]
    return Rows(chats, groups, row_length=16, summary=Summary(16), widths=(5, 13))


def make_trainer() -> Trainer:
    model = models.Decoder(MODEL, rngs=nnx.Rngs(0))
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    weighting = losses.RankTuner("one")
    tx = optax.adam(1e-2)
    return Trainer(model, tx=tx, weighting=weighting, mesh=mesh, accumulation=2)


def params(trainer: Trainer) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(trainer.model, nnx.Param))]


def test_training_compiles_a_step_for_each_width_and_does_what_padded_rows_do(
    numbers: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, compiled, compile_step = 6, [], StepProgram.compile

    def count(program: StepProgram, state: Any, batch: Batch[Any]) -> bool:
        compiled.append(compile_step(program, state, batch))
        return compiled[-1]

    with monkeypatch.context() as patch:
        patch.setattr(StepProgram, "compile", count)
        whole = make_trainer()
        whole.fit(numbers, steps, batch_size=8)
    batches = BatchIterator(numbers, batch_size=8)
    taken = [next(batches) for _ in range(steps)]
    assert {batch.tokens.shape for batch in taken} == {(8, 5), (8, 13)}
    assert sum(compiled) == 2

    padded = make_trainer()
    padded.fit([numbers.take(batch.row_index.tolist()) for batch in taken], steps)
    assert whole.metrics["train/loss"] == pytest.approx(
        padded.metrics["train/loss"], rel=SAME_RUN_LOSS["rtol"]
    )
    for one, other in zip(params(whole), params(padded), strict=True):
        largest = np.abs(other).max()
        np.testing.assert_allclose(one / largest, other / largest, **SAME_RUN_PARAM)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"widths": 5, "packing": False}, "data.widths: expected one of 1, 2, 3, 4, got 5"),
        ({"widths": 2}, r"expected 1 with data.packing, which fills rows, got 2; set data.packing"),
        ({"packer": "best"}, "data.packer: expected one of subset_sum, best_fit, got 'best'"),
    ],
)
def test_widths_and_packers_that_there_are_not_are_refused(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        DataConfig(**options)
