"""`ranktuner bench gpu`: its parts on the CPU with small shapes, and what becomes of a folder."""

import importlib.util
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest

from ranktuner_jax import cli
from ranktuner_jax.bench.gpu import attention, loss_speed, loss_values, sampling, step, training
from ranktuner_jax.bench.gpu.parts import PARTS, Part
from tests import oracles

FINE, WRONG = Part("tests.bench.gpu_part"), Part("tests.bench.gpu_wrong_part")
COMMAND = """
import sys
from ranktuner_jax import cli
from ranktuner_jax.bench.gpu.parts import PARTS, Part
PARTS["fine"] = Part("tests.bench.gpu_part")
sys.exit(cli.main(["bench", "gpu", *sys.argv[1:]]))
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Callable[..., int]:
    """Runs the command on given parts, with small shapes."""

    def run(*flags: str, **parts: Part) -> int:
        for name, part in parts.items():
            monkeypatch.setitem(PARTS, name, part)
        chosen = ("--parts", *parts)
        return cli.main(["bench", "gpu", f"--output={tmp_path}", "--small", *flags, *chosen])

    return run


def test_a_part_that_fails_says_so_in_a_line_and_the_others_go_on(
    bench: Callable[..., int], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = Part("tests.bench.gpu_part", seconds=0.0)
    assert bench(wrong=WRONG, missing=Part("tests.no_such_part"), slow=slow, fine=FINE) == 1
    shown = capsys.readouterr()
    failures = [line for line in shown.err.splitlines() if line.startswith("ranktuner bench gpu: ")]
    assert len(failures) == 3
    assert "wrong: sums: error nan, expected at most 1" in failures[0]
    assert "missing: code 1: ModuleNotFoundError" in failures[1]
    assert "slow: stopped after 0 s" in failures[2]
    records = json.loads((tmp_path / "results.json").read_text())
    assert [record["case"] for record in records] == ["sums", "products", "one", "two"]
    assert {record["machine"]["devices"] for record in records} == {8}
    assert (tmp_path / "tables.md").read_text() == shown.out
    assert "500.0 ms" in shown.out


def test_a_folder_of_another_machine_is_refused(
    bench: Callable[..., int], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = {"name": "NVIDIA H100", "devices": 8, "jax": jax.__version__}
    (tmp_path / "about.json").write_text(json.dumps({"small": True, "machine": machine}))
    assert bench(fine=FINE) == 2
    message = capsys.readouterr().err
    assert f"{tmp_path} holds results with another name: expected NVIDIA H100, got " in message


@pytest.mark.parametrize(("platforms", "reason"), [("cpu", ""), ("tpus", " (RuntimeError: ")])
def test_without_a_gpu_it_says_so_in_a_line(
    platforms: str,
    reason: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert cli.main(["bench", "gpu", f"--output={tmp_path}/new"]) == 2
    message = capsys.readouterr().err
    start = f"ranktuner: bench gpu: expected a GPU that JAX finds, got none{reason}"
    assert message.startswith(start)
    assert message.count("\n") == 1


def test_a_killed_run_goes_on_at_the_part_that_it_was_in(
    bench: Callable[..., int], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag, partial = tmp_path / "go", tmp_path / "fine.partial.jsonl"
    (tmp_path / "wrong.jsonl").write_text("")  # As if it had been measured.
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, f"--output={tmp_path}", "--small", "--parts", "fine"],
        env={**os.environ, "WAIT_FOR": str(flag), "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        until = time.monotonic() + 60
        while not (partial.exists() and partial.read_text()) and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    flag.touch()
    assert len(partial.read_text().splitlines()) == 1
    assert bench(wrong=WRONG, fine=FINE) == 0
    assert "wrong: measured before" in capsys.readouterr().err
    assert not partial.exists()
    assert len((tmp_path / "fine.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("scale", ["bound", "exact"])
def test_the_definition_is_that_of_the_tests(scale: str, rng: np.random.Generator) -> None:
    hidden, unembed = 3 * rng.standard_normal((9, 4)), rng.standard_normal((31, 4))
    labels, mask = rng.integers(0, 31, 9), rng.random(9) < 0.7
    right = oracles.weighted_nll(hidden @ unembed.T, labels, mask, options={"scale": scale})
    d_logits = right.d_logits / right.denom
    wanted = (right.total / right.denom, d_logits @ unembed, d_logits.T @ hidden)
    found = loss_values.definition(scale, hidden, unembed, labels, mask)
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-12, atol=1e-15)


def test_small_parts_are_right_and_have_figures() -> None:
    cases = [
        *list(loss_values.cases(True))[:2],
        *attention.cases(True),
        *list(loss_speed.cases(True))[3:4],
        *sampling.cases(True),
        *list(step.cases(True))[:1],
    ]
    assert len(cases) == 2 + 2 + 1 + 1 + 1
    for case in cases:
        record = case.run()
        assert not record.failed, record
        assert all(math.isfinite(x) for x in record.figures.values() if x is not None), record


@pytest.mark.drill  # Every part, in a process of its own: minutes of compilation.
def test_all_parts_run_with_small_shapes(tmp_path: pathlib.Path) -> None:
    assert cli.main(["bench", "gpu", f"--output={tmp_path}", "--small", "--minutes=30"]) == 0
    empty = {name for name in PARTS if not (tmp_path / f"{name}.jsonl").read_text()}
    assert empty == (set() if importlib.util.find_spec("torch") else {"torch_speed"})


@pytest.mark.parity
def test_the_losses_of_torch_are_measured(
    bench: Callable[..., int], tmp_path: pathlib.Path
) -> None:
    assert bench(torch_speed=PARTS["torch_speed"]) == 0
    assert (tmp_path / "torch_speed.jsonl").read_text()


def test_a_wrong_loss_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_values.ALLOWED, ("bound", "float32"), (1e-12, 1.0))
    case = next(loss_values.cases(True))
    assert case.run().failed.startswith("loss error ")


def test_a_quantised_run_trains() -> None:
    losses = training.losses("QLoRA, int8")
    assert losses[-1] < losses[0]
