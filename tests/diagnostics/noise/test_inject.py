"""Noise in sequences: where it is, what it is, and how much of it."""

from __future__ import annotations

import collections
import pathlib
import re
from typing import Any

import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from ranktuner_jax import data
from ranktuner_jax.diagnostics.noise import KINDS, Polluted, Sequences, pollute, read_sequences
from ranktuner_jax.diagnostics.noise.inject import _polluted
from ranktuner_jax.errors import UserError
from tests.diagnostics.noise.conftest import ANSWERS, answer

TOKENS = pytest.mark.parametrize("kind", ["replaced", "inserted"])


def all_spans(
    sequences: Sequences, kind: str, seeds: int = 3, rate: float = 0.01
) -> list[Polluted]:
    return [span for seed in range(seeds) for span in pollute(sequences, kind, 4, rate, seed)]


@TOKENS
def test_noise_is_one_span_inside_a_response_and_the_rest_is_the_original(
    sequences: Sequences, kind: str
) -> None:
    for span in all_spans(sequences, kind):
        old, new = sequences.clean[span.index], span.chat
        [start, *_] = places = np.flatnonzero(span.noise).tolist()
        assert places == list(range(start, start + 4))
        assert new.mask[places].all()
        assert not old.mask[start - 1] or old.mask[start]
        if kind == "inserted":
            np.testing.assert_array_equal(new.tokens[~span.noise], old.tokens)
            np.testing.assert_array_equal(new.weights[~span.noise], old.weights)
        else:
            np.testing.assert_array_equal(new.tokens != old.tokens, span.noise)
            np.testing.assert_array_equal(new.weights, old.weights)
        following = [i for i in range(start + 4, start + 12) if i < len(new.tokens)]
        assert np.flatnonzero(span.after).tolist() == following


@TOKENS
def test_noise_is_uniform_over_the_vocabulary_without_special_tokens(
    sequences: Sequences, tokenizer: Any, kind: str
) -> None:
    spans = [s for seed in range(60) for s in pollute(sequences, kind, 16, 0.04, seed)]
    counts = collections.Counter(np.concatenate([s.chat.tokens[s.noise] for s in spans]).tolist())
    for span in spans:  # The special token that ends the turn stays.
        assert span.chat.tokens[-1] == sequences.clean[span.index].tokens[-1]
    ordinary = {tokenizer.convert_tokens_to_ids(byte) for byte in ByteLevel.alphabet()}
    assert len(ordinary) == 256 == len(tokenizer.get_vocab()) - 3
    assert set(counts) == ordinary
    expected = counts.total() / 256
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    # Its mean is 255 and its deviation 23; "replaced" never draws the token that is there.
    assert chi_squared < 255 + 5 * 23


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [0.002, 0.005, 0.0075])
def test_the_rate_is_the_requested_one_within_one_span(
    sequences: Sequences, kind: str, rate: float
) -> None:
    spans = pollute(sequences, kind, 4, rate, seed=0)
    clean = [int(chat.mask.sum()) for chat in sequences.clean]
    noise = tokens = 0
    rates = [0.0]
    for span in spans:
        noise += int(span.noise.sum())
        tokens += int(span.chat.mask.sum()) - clean[span.index]
        rates.append(noise / (sum(clean) + tokens))
    assert rates[-2] < rate <= rates[-1]
    assert [span.rate for span in spans] == pytest.approx(rates[1:])
    assert len({span.index for span in spans}) == len(spans)


def test_a_higher_rate_adds_spans_to_those_of_a_lower_one_and_another_seed_draws_others(
    sequences: Sequences,
) -> None:
    few, many, others = (
        [(span.index, span.chat.tokens.tolist()) for span in pollute(sequences, "replaced", 4, *a)]
        for a in ((0.005, 0), (0.02, 0), (0.02, 1))
    )
    assert many[: len(few)] == few
    assert len(many) > len(few)
    assert not set(map(str, many)) & set(map(str, others))


