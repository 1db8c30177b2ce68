"""The parts of an audit hold every conversation once, in order, in rows that it can be found in."""

from __future__ import annotations

import itertools
import pathlib

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from ranktuner_jax.data import Rows, Summary, TokenizedChat
from ranktuner_jax.diagnostics.conversations import choose
from ranktuner_jax.diagnostics.layout import batches, cut, owners, pack
from ranktuner_jax.diagnostics.parts import AuditFolder
from ranktuner_jax.diagnostics.texts import TokenTexts
from ranktuner_jax.errors import UserError

LENGTHS = st.lists(st.integers(1, 8), min_size=1, max_size=40)


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(1, 4), st.booleans())
def test_parts_follow_each_other_and_fill_no_more_rows_than_asked(
    lengths: list[int], rows: int, packing: bool
) -> None:
    takes = np.array(lengths)
    stops = cut(takes, row_length=8, rows=rows, packing=packing)
    assert stops[-1] == len(lengths)
    assert stops == sorted(set(stops))
    for first, last in zip([0, *stops], stops, strict=False):
        groups = pack(range(first, last), takes, 8, packing=packing)
        assert len(groups) <= rows
        assert sorted(itertools.chain(*groups)) == list(range(first, last))
        assert all(takes[group].sum() <= 8 for group in groups)


@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.integers(1, 4))
def test_every_label_is_found_in_its_conversation(lengths: list[int], batch_size: int) -> None:
    chats = [
        TokenizedChat(np.arange(n + 1) + 100 * c, np.ones(n + 1, np.float32))
        for c, n in enumerate(lengths)
    ]
    layout = [[c] for c in range(len(chats))]
    rows = Rows(chats, layout, row_length=8, summary=Summary(8))
    groups = pack(range(len(chats)), rows.lengths, 8)
    seen = []
    for here, batch in batches(rows, groups, batch_size):
        assert batch.tokens.shape == (batch_size, 8)
        conversation, position = owners(here, batch)
        np.testing.assert_array_equal(conversation >= 0, batch.segment_ids > 0)
        for at in zip(*np.nonzero(batch.mask), strict=True):
            c, i = int(conversation[at]), int(position[at])
            assert rows.conversation(c).tokens[i] == batch.labels[at]
            seen.append((c, i))
    assert sorted(seen) == [(c, i) for c, n in enumerate(lengths) for i in range(1, n + 1)]


def test_conversations_are_chosen_once_each_and_only_if_they_have_a_supervised_token() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 7, 19, 20, 21, 300):
        tokens = rng.integers(0, 30, count)
        tokens[0] = 1
        chosen = choose(tokens, rng.random(count), rng.random(count))
        numbers = [one.conversation for one in chosen]
        assert len(set(numbers)) == len(numbers) == min(20, np.count_nonzero(tokens))
        assert tokens[numbers].all()


def byte_tokenizer(decoder: tokenizers.decoders.Decoder) -> transformers.PreTrainedTokenizerFast:
    alphabet = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "Ġyes", "▁yes"]
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoder
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


def test_tokens_keep_the_space_before_them_and_parts_of_characters_stay_marked() -> None:
    tokenizer = byte_tokenizer(tokenizers.decoders.ByteLevel())
    texts = TokenTexts(tokenizer)
    assert texts[tokenizer.get_vocab()["Ġyes"]] == " yes"
    ids = tokenizer.encode("a é", add_special_tokens=False)
    assert texts.of(ids) == ["a", " ", "\ufffd", "\ufffd"]
    # This decoder strips the space before the first token of a text.
    pieces = byte_tokenizer(tokenizers.decoders.Metaspace())
    assert TokenTexts(pieces)[pieces.get_vocab()["▁yes"]] == " yes"


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: pathlib.Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="expected a new folder or one of an audit, got"):
        AuditFolder(tmp_path, {}).claim([1])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match=r"can be written, got .*notes.txt: Not a directory"):
        AuditFolder(tmp_path / "notes.txt", {}).claim([1])


def test_a_broken_plan_is_a_one_line_error(tmp_path: pathlib.Path) -> None:
    AuditFolder(tmp_path, {"model": "a"}).claim([1])
    (tmp_path / ".parts" / "plan.json").write_text("{")
    with pytest.raises(UserError, match="expected what an audit wrote, got a broken file"):
        AuditFolder(tmp_path, {"model": "a"}).claim([1])


def test_only_whole_parts_count_as_done(tmp_path: pathlib.Path) -> None:
    folder = AuditFolder(tmp_path, {"model": "a"})
    folder.claim([1, 2, 3])
    folder.write(2, pa.table({"nll": [1.0]}), seconds=0.5)
    folder.write(0, pa.table({"nll": [1.0]}), seconds=0.25)
    (tmp_path / ".parts" / "000001.parquet.partial-7").write_text("cut off")
    folder.scratch("tokens.parquet").write_text("cut off")
    assert folder.done() == [0, 2]
    assert folder.seconds() == 0.75
