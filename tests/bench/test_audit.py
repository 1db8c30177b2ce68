"""The benchmark of audits times both sides in every repeat, and names the ratios of the medians."""

import json
import pathlib
import statistics

import pytest

from ranktuner_jax import cli

SIZES = ["--rows=2", "--row_length=32", "--conversations=2", "--batch_size=2", "--repeats=2"]


def test_every_case_has_a_speed_and_its_ratio_to_a_likelihood_evaluation(
    tiny_model: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "audit", f"--config.model={tiny_model}", *SIZES, "--json"]
    assert cli.main(command) == 0
    result = json.loads(capsys.readouterr().out)
    speeds = {name: statistics.median(found) for name, found in result["tokens_per_second"].items()}
    assert list(speeds) == ["likelihood", "audit, scoring", "audit, whole"]
    assert min(speeds.values()) > 0
    for name in ("audit, scoring", "audit, whole"):
        assert result["ratios"][name] == pytest.approx(speeds[name] / speeds["likelihood"])


def test_sizes_below_one_are_user_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "audit", "--rows=0"]) == 2
    assert "--rows: expected at least 1, got 0" in capsys.readouterr().err
