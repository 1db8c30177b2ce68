"""report.html of a training run."""

import json
import pathlib
import re
from typing import Any

import pytest
from playwright.sync_api import Browser

from ranktuner_jax.diagnostics import report
from ranktuner_jax.errors import UserError
from ranktuner_jax.train.commands.train import _write_report
from tests.diagnostics.report.audits import HOSTILE
from tests.diagnostics.report.test_browser import CONTRAST, opened

CONFIG = {
    "model": "smollm2-135m",
    "data": {"source": "rows.jsonl"},
    "loss": {"weighting": "ranktuner"},
    "optimizer": {"clip_norm": 1.0},
}


def evaluation(nll: float, accuracy: float | None) -> dict[str, float]:
    metrics = {"eval/nll": nll, "eval/token_accuracy": 0.5}
    if accuracy is not None:
        metrics |= {
            "eval/accuracy": accuracy,
            "eval/accuracy_low": accuracy - 0.05,
            "eval/accuracy_high": accuracy + 0.05,
        }
    return metrics


def step(number: int) -> dict[str, float | None]:
    return {
        "train/nll": 3.001 - 0.01 * number,
        "train/loss": 1.0004 - 0.005 * number,
        "train/grad_norm": 2.0 if number <= 30 else 0.5,
        "train/noise_region_bound": 0.125,
        "train/skipped_steps": 0.0,
        "weight/mean": 0.25,
        "weight/p05": 0.0,
        "weight/p50": 0.5,
        "weight/p95": 1.5,
        "weight/clipped": 0.0,
        "weight/effective_fraction": 0.375,
    }


def write_run(
    folder: pathlib.Path, steps: int = 100, accuracy: tuple[float, float] | None = (0.2, 0.6)
) -> pathlib.Path:
    """A workdir as a finished run leaves it."""
    before, after = accuracy or (None, None)
    lines: list[dict[str, Any]] = [{"step": 0, **evaluation(3.0, before)}]
    lines += [{"step": i, **step(i)} for i in range(1, steps + 1)]
    lines += [{"step": steps, **evaluation(2.0, after)}]
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    previews = [{"question": "1+1", "expected": "2", "completion": HOSTILE, "correct": False}]
    result = {"before": {"previews": previews}, "after": {"previews": previews}, "stopped": ""}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "samples").mkdir(exist_ok=True)
    for i in (50, steps):
        sample = {"step": i, "prompt": "ask", "reference": "ref", "completion": f"at\u2028{i}"}
        text = json.dumps(sample, ensure_ascii=False)
        (folder / "samples" / f"step_{i:06}.jsonl").write_text(text + "\n", encoding="utf-8")
    return folder


def words(path: pathlib.Path) -> str:
    text = path.read_text("utf-8").replace("\u00a0", " ")
    return re.sub(r"<(script|style).*?</\1>", "", text, flags=re.DOTALL)


def test_the_words_say_what_the_run_did(tmp_path: pathlib.Path) -> None:
    text = words(pathlib.Path(report.write_training_report(write_run(tmp_path))))
    # Means of ten steps: 3.001 − 0.01·5.5 and 3.001 − 0.01·95.5.
    assert "In nats, the plain nll fell from 2.95 to 2.05" in text
    assert "the loss, which is weighted, fell from 0.973 to 0.523" in text
    assert "The mean weight stayed at 0.25" in text
    assert "at the end from 0 to 1.5" in text
    assert "In the Noise Region, by s(H): 12 % of the tokens" in text
    assert "No weight was cut off by a clip" in text
    assert "clipped to a norm of 1 (the orange line) in 30 % of the 100 recorded steps" in text
    assert "Answers right: 20 % before, 60 % after; the 95 % intervals do not overlap." in text
    assert "<td>20 % (15 % to 25 %)</td><td>60 % (55 % to 65 %)</td>" in text
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in text
    assert "at\u2028100" in text
    assert "at\u202850" not in text


def test_intervals_that_overlap_are_called_chance(tmp_path: pathlib.Path) -> None:
    run = write_run(tmp_path, accuracy=(0.5, 0.55))
    assert "overlap: chance alone could explain it" in words(
        pathlib.Path(report.write_training_report(run))
    )


def test_an_unfinished_run_with_one_step_has_a_page(tmp_path: pathlib.Path) -> None:
    write_run(tmp_path, steps=1, accuracy=None)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()[:2]
    # A step whose loss was not finite leaves null.
    lines.append(json.dumps({"step": 2, **step(2), "train/nll": None, "train/loss": None}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "result.json").unlink()
    text = words(pathlib.Path(report.write_training_report(tmp_path)))
    assert "rows.jsonl, 1 step." in text
    assert "there is one evaluation so far" in text


def test_a_long_run_is_drawn_in_means(tmp_path: pathlib.Path) -> None:
    path = pathlib.Path(report.write_training_report(write_run(tmp_path, steps=2000)))
    assert "each point is the mean of about 5" in words(path)
    spec = re.search(r'class="spec">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)
    assert spec is not None
    [rows] = json.loads(spec[1])["datasets"].values()
    assert len(rows) == 2 * 400
    assert rows[0]["value"] == pytest.approx(3.001 - 0.01 * 3)  # Of steps 1 to 5.


def test_the_page_is_drawn_fits_and_has_contrast(browser: Browser, tmp_path: pathlib.Path) -> None:
    path = pathlib.Path(report.write_training_report(write_run(tmp_path)))
    for width, scheme in ((390, "light"), (1400, "dark")):
        with opened(browser, path, width, scheme) as shown:
            assert shown.locator("figure svg").count() == 6
            assert shown.evaluate("document.documentElement.scrollWidth") == width
            lowest = shown.evaluate(CONTRAST)
            assert lowest[0][0] >= 4.5, lowest


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_folder_without_a_run_is_refused(tmp_path: pathlib.Path, name: str) -> None:
    write_run(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"expected the folder of a run, got one without {name}"):
        report.write_training_report(tmp_path)


def test_a_run_without_steps_is_refused(tmp_path: pathlib.Path) -> None:
    write_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/nll": 3.0}\n')
    with pytest.raises(UserError, match="expected the metrics of at least one step, got none"):
        report.write_training_report(tmp_path)


def test_the_train_command_names_the_page_and_survives_its_failure(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_report(str(write_run(tmp_path / "run")))
    assert capsys.readouterr().out == f"report:      {tmp_path}/run/report.html\n"
    _write_report(str(tmp_path))
    assert capsys.readouterr().err.startswith("report.html was not written: UserError: ")