@pytest.mark.parametrize("kind", ["words", "number", "sentence"])
def test_noise_of_words_is_what_differs_from_the_original(
    sequences: Sequences, tokenizer: Any, kind: str
) -> None:
    for span in all_spans(sequences, kind):
        old, new = sequences.clean[span.index].tokens.tolist(), span.chat.tokens.tolist()
        start = next(i for i in range(len(new)) if old[i : i + 1] != new[i : i + 1])
        kept = next(i for i in range(len(new)) if old[-1 - i] != new[-1 - i])
        kept = min(kept, len(old) - start, len(new) - start)
        assert np.flatnonzero(span.noise).tolist() == list(range(start, len(new) - kept))
        before, after = (
            tokenizer.decode(tokens).split("assistant\n")[1].removesuffix("<|im_end|>")
            for tokens in (old, new)
        )
        assert before == answer(span.index)
        if kind == "words":
            assert sorted(before.split()) == sorted(after.split())
            moved = [a != b for a, b in zip(before.split(), after.split(), strict=True)]
            assert 0 < len(np.trim_zeros(np.array(moved))) <= 4
        if kind == "number":
            assert re.sub(r"\d", "0", before) == re.sub(r"\d", "0", after)
            changed = zip(re.findall(r"\d+", before), re.findall(r"\d+", after), strict=True)
            assert sum(a != b for a, b in changed) == 1
        if kind == "sentence":
            assert any(
                after == before.replace(mine, theirs)
                for i in range(ANSWERS)
                for mine in re.findall(r"[A-Z][^.!]*[.!]", before)
                for theirs in re.findall(r"[A-Z][^.!]*[.!]", answer(i))
                if i != span.index
            )


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_sequence_is_cut_and_what_is_cut_off_is_not_counted(
    rows: pathlib.Path, tokenizer: Any, kind: str
) -> None:
    config = data.DataConfig(str(rows), row_length=100, too_long="truncate")
    sequences = read_sequences(config, tokenizer)
    assert all(len(chat.tokens) == 101 for chat in sequences.clean)
    for span in all_spans(sequences, kind, rate=0.002):
        assert len(span.chat.tokens) == len(span.noise) == len(span.after) == 101
        assert span.noise.any()
        if KINDS[kind].has_length and kind != "words":
            assert span.noise.sum() == 4


def test_only_supervised_tokens_count_as_noise(sequences: Sequences) -> None:
    chat = sequences.clean[0]
    start = int(np.argmax(chat.mask))
    span = _polluted(sequences, 0, (chat, slice(start - 3, start + 2)))
    assert span is not None
    assert np.flatnonzero(span.noise).tolist() == [start, start + 1]
    assert _polluted(sequences, 0, (chat, slice(start - 3, start))) is None


def test_a_rate_out_of_reach_is_refused_with_the_reach(sequences: Sequences) -> None:
    with pytest.raises(UserError, match=r"expected at most 0\.0\d+ for --kinds=replaced with --le"):
        pollute(sequences, "replaced", 4, 0.2, seed=0)
    with pytest.raises(
        UserError, match=r"at most 0\.0000 .* with --lengths=500, which .* got 0.01"
    ):
        pollute(sequences, "inserted", 500, 0.01, seed=0)


def test_conversations_are_limited_dropped_or_refused_as_the_config_says(
    rows: pathlib.Path, tokenizer: Any
) -> None:
    def read(limit: int | None = None, **options: Any) -> Sequences:
        return read_sequences(data.DataConfig(**options), tokenizer, limit)

    assert len(read(limit=5, source=str(rows), row_length=256).sources) == 5
    halves = ((str(rows), 1.0), (str(rows), 3.0))
    assert len(read(limit=8, mixture=halves, row_length=256).sources) == 8
    lengths = [len(chat.tokens) for chat in read(source=str(rows), row_length=256).clean]
    row_length = sorted(lengths)[9] - 1
    kept = read(source=str(rows), row_length=row_length, too_long="drop")
    assert len(kept.sources) == sum(length <= row_length + 1 for length in lengths)
    with pytest.raises(UserError, match=rf"rows.jsonl:\d+: the conversation takes .* {row_length}"):
        read(source=str(rows), row_length=row_length)
    with pytest.raises(UserError, match="no usable conversation"):
        read(source=str(rows), row_length=8, too_long="drop")
