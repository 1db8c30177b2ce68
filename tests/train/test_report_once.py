"""Two real processes with errors: one that both have is printed once, others are all printed."""

import pathlib
import time

import pytest

from ranktuner_jax import cli
from tests.train import processes


def messages(ends: list[tuple[int, str]]) -> list[str]:
    """The lines that all processes printed; each exited with the code of a user error."""
    assert [code for code, _ in ends] == [2, 2], ends
    return [line for _, stderr in ends for line in stderr.splitlines()]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("--config.train.stps=3", "unknown key --config.train.stps"),  # Before they connect.
        (
            "--config.data.source=no.jsonl",
            "expected a file, got no.jsonl",
        ),  # After they have connected.
    ],
)
def test_an_error_in_both_processes_is_printed_once(
    mistake: str, message: str, tiny_config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    arguments = [f"--config={tiny_config_file}", f"--workdir={tmp_path}", mistake]
    [line] = messages(processes.wait(processes.start(arguments), 60))
    assert line.startswith("ranktuner: ")
    assert message in line


@pytest.mark.drill
def test_different_errors_of_two_processes_are_both_printed(
    tiny_config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    arguments = [f"--config={tiny_config_file}", f"--workdir={tmp_path}"]
    mistakes = ["--config.train.stps=3", "--config.train.stops=3"]
    [first, second] = messages(processes.wait(processes.start(arguments, own=mistakes), 60))
    assert "unknown key --config.train.stps" in first
    assert "unknown key --config.train.stops" in second


def test_an_error_is_printed_before_waiting_for_the_other_processes(
    tiny_config_file: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for process in ("0", "1"):
        start = time.monotonic()
        arguments = [
            "train",
            f"--config={tiny_config_file}",
            f"--workdir={tmp_path}",
            "--config.x=1",
        ]
        flags = ["--coordinator=localhost:1", "--processes=2", f"--process={process}"]
        assert cli.main([*arguments, *flags]) == 2
        assert time.monotonic() - start < 20
        shown = capsys.readouterr().err
        assert "unknown key --config.x" in shown
        assert shown.count("\n") == 1
