"""`ranktuner audit`: every number is right, wherever it is computed and however often it is cut."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from ranktuner_jax import cli, data, losses, models
from tests import oracles
from tests.tolerances import EXACT_SCALE, EXPECTED_RANK, F32, Tolerance
from tests.train import processes
from tests.train.conftest import TINY_CONFIG
from tests.train.happenings import sigterm_inside

PREEMPTED = 75
METHODS = [
    *("sft", "dft", "eaft", "talr", "profit", "deft", "idft", "entropy"),
    *("ranktuner", "ranktuner_one", "ranktuner_exact", "ranktuner_one_exact"),
]
COLUMNS = [
    *("conversation", "position", "source", "token_id", "token", "nll", "prob", "rank"),
    *("entropy", "max_prob", "expected_rank", "expected_rank_bound", "topk_entropy"),
    *("collision", "relative_rank", "relative_scale", "relative_scale_exact"),
    *(f"weight/{name}" for name in METHODS),
]
VARIANTS: dict[str, dict[str, str]] = {
    "ranktuner_one": {"base": "one"},
    "ranktuner_exact": {"scale": "exact"},
    "ranktuner_one_exact": {"base": "one", "scale": "exact"},
}
EXACT: dict[str, Tolerance] = {
    "expected_rank": EXPECTED_RANK,
    **dict.fromkeys(("relative_rank", "relative_scale_exact"), EXACT_SCALE),
    **dict.fromkeys(("weight/ranktuner_exact", "weight/ranktuner_one_exact"), EXACT_SCALE),
}


@pytest.fixture(scope="module")
def sharp_model(tiny_model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The tiny model, with predictions from flat to confident."""
    model = models.load_pretrained(tiny_model)
    model.embed[...] *= 40  # The inputs are normalised.
    folder = tmp_path_factory.mktemp("sharp") / "model"
    models.save_pretrained(model, folder, tokenizer_from=tiny_model)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Conversations of all lengths; a row of the audit holds one or two."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("rows")
    records = [
        {"prompt": f"{n}?", "completion": "a" + "".join(rng.choice(list("ab é🙂"), n % 8))}
        for n in range(300)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def command(
    sharp_model: pathlib.Path, rows: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """An audit in three parts, over eight devices."""
    config = {
        "model": str(sharp_model),
        "data": {"source": str(rows), "row_length": 64},
        "mesh": {"data": 8},
        "eval": {"batch_size": 16},
    }
    path = tmp_path_factory.mktemp("config") / "audit.py"
    path.write_text(TINY_CONFIG.format(config=config))
    return ["audit", f"--config={path}"]


@pytest.fixture(scope="module")
def whole(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("audit") / "whole"
    assert cli.main([*command, f"--output={folder}"]) == 0
    return folder


def arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The columns of an audit."""
    table = pq.read_table(folder / "tokens.parquet")
    return {name: np.asarray(table[name].to_pylist()) for name in table.column_names}


def expected_columns(token: oracles.Token, tau: float) -> dict[str, float]:
    expected = {
        name: getattr(token, name)
        for name in ("nll", "prob", "rank", "entropy", "max_prob", "topk_entropy", "collision")
    }
    indicator = oracles.indicator(token.rank, token.expected_rank)
    expected |= {
        "expected_rank": token.expected_rank,
        "expected_rank_bound": oracles.expected_rank_bound(token),
        "relative_rank": indicator,
        "relative_scale": oracles.relative_scale(token),
        "relative_scale_exact": 1 / indicator,
    }
    for name in METHODS:
        method = "ranktuner" if name in VARIANTS else name
        expected[f"weight/{name}"] = oracles.weight(token, method, VARIANTS.get(name, {}), tau)
    return expected


def test_every_column_equals_the_oracle(
    whole: pathlib.Path, sharp_model: pathlib.Path, rows: pathlib.Path
) -> None:
    table = pq.read_table(whole / "tokens.parquet")
    assert table.column_names == COLUMNS
    tokenizer = data.load_tokenizer(sharp_model)
    loaded = data.load_rows(data.DataConfig(str(rows), row_length=64, packing=False), tokenizer)
    model = models.load_pretrained(sharp_model)
    score = jax.jit(lambda model, tokens: model.logits(model(tokens)))
    tokens: dict[tuple[int, int], oracles.Token] = {}
    means, ids, texts = [], [], []
    for c in range(300):
        chat = loaded.conversation(c)
        padded = np.zeros((1, 80), np.int32)
        padded[0, : len(chat.tokens)] = chat.tokens
        logits = np.asarray(score(model, padded))[0]
        positions = np.flatnonzero(chat.mask).tolist()
        for position in positions:
            label = int(chat.tokens[position])
            tokens[c, position] = oracles.token(logits[position - 1], label)
            ids.append(label)
            texts.append(tokenizer.decode([label]))
        means.append(np.mean([tokens[c, position].nll for position in positions]))
    keys = zip(table["conversation"].to_pylist(), table["position"].to_pylist(), strict=True)
    assert list(keys) == list(tokens)
    assert table["token_id"].to_pylist() == ids
    assert table["token"].to_pylist() == texts
    assert "\ufffd" in texts
    assert set(table["source"].to_pylist()) == {str(rows)}

    tau = float(np.median(means))
    audit = json.loads((whole / "audit.json").read_text())
    np.testing.assert_allclose(audit["talr_tau"], tau, **F32)
    expected = [expected_columns(token, tau) for token in tokens.values()]
    # Near two bits and at ProFit's threshold correct programs may take different branches.
    assert min(abs(token.entropy / np.log(2) - 2) for token in tokens.values()) > 1e-4
    assert min(abs(token.prob - 0.1) for token in tokens.values()) > 1e-5
    assert {token.rank == 1 for token in tokens.values()} == {True, False}
    for name in COLUMNS[5:]:
        np.testing.assert_allclose(
            table[name].to_numpy(),
            [columns[name] for columns in expected],
            **EXACT.get(name, F32),
            err_msg=name,
        )


def test_the_columns_are_typed_compressed_and_explain_themselves(whole: pathlib.Path) -> None:
    file = pq.ParquetFile(whole / "tokens.parquet")
    types = {field.name: str(field.type) for field in file.schema_arrow}
    assert types == dict.fromkeys(COLUMNS, "float") | {
        "conversation": "int64",
        **dict.fromkeys(("position", "token_id", "rank"), "int32"),
        "source": "dictionary<values=string, indices=int32, ordered=0>",
        "token": "string",
    }
    for field in file.schema_arrow:
        assert field.metadata[b"description"]
        assert field.metadata[b"unit"]
    for column in range(len(COLUMNS)):
        assert file.metadata.row_group(0).column(column).compression == "ZSTD"
    about = json.loads(file.schema_arrow.metadata[b"ranktuner"])
    audit = json.loads((whole / "audit.json").read_text())
    for name in ("model", "source", "split", "vocab_size", "talr_tau", "conversations", "tokens"):
        assert about[name] == audit[name]
    assert audit["methods"] == METHODS
    assert audit["tokens"] == file.metadata.num_rows
    assert (audit["version"], audit["conversations"], audit["row_length"]) == (1, 300, 64)


def test_the_summary_is_that_of_the_columns(
    whole: pathlib.Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (whole / "tokens.parquet").stat().st_mtime_ns
    assert cli.main([*command, f"--output={whole}"]) == 0  # Finished: nothing is scored again.
    assert (whole / "tokens.parquet").stat().st_mtime_ns == before
    shown = capsys.readouterr().out
    assert shown.rstrip().endswith(f"report: {whole / 'report.html'}")
    table = arrays(whole)
    of_method = json.loads((whole / "audit.json").read_text())["weights"]
    base = table["weight/ranktuner"].astype(float)
    for name in METHODS:
        weights, found = table[f"weight/{name}"].astype(float), of_method[name]
        np.testing.assert_allclose(found["mean"], weights.mean(), rtol=1e-6)
        share = weights.sum() ** 2 / (len(weights) * (weights**2).sum())
        np.testing.assert_allclose(found["effective_share"], share, rtol=1e-6)
        if name == "sft":
            assert found["correlation"] is None
        else:
            expected = np.corrcoef(weights, base)[0, 1]
            np.testing.assert_allclose(found["correlation"], expected, rtol=1e-5)
        assert name in shown


def test_twenty_conversations_are_shown_whole_with_alternatives(whole: pathlib.Path) -> None:
    shown = [json.loads(line) for line in (whole / "conversations.jsonl").open()]
    table = arrays(whole)
    conversation = table["conversation"]
    assert len({one["conversation"] for one in shown}) == 20
    counts = np.bincount(conversation)
    means = np.bincount(conversation, table["relative_scale"]) / counts
    longer = np.flatnonzero(counts >= np.median(counts))
    highest, lowest = longer[means[longer].argmax()], longer[means[longer].argmin()]
    assert shown[0]["conversation"] == highest
    assert shown[5]["conversation"] == lowest
    assert shown[0]["reason"] == f"mean relative scale {means[highest]:.3f}, number 1 from the top"
    for one in shown:
        tokens = [token for token in one["tokens"] if token["supervised"]]
        here = np.flatnonzero(conversation == one["conversation"])
        assert [token["position"] for token in tokens] == table["position"][here].tolist()
        assert [token["position"] for token in one["tokens"]] == list(range(len(one["tokens"])))
        assert "".join(token["token"] for token in one["tokens"]).startswith("<|im_start|>user\n")
        for token, n in zip(tokens, here, strict=True):
            np.testing.assert_allclose(token["nll"], table["nll"][n], rtol=1e-4)
            for name in METHODS:
                weight = table[f"weight/{name}"][n]
                np.testing.assert_allclose(token["weights"][name], weight, rtol=1e-4)
            texts, probs = zip(*token["alternatives"], strict=True)
            assert len(texts) == 5
            assert list(probs) == sorted(probs, reverse=True)
            np.testing.assert_allclose(probs[0], table["max_prob"][n], rtol=1e-4)
            if token["rank"] <= 5:
                np.testing.assert_allclose(probs[token["rank"] - 1], token["prob"], rtol=1e-4)
                assert token["token"] in texts


KILLED = """
import os, signal, sys
from ranktuner_jax import cli
from ranktuner_jax.diagnostics.parts import AuditFolder

write, calls = AuditFolder.write, []

def killed(*args, **options):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*args, **options)

AuditFolder.write = killed
cli.main(sys.argv[1:])
"""


def test_a_finished_audit_is_compared_with_another(
    command: list[str], whole: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = pathlib.Path(shutil.copytree(whole, whole.parent / "before"))
    assert cli.main([*command, f"--output={whole}", f"--against={before}"]) == 0
    page = whole / "moved.html"
    assert f"what moved: {page}" in capsys.readouterr().out
    assert page.stat().st_size > 10_000
    # It stays a finished audit.
    assert cli.main([*command, f"--output={whole}"]) == 0


def test_a_killed_audit_scores_no_part_again_and_gives_the_same_bytes(
    command: list[str],
    whole: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [*command, f"--output={tmp_path / 'cut'}"]
    precision = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], env=os.environ | precision)
    assert killed.returncode == -signal.SIGKILL
    kept = sorted((tmp_path / "cut" / ".parts").glob("0*.parquet"))
    assert [path.name for path in kept] == ["000000.parquet", "000001.parquet"]
    done = sum(pq.read_metadata(path).num_rows for path in kept)
    assert cli.main([*command, "--limit=7"]) == 2  # Another audit.
    said = capsys.readouterr().err
    assert said.startswith(f"ranktuner: --output: {tmp_path / 'cut'} holds an audit with ")
    assert said.count("\n") == 1
    assert cli.main(command) == 0
    total = pq.read_metadata(whole / "tokens.parquet").num_rows
    counted = [
        int(line.split()[1].replace(",", "")) for line in capsys.readouterr().err.splitlines()
    ]
    assert done < counted[0] <= counted[-1] == total
    for name in ("tokens.parquet", "conversations.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (whole / name).read_bytes()
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {
        *("tokens.parquet", "conversations.jsonl", "audit.json", "report.html")
    }


def test_a_stopped_audit_goes_on(
    command: list[str],
    whole: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [*command, f"--output={tmp_path}"]
    with sigterm_inside("AuditFolder.write", 2):
        assert cli.main(command) == PREEMPTED
    assert capsys.readouterr().err.endswith("stopped: run the same command to go on\n")
    assert cli.main(command) == 0
    assert (tmp_path / "tokens.parquet").read_bytes() == (whole / "tokens.parquet").read_bytes()


def test_two_processes_give_the_audit_of_one(
    command: list[str], whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    arguments = [*command[1:], f"--output={tmp_path / 'both'}"]
    ends = processes.wait(processes.start(arguments, command="audit"), timeout=240)
    assert [code for code, _ in ends] == [0, 0], ends
    one, two = (pq.read_table(path / "tokens.parquet") for path in (whole, tmp_path / "both"))
    for name in COLUMNS:
        if one[name].type in ("float", "float32"):
            np.testing.assert_allclose(two[name].to_numpy(), one[name].to_numpy(), **F32)
        else:
            assert two[name].to_pylist() == one[name].to_pylist()


OWN = """
import dataclasses
import jax.numpy as jnp
from ml_collections import ConfigDict
from ranktuner_jax import losses


@dataclasses.dataclass(frozen=True)
class AboveMean(losses.Weighting):
    uses_batch_statistic = True
    floor: float = 0.5

    def batch_statistic(self, nll, mask, sequence_ids, axis_name):
        return jnp.sum(jnp.where(mask, nll, 0)) / jnp.sum(mask)

    def weights(self, stats, batch_stat):
        return jnp.where(stats.nll > batch_stat, 1.0, self.floor)


losses.WEIGHTINGS["above_mean"] = AboveMean


def get_config():
    return ConfigDict({config!r})
"""


@pytest.fixture
def registry() -> Iterator[None]:
    before = dict(losses.WEIGHTINGS)
    yield
    losses.WEIGHTINGS.clear()
    losses.WEIGHTINGS.update(before)


@pytest.mark.usefixtures("registry")
def test_a_method_of_ones_own_and_a_mixture_are_audited(
    sharp_model: pathlib.Path, rows: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "x", "completion": "a long one"}\n' * 3)
    config = {
        "model": str(sharp_model),
        "data": {"mixture": [(str(rows), 3.0), (str(other), 1.0)], "row_length": 64},
        "loss": {"weighting": "above_mean", "options": {"floor": 0.25}},
    }
    (tmp_path / "own.py").write_text(OWN.format(config=config))
    folder = tmp_path / "audit"
    flags = [f"--config={tmp_path / 'own.py'}", "--limit=8", f"--output={folder}"]
    assert cli.main(["audit", *flags]) == 0
    table = arrays(folder)
    assert list(table) == [*COLUMNS, "weight/above_mean", "weight/config"]
    sources = dict(zip(table["conversation"].tolist(), table["source"].tolist(), strict=True))
    assert sources == {n: str(rows if n < 6 else other) for n in range(8)}
    above = table["nll"] > table["nll"].mean()
    assert table["weight/above_mean"].tolist() == np.where(above, 1.0, 0.5).tolist()
    assert table["weight/config"].tolist() == np.where(above, 1.0, 0.25).tolist()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--limit=0"], "--limit: expected at least 1, got 0"),
        (["--config.mesh.data=3"], "mesh: expected sizes that multiply to the number of dev"),
        (["--config.data.row_length=20"], "the conversation takes "),
        (["--split=holdout"], "split: expected data.holdout above 0 for the split 'holdout'"),
        (["--config.data.source=nowhere.jsonl"], "nowhere.jsonl"),
        (["--against=nowhere"], "nowhere: expected the folder of a finished audit"),
    ],
    ids=str,
)
def test_bad_flags_are_a_one_line_error(
    command: list[str],
    flags: list[str],
    said: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([*command, f"--output={tmp_path / 'x'}", *flags]) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


def test_another_audit_or_other_files_in_the_folder_are_refused(
    command: list[str],
    whole: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = (whole / "audit.json").read_bytes()
    other = "--config.data.system=Be brief."
    assert cli.main([*command, f"--output={whole}", other, "--config.data.row_length=128"]) == 2
    assert "holds an audit with " in (shown := capsys.readouterr().err)
    assert shown.count("\n") == 1
    assert (whole / "audit.json").read_bytes() == before
    (tmp_path / "thesis.tex").write_text("")
    assert cli.main([*command, f"--output={tmp_path}"]) == 2
    assert "which holds something else; choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("vocab_size", 50, "model: expected a vocabulary that holds the tokenizer's token "),
        ("max_position_embeddings", 8, "data.row_length: expected conversations of at most 8 "),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(
    key: str,
    value: int,
    said: str,
    command: list[str],
    sharp_model: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sharp_model, folder)
    config = json.loads((folder / "config.json").read_text())
    assert key in config
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    flags = [f"--config.model={folder}", f"--output={tmp_path / 'x'}"]
    assert cli.main([*command, *flags]) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "x").exists()
