"""`ranktuner eval`, from the command line."""

import json
import pathlib

import pytest

from ranktuner_jax import cli, evals
from tests.tolerances import BF16_RUN_LOSS


@pytest.fixture(autouse=True)
def own_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("RANKTUNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_eval_prints_its_result_and_saves_it(
    tiny_config_file: pathlib.Path,
    tiny_model: pathlib.Path,
    own_cache: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["eval", f"--config={tiny_config_file}", f"--model={tiny_model}"]
    assert cli.main(command) == 0
    first = capsys.readouterr().out
    assert "nats per token" in first
    assert "of 8 (95 % interval" in first
    assert first.count("question") == 3
    assert len(list((own_cache / "evaluations").iterdir())) == 1

    assert cli.main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert f"{result['nll']:.4f} nats" in first
    assert len(list((own_cache / "evaluations").iterdir())) == 1


def test_eval_without_a_task_generates_no_answers(
    tiny_config_file: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", f"--config={tiny_config_file}", "--config.eval.task="]) == 0
    shown = capsys.readouterr().out
    assert "token accuracy" in shown
    assert "answers right" not in shown


def test_eval_grades_with_a_scorer_that_the_config_file_registers(
    tiny_config_file: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.py"
    try:
        for right, share in ((True, "100.0% of 8"), (False, "0.0% of 8")):
            path.write_text(
                f"from ranktuner_jax import evals\n{tiny_config_file.read_text()}\n"
                f'evals.TASKS["mine"] = lambda: lambda completion, record: {right}\n'
            )
            assert cli.main(["eval", f"--config={path}", "--config.eval.task=mine"]) == 0
            assert f"answers right   {share}" in capsys.readouterr().out
    finally:
        evals.TASKS.pop("mine", None)


def test_eval_reports_a_missing_model(
    tiny_config_file: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", f"--config={tiny_config_file}", "--model=nowhere"]) == 2
    assert "model 'nowhere': no such folder" in capsys.readouterr().err


def test_eval_uses_the_compute_dtype_of_training(
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
