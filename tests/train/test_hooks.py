"""The hooks that ship, from Python and from a config."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from ranktuner_jax import models
from ranktuner_jax.errors import UserError
from ranktuner_jax.train import (
    CheckpointConfig,
    Hook,
    KeepBest,
    Profile,
    SampleCompletions,
    StopEarly,
    Stopped,
    TrainConfig,
    Trainer,
    train_and_evaluate,
)
from tests.train.happenings import BeforeStep, sigterm
from tests.train.test_trainer import make_batches, make_trainer

MakeConfig = Callable[..., TrainConfig]


class Log(Hook):
    """Logs given values of a metric, one a call."""

    every = 1

    def __init__(self, values: Sequence[float]) -> None:
        super().__init__()
        self.values = values

    def __call__(self, trainer: Trainer) -> None:
        trainer.log({"mine": self.values[trainer.steps_done - 1]})


def fit(values: Sequence[float], hook: Hook, workdir: pathlib.Path, *more: Hook) -> Trainer:
    trainer = make_trainer(
        hooks=[Log(values), hook, *more],
        workdir=workdir,
        checkpoint=CheckpointConfig(every_steps=1),
    )
    trainer.resume()
    trainer.fit(make_batches(), steps=6)
    return trainer


def remember(weights: dict[int, np.ndarray]) -> Hook:
    def look(trainer: Trainer) -> None:
        weights[trainer.steps_done] = np.asarray(trainer.model.unembed)

    return Hook(look, every=1)


NAN = float("nan")


@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [
        ("min", [3.0, 1.0, 2.0, NAN, 1.0, 5.0], 2),
        ("max", [3.0, 1.0, 2.0, NAN, 1.0, 5.0], 6),
        ("min", [NAN, 4.0, 3.0, 3.0, 9.0, 2.0], 6),
        ("max", [-3.0, -1.0, -1.0, -2.0, -5.0, -1.0], 2),
    ],
)
def test_the_best_model_is_kept(
    mode: str, values: list[float], best: int, tmp_path: pathlib.Path
) -> None:
    weights: dict[int, np.ndarray] = {}
    hook = KeepBest("mine", mode=mode, every=1)  # type: ignore[arg-type]
    fit(values, hook, tmp_path, remember(weights))
    kept = models.load_pretrained(tmp_path / "best")
    np.testing.assert_array_equal(np.asarray(kept.unembed), weights[best])
    found = json.loads((tmp_path / "best" / "best.json").read_text())
    assert found == {"metric": "mine", "value": values[best - 1], "step": best}
    assert [path.name for path in tmp_path.glob("best*")] == ["best"]


def test_an_interrupted_run_remembers_its_best(tmp_path: pathlib.Path) -> None:
    values = [3.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    with pytest.raises(Stopped):
        fit(values, KeepBest("mine", mode="min", every=1), tmp_path, BeforeStep(4, sigterm))
    before = (tmp_path / "best" / "model.safetensors").stat().st_mtime_ns
    again = KeepBest("mine", mode="min", every=1)
    fit(values, again, tmp_path)
    assert (again.best, again.best_step) == (1.0, 2)
    assert (tmp_path / "best" / "model.safetensors").stat().st_mtime_ns == before


def test_a_model_that_cannot_be_saved_leaves_the_best_one_before(tmp_path: pathlib.Path) -> None:
    def save(model: models.Decoder, folder: object) -> None:
        if (tmp_path / "best").exists():
            raise OSError("no space left")
        models.save_pretrained(model, folder)  # type: ignore[arg-type]

    hook = KeepBest("mine", mode="min", every=1, save=save)
    with pytest.raises(OSError, match="no space left"):
        fit([3.0, 1.0], hook, tmp_path)
    models.load_pretrained(tmp_path / "best")
    assert json.loads((tmp_path / "best" / "best.json").read_text())["step"] == 1


@pytest.mark.parametrize(
    ("values", "last"),
    [
        ([3.0, 2.0, 2.0, 2.5, 1.0, 1.0], 4),  # Steps 3 and 4 are no better than 2.
        ([3.0, 2.0, 2.5, 1.0, 1.5, 0.5], 6),
        ([NAN, NAN, 1.0, 1.0, 1.0, 1.0], 2),
    ],
)
def test_training_ends_without_improvement(
    values: list[float], last: int, tmp_path: pathlib.Path
) -> None:
    trainer = fit(values, StopEarly("mine", mode="min", patience=2), tmp_path)
    assert trainer.steps_done == last
    if last < 6:
        # It was the last step: it is saved, and a run that resumes does not go beyond it.
        assert (tmp_path / "checkpoints" / str(last)).exists()
        again = make_trainer(
            hooks=[Log(values), StopEarly("mine", mode="min", patience=2)], workdir=tmp_path
        )
        assert again.resume() == last
        result = again.fit(make_batches(), steps=6)
        assert result.steps == last
        assert "mine" in result.stopped


def test_the_step_after_which_training_ends_is_saved(tmp_path: pathlib.Path) -> None:
    early = StopEarly("mine", mode="min", patience=1)
    trainer = make_trainer(hooks=[Log([3.0, 4.0, 1.0]), early], workdir=tmp_path)
    assert trainer.fit(make_batches(), steps=6).steps == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_a_finished_run_that_is_resumed_knows_its_metrics(tmp_path: pathlib.Path) -> None:
    def make() -> Trainer:
        best = KeepBest("train/loss", mode="min", folder=tmp_path / "best")
        return make_trainer(hooks=[best], workdir=tmp_path / "run")

    first = make()
    first.fit(make_batches(), steps=2)
    again = make()
    again.resume()
    assert again.fit(make_batches(), steps=2).metrics == first.metrics


class Count(Hook):
    """Remembers the steps after which it was called."""

    def __init__(self, every: int) -> None:
        super().__init__(every=every)
        self.steps: list[int] = []

    def __call__(self, trainer: Trainer) -> None:
        self.steps.append(trainer.steps_done)

    def get_state(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.steps = list(state["steps"])


def test_hooks_of_one_class_have_states_of_their_own(tmp_path: pathlib.Path) -> None:
    with pytest.raises(Stopped):
        fit([1.0] * 6, Count(2), tmp_path, Count(3), BeforeStep(4, sigterm))
    two, three = Count(2), Count(3)
    fit([1.0] * 6, two, tmp_path, three)
    assert (two.steps, three.steps) == ([2, 4, 6], [3, 6])


def test_no_hook_is_called_twice_after_the_step_that_ends_training(tmp_path: pathlib.Path) -> None:
    count = Count(2)
    fit([3.0, 4.0, 5.0, 6.0], StopEarly("mine", mode="min", patience=3), tmp_path, count)
    assert count.steps == [2, 4]


def test_a_metric_that_nobody_logs_is_named() -> None:
    trainer = make_trainer(hooks=[StopEarly("eval/nll", mode="min")])
    with pytest.raises(
        ValueError, match=r"StopEarly: no value of 'eval/nll' at step 1; available are .*train/loss"
    ):
        trainer.fit(make_batches(), steps=3)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="mode must be 'min' or 'max'"):
        KeepBest("mine", mode="less")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="patience must be at least 1"):
        StopEarly("mine", mode="min", patience=0)
    with pytest.raises(ValueError, match="every must be 0 or more"):
        Hook(every=-1)
    with pytest.raises(ValueError, match="first and last must be steps, in order"):
        Profile(3, 2)
    for hook in (KeepBest("mine", mode="min"), Profile(1, 2), SampleCompletions(None, [])):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="workdir"):
            make_trainer(hooks=[hook]).fit(make_batches(), steps=1)


def test_a_value_of_an_earlier_step_is_not_compared() -> None:
    early = Hook(lambda trainer: trainer.log({"mine": 1.0}), every=2)
    trainer = make_trainer(hooks=[early, StopEarly("mine", mode="min", every=3)])
    with pytest.raises(ValueError, match=r"StopEarly: no value of 'mine' at step 3"):
        trainer.fit(make_batches(), steps=6)


def test_hooks_see_every_step_however_seldom_metrics_are_written() -> None:
    losses: dict[int, float] = {}

    def look(trainer: Trainer) -> None:
        losses[trainer.steps_done] = trainer.metrics["train/loss"]
        assert trainer.metric_steps["train/loss"] == trainer.steps_done

    make_trainer(hooks=[Hook(look, every=2)], log_every=100).fit(make_batches(), steps=5)
    assert list(losses) == [2, 4, 5]
    assert len(set(losses.values())) == 3


def test_hooks_that_a_signal_prevented_are_called_by_the_resumed_run(
    tmp_path: pathlib.Path,
) -> None:
    values = [3.0, 2.0, 2.0, 2.5, 1.0, 1.0]
    early = StopEarly("mine", mode="min", patience=2)
    with pytest.raises(Stopped):
        fit(values, early, tmp_path, BeforeStep(4, sigterm))
    trainer = fit(values, StopEarly("mine", mode="min", patience=2), tmp_path)
    assert trainer.steps_done == 4  # As without the signal.


def test_a_longer_run_keeps_the_best_of_the_last_step(tmp_path: pathlib.Path) -> None:
    values = [3.0, 2.5, 1.0, 2.0, 2.0, 2.0]
    for steps in (3, 6):  # The third one is saved at the end, after the checkpoint.
        trainer = make_trainer(
            hooks=[Log(values), KeepBest("mine", mode="min", every=2)], workdir=tmp_path
        )
        trainer.resume()
        trainer.fit(make_batches(), steps=steps)
    assert json.loads((tmp_path / "best" / "best.json").read_text())["step"] == 3


def test_a_folder_that_holds_something_else_is_not_replaced(tmp_path: pathlib.Path) -> None:
    (tmp_path / "mine").mkdir()
    hook = KeepBest("mine", mode="min", folder=tmp_path / "mine")
    with pytest.raises(UserError, match=r"got .*mine without best\.json; move it away"):
        make_trainer(hooks=[hook]).fit(make_batches(), steps=1)


def test_a_hook_of_ones_own_compares_the_evaluation_of_its_step(
    tiny_config: MakeConfig, tmp_path: pathlib.Path
) -> None:
    best = KeepBest("eval/nll", mode="min", every=2)
    result = train_and_evaluate(tiny_config(eval__every_steps=2), tmp_path, hooks=[best])
    assert (best.best, best.best_step) == (result.after.nll, 6)


def test_a_config_names_hooks(tiny_config: MakeConfig, tmp_path: pathlib.Path) -> None:
    config = tiny_config(
        eval__every_steps=2,
        hooks__keep_best="eval/nll",
        hooks__stop_early="eval/accuracy",
        hooks__patience=1,
        hooks__samples=2,
    )
    result = train_and_evaluate(config, tmp_path)
    # Nothing is answered rightly so early: the first evaluation is the best there is.
    assert result.steps == 4
    assert result.stopped == "eval/accuracy has not improved since step 2 (0.0000)"
    samples = [json.loads(line) for line in (tmp_path / "samples/step_000004.jsonl").open()]
    assert len(samples) == 2
    assert samples[0].keys() == {"step", "prompt", "reference", "completion"}
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "step_000002.jsonl",
        "step_000004.jsonl",
    ]
    best = json.loads((tmp_path / "best" / "best.json").read_text())
    assert best["step"] == 4
    assert best["value"] == result.after.nll
    # With its tokenizer, as the model at the end has.
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {path.name for path in (tmp_path / "best").iterdir()} == names | {"best.json"}
    assert train_and_evaluate(config, tmp_path) == result


def test_hooks_of_a_config_are_checked(tiny_config: MakeConfig, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"hooks\.stop_early: expected evaluations during training"):
        tiny_config(hooks__stop_early="eval/nll")
    config = tiny_config(hooks__keep_best="eval/accuracy", eval__every_steps=2, eval__task="")
    with pytest.raises(UserError, match=r"hooks\.keep_best=eval/accuracy: expected questions"):
        train_and_evaluate(config, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    with pytest.raises(
        UserError, match=r"hooks.keep_best: expected one of eval/nll.*mean eval/nll"
    ):
        tiny_config(hooks__keep_best="eval/nl")
    with pytest.raises(UserError, match=r"hooks.patience: expected at least 1"):
        tiny_config(hooks__patience=0)
