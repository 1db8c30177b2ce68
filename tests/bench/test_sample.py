"""The benchmark of the sampler times every batch size, and names the ratios of the best ones."""

import json
import pathlib

import pytest

from ranktuner_jax import cli


@pytest.mark.parametrize("torch", [False, pytest.param(True, marks=pytest.mark.parity)])
def test_every_batch_size_has_a_speed_and_the_best_ones_a_ratio(
    torch: bool, tiny_model: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = "--prompts=3 --prompt_tokens 2 9 --max_new_tokens=4 --answers=4 --answer_tokens 2 6"
    arguments = [f"--config.model={tiny_model}", *sizes.split(), "--batch_sizes", "1", "2"]
    assert cli.main(["bench", "sample", *arguments, "--repeats=2", "--json"]) == 0
    shown = capsys.readouterr()
    records = {one["case"]: one["figures"] for one in json.loads(shown.out)}
    names = ["ranktuner_jax", "transformers + torch"][: 1 + torch]
    names += ["rows refilled", "batch after batch"]
    best = {}
    for name in names:
        medians = [records.pop(f"{name}, batch {size}")["median_tokens_per_s"] for size in (1, 2)]
        assert min(medians) > 0
        best[name] = max(medians)
    pairs = [names[:2]] * torch + [names[-2:]]
    assert records == {
        f"{one} ÷ {other}, each at its best batch": {"÷": pytest.approx(best[one] / best[other])}
        for one, other in pairs
    }
    assert "2/2  rows refilled, batch 2: " in shown.err
    assert ("torch is not installed" in shown.err) != torch


def test_a_table_shows_the_speeds(
    tiny_model: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = f"--config.model={tiny_model} --prompts=0 --answers=2 --answer_tokens 1 2"
    assert cli.main(["bench", "sample", *arguments.split(), "--batch_sizes=1", "--repeats=1"]) == 0
    out = capsys.readouterr().out
    assert "batch after batch" in out
    assert "rows refilled ÷ batch after batch, each at its best batch" in out


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--repeats=0", "--repeats: expected at least 1, got 0"),
        ("--batch_sizes=0", "--batch_sizes: expected at least 1"),
        ("--prompts=-1", "--prompts: expected at least 0, got -1"),
    ],
)
def test_impossible_sizes_are_user_errors(
    flag: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "sample", flag]) == 2
    assert message in capsys.readouterr().err
