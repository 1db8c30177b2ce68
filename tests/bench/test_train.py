"""The benchmark of the step compares steps that compute the same, and names every ratio."""

import pathlib
import re

import pytest

from ranktuner_jax import cli
from ranktuner_jax.bench.train import Case, ratio


@pytest.mark.parametrize("torch", [False, pytest.param(True, marks=pytest.mark.parity)])
def test_all_cases_have_a_row_and_the_same_loss(
    torch: bool,
    tiny_config_file: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    arguments = [f"--config={tiny_config_file}", "--repeats=1", "--compute_dtype", "float32"]
    assert cli.main(["bench", "train", *arguments]) == 0
    shown = capsys.readouterr()
    names = ["RankTuner, fused", "RankTuner, dense"]
    if torch:
        names += ["torch, logits of all positions", "torch, hidden states filtered"]
    lines = shown.out.splitlines()
    losses = {
        float(number)
        for line in lines
        if any(f"│ {name} " in line for name in names)
        for number in re.findall(r"│ +(\d\.\d{4}) │", line)
    }
    assert max(losses) - min(losses) < 2e-4, losses
    [plain] = [line for line in lines if "│ SFT, the nll alone " in line]
    [plain_loss] = re.findall(r"│ +(\d\.\d{4}) │", plain)
    assert float(plain_loss) not in losses
    for other in ["SFT, the nll alone", *names[1:]]:
        assert any(f"RankTuner, fused ÷ {other} " in line for line in lines), other
    assert any("waiting for input ÷ all" in line for line in lines)
    assert "1/1  RankTuner, fused, float32" in shown.err


def test_a_ratio_is_the_median_of_those_within_a_repeat() -> None:
    ours, other = (Case("", "", lambda: 0.0) for _ in range(2))
    ours.seconds, other.seconds = [1.0, 20.0, 3.0], [2.0, 10.0, 3.0]
    assert ratio(ours, other) == 1.0


def test_a_case_is_warmed_up_before_it_is_timed() -> None:
    steps = iter([7.0, 5.0])
    case = Case("", "", lambda: next(steps))
    case.time()
    assert case.loss == 5.0
    assert len(case.seconds) == 1


def test_no_repeats_are_the_users_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "train", "--repeats=0"]) == 2
    assert "--repeats: expected at least 1" in capsys.readouterr().err
