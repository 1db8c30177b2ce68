"""The benchmark of audits times both sides in every repeat, and names the ratios of the medians."""

import json
import pathlib

import pytest

from ranktuner_jax import cli

SIZES = ["--rows=2", "--row_length=32", "--conversations=2", "--batch_size=2", "--repeats=2"]


def test_every_case_has_a_speed_and_its_ratio_to_a_likelihood_evaluation(
    tiny_model: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "audit", f"--config.model={tiny_model}", *SIZES, "--json"]
    assert cli.main(command) == 0
    figures = {one["case"]: one["figures"] for one in json.loads(capsys.readouterr().out)}
    speeds = {name: found["tokens_per_s"] for name, found in figures.items()}
    assert list(speeds) == ["likelihood", "audit, scoring", "audit, whole"]
    assert min(speeds.values()) > 0
    for name, found in figures.items():
        assert found["÷ likelihood"] == pytest.approx(speeds[name] / speeds["likelihood"])


def test_sizes_below_one_are_user_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "audit", "--rows=0"]) == 2
    assert "--rows: expected at least 1, got 0" in capsys.readouterr().err
