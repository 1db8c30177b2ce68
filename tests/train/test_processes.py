"""Runs of two real processes give the results of one process."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable

import numpy as np
import pytest
from safetensors.numpy import load_file

from ranktuner_jax import cli
from ranktuner_jax.train import TrainConfig, train_and_evaluate
from tests.tolerances import SAME_RUN_LOSS, SAME_RUN_PARAM
from tests.train import processes

OVERRIDES = {
    "train.steps": 20,
    "eval.every_steps": 10,
    "checkpoint.every_steps": 0,
    "optimizer.learning_rate": 2e-3,
}


def logged(workdir: pathlib.Path, name: str) -> dict[int, float]:
    """A metric by its step."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.fixture(scope="module")
def alone(
    tiny_config: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    """The workdir of one process with eight devices."""
    workdir = tmp_path_factory.mktemp("alone")
    overrides = {key.replace(".", "__"): value for key, value in OVERRIDES.items()}
    train_and_evaluate(tiny_config(**overrides), workdir)
    return workdir


# Either each process has half of the rows, and the model is evaluated before training; or each has
# all rows and half of the model, and that evaluation is in the cache since the run `alone`.
@pytest.mark.parametrize(
    ("mesh", "cached"),
    [
        pytest.param({"data": 8}, False, marks=pytest.mark.drill),
        ({"data": 1, "tensor": 8}, True),
    ],
    ids=str,
)
def test_two_processes_train_evaluate_and_export_like_one(
    mesh: dict[str, int],
    cached: bool,
    alone: pathlib.Path,
    tiny_config_file: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    overrides = OVERRIDES | {f"mesh.{axis}": size for axis, size in mesh.items()}
    arguments = [f"--config.{key}={value}" for key, value in overrides.items()]
    workdir = tmp_path / "run"
    started = processes.start(
        [f"--config={tiny_config_file}", f"--workdir={workdir}", *arguments],
        env={} if cached else {"RANKTUNER_CACHE": str(tmp_path / "cache")},
    )
    (first, first_stderr), (second, second_stderr) = processes.wait(started, 240)
    assert (first, second) == (0, 0), first_stderr + second_stderr
    assert "step 20/20" in first_stderr
    assert "step" not in second_stderr

    for name in ("train/loss", "eval/nll"):
        one, two = logged(alone, name), logged(workdir, name)
        assert one.keys() == two.keys()
        np.testing.assert_allclose(list(two.values()), list(one.values()), **SAME_RUN_LOSS)
    one, two = (json.loads((path / "result.json").read_text()) for path in (alone, workdir))
    for when in ("before", "after"):
        for key in ("questions", "correct", "finished", "tokens", "previews"):
            assert one[when][key] == two[when][key]
    params = load_file(workdir / "model" / "model.safetensors")
    for name, value in load_file(alone / "model" / "model.safetensors").items():
        largest = np.abs(value).max()
        np.testing.assert_allclose(
            params[name] / largest, value / largest, **SAME_RUN_PARAM, err_msg=name
        )
    assert (one["before"] == two["before"]) == cached  # Including its seconds.
    if not cached:
        assert len(list((tmp_path / "cache" / "evaluations").iterdir())) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes=2"], "--coordinator, --processes, --process: expected all three"),
        (["--distributed", "--process=0"], "expected all three, or --distributed alone"),
        (
            ["--coordinator=localhost:1", "--processes=2", "--process=2"],
            "--process: expected a number from 0 to 1",
        ),
        (["--distributed"], "--distributed: "),  # This process has used its devices already.
    ],
    ids=str,
)
def test_incomplete_process_flags_are_a_one_line_error(
    flags: list[str], message: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", f"--workdir={tmp_path}", *flags]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


FAILS = """
import sys, time, jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from ranktuner_jax.errors import RunError
from ranktuner_jax.train import exit_without_waiting
with exit_without_waiting():
    time.sleep(5 * int(sys.argv[2]))  # Process 1 is late.
    raise RunError(f"process {jax.process_index()} failed")
"""


def test_processes_that_fail_together_each_exit_with_their_own_message() -> None:
    # Process 0 hosts JAX's coordination service, without which JAX aborts the others.
    ends = processes.wait(processes.start_script(FAILS), timeout=60)
    said = [(code, stderr.splitlines()[-1]) for code, stderr in ends]
    assert said == [(1, f"ranktuner: process {process} failed") for process in range(2)]
