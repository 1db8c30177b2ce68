"""The benchmark of the step compares steps that compute the same, and names every ratio."""

import json
import pathlib
from collections.abc import Callable

import pytest

from ranktuner_jax import cli
from ranktuner_jax.bench.train import Case, open_runs, ratio
from ranktuner_jax.train import TrainConfig


@pytest.mark.parametrize("torch", [False, pytest.param(True, marks=pytest.mark.parity)])
def test_all_cases_have_a_row_and_the_same_loss(
    torch: bool,
    tiny_config_file: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [f"--config={tiny_config_file}", "--repeats=1", "--compute_dtype", "float32"]
    assert cli.main(["bench", "train", *arguments, "--json"]) == 0
    shown = capsys.readouterr()
    names = ["RankTuner, fused", "RankTuner, dense"]
    if torch:
        names += ["torch, logits of all positions", "torch, hidden states filtered"]
    records = {one["case"]: one["figures"] for one in json.loads(shown.out)}
    assert sorted(records) == sorted([*names, "SFT, NLL only"])
    losses = [records[name]["loss"] for name in names]
    assert max(losses) - min(losses) < 2e-4, losses
    assert abs(records["SFT, NLL only"]["loss"] - losses[0]) > 2e-4
    for found in records.values():
        fused = records["RankTuner, fused"]["median_s"]
        assert found["fused ÷ this"] == pytest.approx(fused / found["median_s"])
    assert 0 < records["RankTuner, fused"]["waiting for input_share"] < 1
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


def test_runs_of_both_types_share_their_rows(tiny_config: Callable[..., TrainConfig]) -> None:
    runs = open_runs(tiny_config(train__epochs=2.0), ["bfloat16", "float32"])
    assert [opened.config.train.compute_dtype for opened in runs.values()] == list(runs)
    assert runs["bfloat16"].rows is runs["float32"].rows


def test_zero_repeats_is_a_user_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "train", "--repeats=0"]) == 2
    assert "--repeats: expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag", ["train --model=m", "train --batch_size=2", "train --length=8", "model --model=m"]
)
def test_what_is_a_key_of_the_config_has_no_flag_of_its_own(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *flag.split()]) == 2
    assert "expected --config.key=value" in capsys.readouterr().err
