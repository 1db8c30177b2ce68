"""`ranktuner eval`, from the command line."""

import json
import pathlib

import pytest

from ranktuner_jax import cli
from tests.tolerances import BF16_RUN_LOSS


@pytest.fixture(autouse=True)
def own_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("RANKTUNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_eval_prints_what_it_found_and_remembers_it(
    tiny_config_file: pathlib.Path,
    tiny_model: pathlib.Path,
    own_cache: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["eval", f"--config={tiny_config_file}", f"--model={tiny_model}"]
    assert cli.main(command) == 0
    first = capsys.readouterr().out
    assert "nats a token" in first
    assert "of 8 (95 % interval" in first
    assert first.count("question") == 3
    assert len(list((own_cache / "evaluations").iterdir())) == 1

    assert cli.main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert f"{result['nll']:.4f} nats" in first
    assert len(list((own_cache / "evaluations").iterdir())) == 1


def test_eval_without_a_task_asks_nothing(
    tiny_config_file: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", f"--config={tiny_config_file}", "--config.eval.task="]) == 0
    shown = capsys.readouterr().out
    assert "token accuracy" in shown
    assert "answers right" not in shown


def test_eval_names_a_model_that_is_not_there(
    tiny_config_file: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", f"--config={tiny_config_file}", "--model=nowhere"]) == 2
    assert "model 'nowhere': no such folder" in capsys.readouterr().err


def test_eval_computes_in_the_type_of_the_training(
    tiny_config_file: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for dtype in ("float32", "bfloat16"):
        arguments = [f"--config.train.compute_dtype={dtype}", "--config.eval.task=", "--json"]
        assert cli.main(["eval", f"--config={tiny_config_file}", *arguments]) == 0
        found.append(json.loads(capsys.readouterr().out)["nll"])
    wide, narrow = found
    assert wide != narrow
    assert narrow == pytest.approx(wide, rel=BF16_RUN_LOSS["rtol"])
