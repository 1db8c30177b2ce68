"""The command line: what it imports, what it answers, how it fails."""

import pathlib
import subprocess
import sys
import time

import pytest

from ranktuner_jax import cli


def test_help_lists_every_command_and_loads_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; from ranktuner_jax import cli; cli.main(['--help']); print(*sys.modules)"
    start = time.perf_counter()
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 5
    assert all(name in ran.stdout for name in cli.COMMANDS)
    assert "jax" not in ran.stdout.splitlines()[-1].split()
    assert cli.main([]) == 0
    assert "ranktuner COMMAND" in capsys.readouterr().out


def test_help_of_a_group_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "data prepare" in shown
    assert "bench loss" not in shown


def test_help_of_train_lists_keys_with_values_and_meaning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--workdir" in shown
    assert "--config.optimizer.learning_rate=1e-05" in shown
    assert "Peak learning rate." in shown


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*name.split(), "--help"]) == 0
    assert f"ranktuner {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "expected a command"),
        (["bench", "speed"], "expected a command (bench loss"),
        (["train"], "--workdir"),
        (["train", "--workdir=x", "--steps=3"], "--steps=3"),
        (["train", "--workdir=x", "--config=nothing"], "--config: expected"),
        (["train", "--workdir=x", "--config.train.stps=3"], "unknown key --config.train.stps"),
        (["train", "--workdir=x", "--config.train.steps=a"], "config.train.steps"),
        (["export", "--workdir=nowhere", "--output=y"], "--workdir: expected the config of a run"),
        (["export", "--workdir=nowhere", "--output=y", "--stp=1"], "unknown argument '--stp=1'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    argv: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
