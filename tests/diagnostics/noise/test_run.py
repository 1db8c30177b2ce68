"""`ranktuner noise` as a command: its folder, its resumption and its mistakes."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from ranktuner_jax import cli, losses, models
from ranktuner_jax.data import Batch
from ranktuner_jax.diagnostics import TokenScorer
from ranktuner_jax.diagnostics.noise import (
    MEASURES,
    PAPER,
    Result,
    Sequences,
    compare,
    pollute,
    score_sequences,
)
from ranktuner_jax.diagnostics.noise.page import write_noise_report
from ranktuner_jax.diagnostics.noise.table import Measure
from ranktuner_jax.errors import UserError
from tests.train import processes
from tests.train.happenings import sigterm_inside

PREEMPTED = 75


MY_CONFIG = """
import dataclasses

from ml_collections import ConfigDict

from ranktuner_jax import losses


@dataclasses.dataclass(frozen=True)
class Surprise(losses.Weighting):
    def weights(self, stats, batch_stat):
        return stats.nll


losses.WEIGHTINGS["surprise"] = Surprise


def get_config():
    return ConfigDict({{"model": "{model}", "data": {{"source": "{rows}", "row_length": 256}}}})
"""


@pytest.fixture(scope="module")
def command(
    tiny_model: pathlib.Path, rows: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[str]]:
    config = tmp_path_factory.mktemp("config") / "mine.py"
    config.write_text(MY_CONFIG.format(model=tiny_model, rows=rows))
    flags = ["--kinds=inserted,number", "--lengths=4", "--rates=0.003,0.006", "--seeds=2"]
    yield ["noise", f"--config={config}", *flags]
    losses.WEIGHTINGS.pop("surprise", None)


@pytest.fixture(scope="module")
def whole(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("noise") / "whole"
    assert cli.main([*command, f"--output={folder}"]) == 0
    return folder


def test_sequences_that_share_rows_are_scored_as_each_of_them_alone(
    tiny_model: pathlib.Path,
    sequences: Sequences,
) -> None:
    scorer = TokenScorer(models.load_pretrained(tiny_model))
    chats = sequences.clean[:5]
    found = score_sequences(scorer, chats, row_length=300, batch_size=2)
    alone = []
    for chat in chats:
        padding = ((0, 1), (0, 301 - len(chat.tokens)))
        names = {"tokens": chat.tokens[:-1], "labels": chat.tokens[1:], "mask": chat.mask[1:]}
        batch = Batch.of({name: np.pad(a[None], padding) for name, a in names.items()})
        stats = jax.device_get(scorer(batch))
        alone.append(jax.tree.map(lambda array, kept=batch.mask: array[kept], stats))
    for name in ("nll", "entropy", "expected_rank", "topk_entropy", "collision", "max_prob"):
        expected = np.concatenate([getattr(stats, name) for stats in alone])
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-4, atol=1e-5)
    assert found.vocab_size == alone[0].vocab_size


def test_what_no_token_follows_is_null_in_the_results(whole: pathlib.Path) -> None:
    result = Result.from_json((whole / "results.json").read_text())
    table = result.tables[0]
    rows = {name: dict(row) for name, row in table.rows.items()}
    rows["H"]["after"] = Measure(math.nan, math.nan, math.nan, (math.nan, 0.5))
    result = dataclasses.replace(result, tables=(dataclasses.replace(table, rows=rows),))
    text = result.to_json()
    assert json.loads(text)["tables"][0]["rows"]["H"]["after"]["seeds"] == [None, 0.5]
    assert "NaN" not in text
    read = Result.from_json(text).tables[0].rows["H"]["after"]
    assert math.isnan(read.value)
    assert read.seeds[1] == 0.5


def test_results_hold_a_table_for_each_kind_and_rate(
    whole: pathlib.Path, sequences: Sequences
) -> None:
    text = (whole / "results.json").read_text()
    result = Result.from_json(text)
    assert Result.from_json(result.to_json()) == result
    assert json.loads(text)["version"] == 1
    assert [(table.kind, table.length, table.rate) for table in result.tables] == [
        (kind, length, rate)
        for kind, length in (("inserted", 4), ("number", 0))
        for rate in (0.003, 0.006)
    ]
    assert sorted(path.name for path in whole.iterdir()) == ["report.html", "results.json"]
    for table in result.tables:
        assert list(table.rows)[:3] == list(PAPER)
        assert {"eaft", "talr", "profit", "deft", "idft", "chance (sft)"} <= table.rows.keys()
        for row in table.rows.values():
            assert row.keys() == MEASURES.keys()
        assert table.rows["ceiling"]["tok_rec"].value == pytest.approx(1)
        assert table.rows["chance (sft)"]["tok_rec"].value == pytest.approx(0.1)
        assert table.realised == tuple(np.divide(table.noise, table.tokens))
        # One score is the other, turned around or transformed.
        assert table.rows["surprise"]["seq_rec"] == table.rows["1 − p"]["seq_rec"]
    few, many = result.tables[:2]
    assert all(a < b for a, b in zip(few.polluted, many.polluted, strict=True))


def test_a_table_is_that_of_all_sequences_scored_again(
    whole: pathlib.Path, tiny_model: pathlib.Path, sequences: Sequences
) -> None:
    """What no noise precedes is scored once: here everything is, in every draw."""
    table = Result.from_json((whole / "results.json").read_text()).tables[1]
    scorer = TokenScorer(models.load_pretrained(tiny_model))
    recalls = []
    for seed in range(2):
        spans = {span.index: span for span in pollute(sequences, "inserted", 4, 0.006, seed)}
        rates = [span.rate for span in spans.values()]
        if len(rates) > 1 and 0.006 - rates[-2] < rates[-1] - 0.006:
            spans.popitem()
        chats = [spans[i].chat if i in spans else chat for i, chat in enumerate(sequences.clean)]
        stats = score_sequences(scorer, chats, row_length=256, batch_size=8)
        noise = np.concatenate(
            [
                spans[i].noise[chat.mask] if i in spans else np.zeros(chat.mask.sum(), bool)
                for i, chat in enumerate(chats)
            ]
        )
        ranked = np.argsort(-stats.entropy, kind="stable")
        top = ranked[: int(0.1 * len(noise))]
        recalls.append(noise[top].sum() / noise.sum())
        assert table.noise[seed] == noise.sum()
        assert table.tokens[seed] == len(noise)
    # Within the fraction of a token that the tenth leaves.
    np.testing.assert_allclose(
        table.rows["H"]["tok_rec"].seeds, recalls, atol=1.01 / min(table.noise)
    )


def test_the_same_command_shows_the_tables_again_and_scores_nothing(
    command: list[str], whole: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (whole / "results.json").stat().st_mtime_ns
    assert cli.main([*command, f"--output={whole}"]) == 0
    shown = capsys.readouterr()
    assert "tokens/s" not in shown.err
    assert (whole / "results.json").stat().st_mtime_ns == before
    assert shown.out.count("[55.33]") == 4
    assert "a number replaced by another of as many digits" in shown.out
    assert "TOK REC@10%: " in shown.out


def test_a_stopped_run_goes_on_with_the_same_result(
    command: list[str],
    whole: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [*command, f"--output={tmp_path / 'part'}"]
    with sigterm_inside("score_sequences", 4):
        assert cli.main(command) == PREEMPTED
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "stopped: run the same command to go on"
    parts = sorted(path.name for path in (tmp_path / "part/.parts").iterdir())
    assert parts == ["clean.npz", "inserted-4-0.npz", "inserted-4-1.npz"]
    with sigterm_inside("score_sequences", 2):
        assert cli.main(command) == PREEMPTED
    assert cli.main(command) == 0
    assert (tmp_path / "part/results.json").read_text() == (whole / "results.json").read_text()


@pytest.mark.drill
def test_two_processes_give_the_result_of_one(
    command: list[str], whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    flags = ["--kinds=number", "--seeds=1", f"--output={tmp_path / 'both'}"]
    ends = processes.wait(processes.start([*command[1:], *flags], command="noise"), timeout=240)
    assert [code for code, _ in ends] == [0, 0], ends
    one, two = (
        Result.from_json((folder / "results.json").read_text()).tables[-1]
        for folder in (whole, tmp_path / "both")
    )
    assert (two.noise[0], two.tokens[0]) == (one.noise[0], one.tokens[0])
    for score in ("H", "S exact"):
        a, b = (table.rows[score]["tok_rec"].seeds[0] for table in (one, two))
        assert abs(a - b) <= 1.01 / one.noise[0]  # Sums in another order may change a rank.


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--output="], "--output: expected a folder for the results, got none"),
        (["--limit=0"], "--limit: expected at least 1, got 0"),
        (["--kinds=typo"], "--kinds: expected some of replaced, inserted, words, number, sentence"),
        (["--kinds="], "--kinds: expected some of replaced, inserted, words, number, sentence"),
        (["--lengths=0"], "--lengths: expected whole numbers of at least 1, each once, got 0"),
        (["--lengths=4,4"], "--lengths: expected whole numbers of at least 1, each once, got 4"),
        (["--lengths=four"], "--lengths: expected numbers separated by commas, got 'four'"),
        (["--rates=1.5"], "--rates: expected shares between 0 and 1, each once, got 1.5"),
        (["--rates=nan"], "--rates: expected shares between 0 and 1, each once, got nan"),
        (["--rates=0.5"], "--rates: expected at most 0.0"),
        (["--seeds=0"], "--seeds: expected at least 1, got 0"),
        (["--config.data.source=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_folder(
    flags: list[str],
    said: str,
    command: list[str],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([*command, f"--output={tmp_path / 'out'}", *flags]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_else_is_refused(
    command: list[str],
    whole: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = (whole / "results.json").read_bytes()
    for flag, said in (("--seeds=3", "seeds 2, this one has 3"), ("--limit=9", "limit None, this")):
        assert cli.main([*command, f"--output={whole}", flag]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert f"{whole} holds a noise table with {said}" in line
    assert (whole / "results.json").read_bytes() == before
    (tmp_path / "precious").write_text("mine")
    assert cli.main([*command, f"--output={tmp_path}"]) == 2
    assert "which holds something else" in capsys.readouterr().err
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "results.json").write_text('{"version": 1, "tables"')
    assert cli.main([*command, f"--output={broken}"]) == 2
    assert "got a broken file (JSONDecodeError" in capsys.readouterr().err
    with pytest.raises(UserError, match="expected the folder of a finished ranktuner noise"):
        write_noise_report(broken)


def test_a_comparison_says_which_order_holds_and_which_numbers_agree(whole: pathlib.Path) -> None:
    table = Result.from_json((whole / "results.json").read_text()).tables[0]

    def with_recalls(*values: float) -> Any:
        for name, value in zip(PAPER, values, strict=True):
            measure = table.rows[name]["tok_rec"]
            object.__setattr__(measure, "value", value)
            object.__setattr__(measure, "low", value - 0.02)
            object.__setattr__(measure, "high", value + 0.02)
        [sentence] = [words for words in compare(table) if words.startswith("TOK REC")]
        return sentence

    said = with_recalls(0.56, 0.50, 0.20)
    assert "H > 1 − p > S bound, as in the paper" in said
    assert said.endswith("our interval holds the paper's number for H")
    said = with_recalls(0.1, 0.4, 0.1)
    assert "1 − p > H = S bound, in the paper H > 1 − p > S bound" in said
    assert said.endswith("for 1 − p")


def test_the_report_is_made_from_the_results_alone(
    whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "results.json").write_bytes((whole / "results.json").read_bytes())
    html = write_noise_report(tmp_path).read_text()
    assert html == (whole / "report.html").read_text()
    assert len(html) < 3e6
    for text in ("TOK PREC@10%", "55.33", "4 tokens drawn uniformly and inserted", "By rate"):
        assert text in html
