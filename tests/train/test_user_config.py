"""A user's own config file registers a weighting, an optimizer and a task."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest

from ranktuner_jax import cli, evals, losses, train
from ranktuner_jax.errors import RunError, UserError
from ranktuner_jax.train import Run, replay, train_and_evaluate
from ranktuner_jax.train.config import load_config

REGISTER = '''
from __future__ import annotations

import dataclasses
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict
from ranktuner_jax import evals, losses, train


@dataclasses.dataclass(frozen=True)
class Focal(losses.Weighting):
    """Less for what is known already."""

    gamma: float = 2.0
    name: str | None = None

    def weights(self, stats, batch_stat):
        return (1.0 - stats.prob) ** self.gamma


def signed(config, schedule, *, scale: float = 1.0):
    rate = optax.scale_by_learning_rate(schedule)
    return optax.chain(optax.scale_by_sign(), optax.scale(scale), rate)


losses.WEIGHTINGS["focal"] = Focal
train.OPTIMIZERS["signed"] = signed
evals.TASKS["not_empty"] = lambda: lambda completion, row: completion != ""


def get_config():
    return ConfigDict({config!r})
'''

pytestmark = pytest.mark.usefixtures("registries")


REGISTRIES: tuple[dict[str, Any], ...] = (losses.WEIGHTINGS, train.OPTIMIZERS, evals.TASKS)


@pytest.fixture
def registries() -> Iterator[None]:
    """Undoes what a config file registers."""
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, names in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(names)


@pytest.fixture
def config_file(tiny_model: pathlib.Path, sums: str, tmp_path: pathlib.Path) -> pathlib.Path:
    config = {
        "model": str(tiny_model),
        "data": {"source": sums, "row_length": 64},
        "loss": {"weighting": "focal", "options": {"gamma": 1.5}},
        "optimizer": {"name": "signed", "options": {"scale": 0.5}, "learning_rate": 1e-2},
        "train": {"steps": 3, "batch_size": 8},
        "mesh": {"data": 8},
        "eval": {"task": "not_empty", "rows": 8, "examples": 8, "max_new_tokens": 4},
    }
    path = tmp_path / "mine.py"
    path.write_text(REGISTER.replace("{config!r}", repr(config)))
    return path


def forget() -> None:
    """As in a new process."""
    for registry, name in zip(REGISTRIES, ("focal", "signed", "not_empty"), strict=True):
        del registry[name]


def test_what_it_registers_works_in_train_eval_and_export(
    config_file: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "run"
    result = train_and_evaluate(load_config(str(config_file)), workdir)
    assert result.after.questions == 8
    assert (workdir / "config.py").read_text() == config_file.read_text()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert 0 < lines[1]["weight/mean"] < 1
    text = config_file.read_text()
    config_file.unlink()  # The folder has all that is needed.

    forget()
    assert cli.main(["export", f"--workdir={workdir}", f"--output={tmp_path / 'out'}"]) == 0
    forget()
    assert cli.main(["eval", f"--workdir={workdir}", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out.split("\n", 1)[1])
    assert shown["questions"] == 8
    assert shown["nll"] == pytest.approx(result.after.nll, abs=1e-5)
    forget()
    run = Run.open(workdir)
    assert repr(run.weighting) == "Focal(gamma=1.5, name=None)"
    assert run.config.optimizer.options == {"scale": 0.5}

    forget()
    config_file.write_text(text)
    arguments = [f"--config={config_file}", f"--model={workdir / 'model'}"]
    assert cli.main(["eval", *arguments]) == 0
    assert "of 8 (95 % interval" in capsys.readouterr().out


def test_options_of_ones_own_are_overridden_and_checked(
    config_file: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--config.loss.options.gamma=3.0", "--config.optimizer.options.scale=0.25"]
    config = load_config(str(config_file), more)
    assert config.loss.make_weighting().gamma == 3.0
    assert config.optimizer.options == {"scale": 0.25}
    wrong = ["train", f"--config={config_file}", f"--workdir={tmp_path / 'run'}"]
    assert cli.main([*wrong, "--config.loss.options.gama=1"]) == 2
    assert "did you mean loss.options.gamma" in capsys.readouterr().err


def test_a_copy_that_raises_is_one_line(
    config_file: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "run"
    Run.open(load_config(str(config_file)), workdir=workdir).claim()
    (workdir / "config.py").write_text("import nowhere_at_all\n")
    assert cli.main(["export", f"--workdir={workdir}", f"--output={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "config.py, the run's copy of its config file, raises ModuleNotFoundError" in said


def test_the_first_copy_stays(config_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "run"
    first = config_file.read_text()
    Run.open(load_config(str(config_file)), workdir=workdir).claim()
    config_file.write_text(first + "\n# Another comment.\n")
    Run.open(load_config(str(config_file)), workdir=workdir).claim()
    assert (workdir / "config.py").read_text() == first


def test_other_code_is_refused_and_other_values_are_compared_as_values(
    config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    workdir, first = tmp_path / "run", config_file.read_text()
    Run.open(load_config(str(config_file)), workdir=workdir).claim()
    config_file.write_text(first.replace("'steps': 3", "'log_every': 2, 'steps': 3"))
    Run.open(load_config(str(config_file)), workdir=workdir).claim()
    config_file.write_text(first.replace("1.0 - stats.prob", "1.5 - stats.prob"))
    with pytest.raises(UserError, match="whose config file has other code"):
        Run.open(load_config(str(config_file)), workdir=workdir).claim()


def test_a_shipped_config_leaves_no_copy(tmp_path: pathlib.Path) -> None:
    Run.open(load_config("smollm2_chain_sum"), workdir=tmp_path).claim()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_step_is_done_again_with_ones_own_weighting(
    config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = load_config(str(config_file), ["--config.optimizer.learning_rate=1e38"])
    with pytest.raises(RunError, match=r"^step 2: "):
        train_and_evaluate(config, tmp_path / "run")
    forget()
    assert replay(tmp_path / "run", 2)["nonfinite"] == 1
