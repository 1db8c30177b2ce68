"""Whole runs of a tiny model: finished, shown, interrupted, refused."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from ranktuner_jax import cli, models
from ranktuner_jax.errors import UserError
from ranktuner_jax.train import Stopped, TrainConfig, export, train_and_evaluate
from ranktuner_jax.train.runtime.preemption import PREEMPTED
from tests.train.happenings import BeforeStep

MakeConfig = Callable[..., TrainConfig]


def weights(folder: pathlib.Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def steps_in(workdir: pathlib.Path) -> list[int]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines if "train/nll" in line]


@pytest.fixture(scope="module")
def finished(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The workdir of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("finished")
    train_and_evaluate(tiny_config(), workdir)
    return workdir


def test_a_run_trains_evaluates_and_exports(finished: pathlib.Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert result["after"]["nll"] < result["before"]["nll"] - 0.3
    assert all(pathlib.Path(path).exists() for path in result["paths"].values())
    model = models.load_pretrained(finished / "model")
    assert model.vocab_size == 259
    assert (finished / "model" / "tokenizer.json").exists()

    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert {"eval/nll", "eval/accuracy"} <= lines[0].keys()
    assert lines[-1]["eval/nll"] == result["after"]["nll"]
    wanted = {
        *("train/loss", "train/nll", "train/perplexity", "train/accuracy", "train/learning_rate"),
        *("train/grad_norm", "train/tokens_per_second", "train/supervised_tokens_per_second"),
        *("train/step_seconds", "weight/mean", "weight/effective_fraction"),
    }
    assert wanted <= lines[1].keys()
    assert lines[1]["train/loss"] != lines[1]["train/nll"]


def test_a_finished_workdir_is_only_shown(
    finished: pathlib.Path,
    tiny_config_file: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    result = tmp_path / "run" / "result.json"
    known = json.loads(result.read_text())
    known["after"]["nll"] = 1.23456  # Nobody computes this.
    result.write_text(json.dumps(known))
    arguments = [f"--config={tiny_config_file}", f"--workdir={tmp_path / 'run'}"]
    assert cli.main(["train", *arguments]) == 0
    shown = capsys.readouterr()
    for text in ("before", "plain NLL", "1.235", str(finished / "checkpoints" / "6")):
        assert text in shown.out
    assert shown.err == ""


def test_another_config_is_refused_and_nothing_is_touched(
    finished: pathlib.Path, tiny_config: MakeConfig
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(UserError, match=r"optimizer\.learning_rate: 0.01, now 0.02"):
        train_and_evaluate(tiny_config(optimizer__learning_rate=0.02), finished)
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_resumes_to_the_same_bits(
    number: signal.Signals,
    finished: pathlib.Path,
    tiny_config: MakeConfig,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop = BeforeStep(3, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Stopped, match=r"^stopped and saved after step 3$"):
        train_and_evaluate(tiny_config(), tmp_path, hooks=[stop])
    assert not (tmp_path / "result.json").exists()
    train_and_evaluate(tiny_config(), tmp_path)
    assert "resuming after step 3 of 6" in capsys.readouterr().err
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert weights(tmp_path / "model") == weights(finished / "model")


def test_a_signal_to_the_command_exits_with_75_and_says_how_to_resume(
    tiny_config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    command = [sys.executable, "-m", "ranktuner_jax.cli", "train", "--config.train.steps=3000"]
    arguments = [f"--config={tiny_config_file}", f"--workdir={tmp_path}"]
    process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 3"):
            break
    process.send_signal(signal.SIGTERM)
    rest = process.stderr.read()
    assert process.wait() == PREEMPTED
    assert re.fullmatch(
        r"stopped and saved after step \d+: run the same command to resume", rest.splitlines()[-1]
    )


def test_a_run_that_was_killed_resumes_to_the_same_bits(
    finished: pathlib.Path,
    tiny_config: MakeConfig,
    tiny_config_file: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    command = [sys.executable, "-m", "ranktuner_jax.cli", "train"]
    arguments = [f"--config={tiny_config_file}", f"--workdir={tmp_path}"]
    process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoints" / "2").exists():  # The next ones may be on their way.
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    train_and_evaluate(tiny_config(), tmp_path)
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert weights(tmp_path / "model") == weights(finished / "model")


def test_a_run_that_died_before_its_result_is_evaluated_and_exported_again(
    finished: pathlib.Path, tiny_config: MakeConfig, tmp_path: pathlib.Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "result.json").unlink()
    (workdir / "model" / "model.safetensors").write_bytes(b"torn")
    train_and_evaluate(tiny_config(), workdir)
    assert weights(workdir / "model") == weights(finished / "model")


def test_evaluations_in_between_are_logged(tiny_config: MakeConfig, tmp_path: pathlib.Path) -> None:
    config = tiny_config(eval__every_steps=2, train__epochs=0.8, train__log_every=3)
    train_and_evaluate(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = json.loads((tmp_path / "result.json").read_text())["steps"]
    evaluated = [line["step"] for line in lines if "eval/nll" in line]
    assert evaluated == [0, *range(2, steps, 2), steps]
    assert steps_in(tmp_path) == sorted({1, *range(3, steps, 3), steps})


def test_a_run_that_failed_before_its_first_checkpoint_has_one_line_of_step_0(
    tiny_config: MakeConfig, tmp_path: pathlib.Path
) -> None:
    def fail() -> None:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        train_and_evaluate(tiny_config(), tmp_path, hooks=[BeforeStep(2, fail)])
    train_and_evaluate(tiny_config(), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6, 6]


def test_export_writes_any_checkpoint(
    finished: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest, older = tmp_path / "newest", tmp_path / "older"
    arguments = ["export", f"--workdir={finished}", f"--output={newest}"]
    assert cli.main(arguments) == 0
    assert "step 6 of" in capsys.readouterr().out
    assert weights(newest) == weights(finished / "model")
    assert export(finished, older, step=2) == 2
    assert weights(older) != weights(newest)
    with pytest.raises(UserError, match="--output: expected a folder that does not exist"):
        export(finished, newest)
    with pytest.raises(UserError, match=r"--step: expected one of .* \(2, 4, 6\), got 3"):
        export(finished, tmp_path / "none", step=3)


CONVERSATIONS = {
    "empty": ("", "nothing|empty|no rows"),
    "without_assistant": (
        json.dumps({"messages": [{"role": "user", "content": "1+1"}]}),
        "assistant",
    ),
    "too_long": (json.dumps({"prompt": "1+1", "completion": "2" * 99}), "row_length"),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_data_that_cannot_be_used_is_one_line_and_leaves_the_workdir_free(
    name: str,
    tiny_config_file: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text, message = CONVERSATIONS[name]
    source, workdir = tmp_path / "bad.jsonl", tmp_path / "run"
    source.write_text(text and text + "\n")
    arguments = ["train", f"--config={tiny_config_file}", f"--config.data.source={source}"]
    assert cli.main([*arguments, "--config.eval.split=train", f"--workdir={workdir}"]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert any(word in shown.err for word in message.split("|")), shown.err
    assert list(workdir.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.model=nowhere/at/all", "nowhere/at/all"),
        ("--config.mesh.data=3", "mesh: expected sizes that multiply"),
        ("--config.train.batch_size=8000", "train.batch_size: expected at most the number of rows"),
        ("--config.train.batch_size=4", "train.batch_size: expected a multiple"),
    ],
)
def test_a_run_that_cannot_start_is_one_line(
    override: str,
    message: str,
    tiny_config_file: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["train", f"--config={tiny_config_file}", override, f"--workdir={tmp_path}"]
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
