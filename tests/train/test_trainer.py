"""A trainer from Python: objects in, results out, and nothing lost on the way."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ranktuner_jax import data, losses, models
from ranktuner_jax.errors import RunError, UserError
from ranktuner_jax.train import (
    CheckpointConfig,
    Hook,
    MeshConfig,
    Run,
    Stopped,
    TrainConfig,
    Trainer,
    make_mesh,
    train_and_evaluate,
)
from tests.tolerances import F32
from tests.train.happenings import BeforeStep, sigterm

MakeConfig = Callable[..., TrainConfig]

MODEL = models.DecoderConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
)
STEPS = 6


def make_model() -> models.Decoder:
    return models.Decoder(MODEL, rngs=nnx.Rngs(0))


def make_batches(count: int = STEPS) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 31, (count, 8, 13))
    return [
        {"tokens": rows[:, :-1], "labels": rows[:, 1:], "mask": rng.random((8, 12)) < 0.5}
        for rows in tokens
    ]


def make_trainer(**options: Any) -> Trainer:
    options = {"tx": optax.adam(1e-2), "weighting": losses.RankTuner("one")} | options
    return Trainer(make_model(), **options)


def params(trainer: Trainer) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(trainer.model, nnx.Param))]


def assert_same_bits(one: Trainer, other: Trainer) -> None:
    for a, b in zip(params(one), params(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def whole() -> Trainer:
    """A trainer that nothing happened to."""
    trainer = make_trainer()
    trainer.fit(make_batches(), steps=STEPS)
    return trainer


def test_fit_returns_what_it_came_to_and_trains_the_model_in_place(whole: Trainer) -> None:
    model = make_model()
    before = np.asarray(model.unembed)
    trainer = Trainer(model, tx=optax.adam(1e-2), weighting=losses.RankTuner("one"))
    result = trainer.fit(make_batches(), steps=STEPS)
    assert (result.steps, result.stopped) == (STEPS, "")
    assert {"train/loss", "train/nll", "weight/mean"} <= result.metrics.keys()
    assert trainer.model is model
    assert np.abs(np.asarray(model.unembed) - before).max() > 1e-3
    assert_same_bits(trainer, whole)


def test_without_a_workdir_nothing_is_written(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_trainer().fit(make_batches(), steps=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_a_mesh_divides_a_model_that_was_made_without_one(sizes: dict[str, int]) -> None:
    mesh = make_mesh(MeshConfig(**sizes))
    accumulation = 8 // (mesh.shape["data"] * mesh.shape["fsdp"])
    one = make_trainer(tx=optax.sgd(0.1))
    trainer = make_trainer(tx=optax.sgd(0.1), mesh=mesh, accumulation=accumulation)
    for each in (one, trainer):
        each.fit(make_batches(), steps=STEPS)
    assert trainer.model.mesh is mesh
    for a, b in zip(params(trainer), params(one), strict=True):
        np.testing.assert_allclose(a, b, **F32)


def test_a_step_of_ones_own_loop_is_the_step_of_fit(whole: Trainer) -> None:
    trainer = make_trainer()
    for batch in make_batches():
        metrics = trainer.step(batch)
        assert trainer.model.unembed.shape == (31, 16)  # It can be used at any moment.
    assert_same_bits(trainer, whole)
    assert float(metrics["loss"]) == whole.metrics["train/loss"]
    assert trainer.steps_done == STEPS


def test_fit_goes_further_where_it_was(whole: Trainer) -> None:
    trainer, batches = make_trainer(), iter(make_batches())
    assert trainer.fit(batches, steps=2).steps == 2
    assert trainer.fit(batches, steps=STEPS).steps == STEPS
    assert_same_bits(trainer, whole)
    # Batches from the beginning are passed over as far as they were used.
    again = make_trainer()
    again.fit(make_batches(), steps=2)
    again.fit(make_batches(), steps=STEPS)
    assert_same_bits(again, whole)


class Positioned(Iterator[Any]):
    """Batches that say where they are, as grain's do; they can be read once only."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.position = 0

    def __next__(self) -> Any:
        self.read.append(self.position)
        self.position += 1
        return make_batches()[self.position - 1]

    def get_state(self) -> dict[str, int]:
        return {"position": self.position}

    def set_state(self, state: dict[str, int]) -> None:
        self.position = state["position"]


@pytest.mark.parametrize("kind", ["list", "positioned", "grain"])
def test_an_interrupted_run_resumes_to_the_same_bits(
    kind: str, whole: Trainer, tmp_path: pathlib.Path
) -> None:
    def make() -> Any:
        if kind == "grain":
            return iter(grain.MapDataset.source(make_batches()).to_iter_dataset())
        return make_batches() if kind == "list" else Positioned()

    options = {"workdir": tmp_path, "checkpoint": CheckpointConfig(every_steps=2)}
    trainer = make_trainer(hooks=[BeforeStep(5, sigterm)], **options)
    with pytest.raises(Stopped, match=r"^stopped and saved after step 5$"):
        trainer.fit(make(), steps=STEPS)
    again, batches = make_trainer(**options), make()
    assert again.resume() == 5
    assert again.fit(batches, steps=STEPS).steps == STEPS
    assert_same_bits(again, whole)
    if kind == "positioned":
        assert batches.read == [5]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_rows_of_ours_come_in_the_order_of_a_run_and_resume(
    tiny_config: MakeConfig, tmp_path: pathlib.Path
) -> None:
    run = Run.open(tiny_config(train__steps=4, eval__task=""), workdir=tmp_path / "run")
    train_and_evaluate(run.config, tmp_path / "run")
    trainer = Run.open(run.config).trainer()
    trainer.fit(run.rows, steps=2, batch_size=8)
    trainer.fit(run.rows, steps=4, batch_size=8)
    exported = models.load_pretrained(tmp_path / "run" / "model", mesh=run.mesh)
    for a, b in zip(jax.tree.leaves(nnx.state(exported, nnx.Param)), params(trainer), strict=True):
        np.testing.assert_array_equal(np.asarray(a), b)


SCRIPT = """
import sys
from tests.train.test_trainer import make_trainer, make_batches
from ranktuner_jax.train import CheckpointConfig, Hook
trainer = make_trainer(
    workdir=sys.argv[1],
    checkpoint=CheckpointConfig(every_steps=1),
    hooks=[Hook(lambda trainer: print(trainer.steps_done, flush=True), every=1)],
)
trainer.resume()
trainer.fit(make_batches() * 500, steps=3000)
"""


def test_a_script_that_was_killed_resumes_to_the_same_bits(
    whole: Trainer, tmp_path: pathlib.Path
) -> None:
    script = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    process = subprocess.Popen(script, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "4":
            break
    process.kill()
    process.wait()
    trainer = make_trainer(workdir=tmp_path)
    done = trainer.resume()
    assert done >= 2
    # To where both have the same steps: of the list's batches the first six come again and again.
    trainer.fit(itertools.cycle(make_batches()), steps=done + 1)
    other = make_trainer()
    other.fit(itertools.cycle(make_batches()), steps=done + 1)
    assert_same_bits(trainer, other)


def test_a_workdir_with_checkpoints_is_not_begun_anew_by_mistake(tmp_path: pathlib.Path) -> None:
    make_trainer(workdir=tmp_path).fit(make_batches(), steps=2)
    with pytest.raises(UserError, match=r"has checkpoint 2 of an earlier run; call resume\(\)"):
        make_trainer(workdir=tmp_path).fit(make_batches(), steps=4)
    other = make_trainer(workdir=tmp_path, weighting=losses.SFT())
    with pytest.raises(UserError, match=r"another config \(weighting: .*RankTuner.*now 'SFT\(\)'"):
        other.resume()


def test_a_checkpoint_is_saved_when_it_is_asked_for(tmp_path: pathlib.Path) -> None:
    trainer = make_trainer(workdir=tmp_path)
    trainer.step(make_batches()[0])
    trainer.save()
    again = make_trainer(workdir=tmp_path)
    assert again.resume() == 1
    assert_same_bits(trainer, again)
    fresh = make_trainer(workdir=tmp_path / "new")
    assert fresh.resume() == 0


def test_a_checkpoint_of_the_start_can_be_trained_from(
    whole: Trainer, tmp_path: pathlib.Path
) -> None:
    make_trainer(workdir=tmp_path / "resumed").save()
    resumed, same = make_trainer(workdir=tmp_path / "resumed"), make_trainer(workdir=tmp_path)
    assert resumed.resume() == 0
    same.save()
    for trainer in (resumed, same):
        trainer.fit(make_batches(), steps=STEPS)
        assert_same_bits(trainer, whole)


def test_what_needs_a_workdir_says_so(tmp_path: pathlib.Path) -> None:
    trainer = make_trainer()
    for call in (trainer.save, trainer.resume, lambda: trainer.replay(1)):
        with pytest.raises(ValueError, match="needs a trainer with a workdir"):
            call()


def test_without_a_workdir_a_signal_says_that_nothing_is_kept() -> None:
    trainer = make_trainer(hooks=[BeforeStep(2, sigterm)])
    with pytest.raises(Stopped, match=r"stopped after step 2; not saved, without a workdir"):
        trainer.fit(make_batches(), steps=4)
    assert trainer.steps_done == 2
    assert np.isfinite(np.asarray(trainer.model.unembed)).all()


def spoiled(step: int) -> list[dict[str, np.ndarray]]:
    batches = make_batches()
    batches[step - 1]["token_weights"] = np.full((8, 12), np.nan, np.float32)
    return batches


def test_a_step_that_is_not_finite_is_raised_and_can_be_done_again(tmp_path: pathlib.Path) -> None:
    trainer = make_trainer(workdir=tmp_path)
    with pytest.raises(RunError, match=r"^step 3: the loss is nan .* on rows \[0, 1, .*, 7\] of"):
        trainer.fit(spoiled(3), steps=STEPS)
    again = make_trainer(workdir=tmp_path)
    metrics = again.replay(3)
    assert metrics["nonfinite"] == 1
    assert np.isnan(metrics["loss"])
    with pytest.raises(RunError, match=r"^step 3: .* without a workdir it was not saved"):
        make_trainer().fit(spoiled(3), steps=STEPS)


def test_after_a_nonfinite_step_fit_continues_with_the_batch_of_that_step(whole: Trainer) -> None:
    trainer = make_trainer()
    with pytest.raises(RunError, match=r"^step 3: "):
        trainer.fit(spoiled(3), steps=STEPS)
    assert trainer.steps_done == int(trainer.state.step) == 2
    trainer.fit(make_batches(), steps=STEPS)
    assert_same_bits(trainer, whole)


def test_steps_that_are_not_finite_can_be_left_out() -> None:
    trainer = make_trainer(nonfinite_limit=1)
    trainer.fit(spoiled(3), steps=STEPS)
    assert trainer.metrics["train/skipped_steps"] == 1
    assert int(trainer.state.step) == STEPS - 1


def test_batches_that_end_or_change_their_shape_are_named() -> None:
    with pytest.raises(UserError, match=r"batches: ran out at step 7"):
        make_trainer().fit(make_batches(), steps=9)
    batches: list[Any] = make_batches()
    batches[1] = {name: array[:4] for name, array in batches[1].items()}
    with pytest.raises(UserError, match=r"first one, \(8, 12\), got \(4, 12\); pad"):
        make_trainer().fit(batches, steps=2)
    mesh = make_mesh(MeshConfig(data=8))
    with pytest.raises(UserError, match=r"expected a multiple of .* \(16\), got 8"):
        make_trainer(mesh=mesh, accumulation=2).fit(make_batches(), steps=1)


def test_rows_need_a_batch_size_and_batches_have_one(tiny_config: MakeConfig) -> None:
    rows = Run.open(tiny_config()).rows
    with pytest.raises(ValueError, match="batch_size is required for rows"):
        make_trainer().fit(rows, steps=1)
    with pytest.raises(ValueError, match="batch_size is required for rows"):
        make_trainer().fit(make_batches(), steps=1, batch_size=4)


def test_a_mesh_without_the_axes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"without \['fsdp', 'tensor'\]"):
        make_trainer(mesh=jax.make_mesh((8,), ("data",)))


def test_evaluate_gives_the_plain_likelihood(tiny_config: MakeConfig) -> None:
    run = Run.open(tiny_config(eval__task=""))
    trainer = run.trainer()
    before = trainer.evaluate(run.rows)
    trainer.fit(run.rows, steps=4, batch_size=8)
    after = trainer.evaluate(run.rows)
    assert after.nll < before.nll
    assert after.tokens == before.tokens
    assert after.questions == 0


def test_a_run_from_its_folder_is_the_run(tiny_config: MakeConfig, tmp_path: pathlib.Path) -> None:
    config = tiny_config(train__epochs=2.0)
    opened = Run.open(config, workdir=tmp_path)
    opened.claim()
    again = Run.open(tmp_path)
    assert again.config == opened.config
    assert again.steps == opened.steps != config.train.steps
    assert again.model is again.model  # Each part is opened once.
    with pytest.raises(UserError, match="expected the config of a run at"):
        Run.open(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="claim needs a run with a workdir"):
        Run.open(config).claim()


def test_a_resume_that_is_refused_leaves_the_model_as_it_was(tmp_path: pathlib.Path) -> None:
    make_trainer(workdir=tmp_path).fit(make_batches(), steps=2)
    for options, said in (
        ({"weighting": losses.SFT()}, "another config"),
        ({"tx": optax.sgd(0.1)}, r"another model or optimizer \(opt_state\.0"),
    ):
        trainer = make_trainer(workdir=tmp_path, **options)
        with pytest.raises(UserError, match=said):
            trainer.resume()
        assert np.isfinite(np.asarray(trainer.model.unembed)).all()
    larger = models.Decoder(dataclasses.replace(MODEL, vocab_size=37), rngs=nnx.Rngs(0))
    trainer = Trainer(
        larger, tx=optax.adam(1e-2), weighting=losses.RankTuner("one"), workdir=tmp_path
    )
    with pytest.raises(
        UserError, match=r"params\.embed\.value: 'float32\(31, 16\)', now 'float32\(37"
    ):
        trainer.resume()


@dataclasses.dataclass(frozen=True)
class Failing(losses.Weighting):
    """Fails the first time that a step is traced."""

    def weights(self, stats: losses.TokenStats, batch_stat: jax.Array | None) -> jax.Array:
        if not FAILED:
            FAILED.append(True)
            raise RuntimeError("traced")
        return jnp.ones_like(stats.nll)


FAILED: list[bool] = []


def test_a_step_that_cannot_be_compiled_leaves_the_state_as_it_was(tmp_path: pathlib.Path) -> None:
    make_trainer(workdir=tmp_path, run={}).fit(make_batches(), steps=2)
    trainer = make_trainer(workdir=tmp_path, run={}, weighting=Failing())
    trainer.resume()
    FAILED.clear()
    with pytest.raises(RuntimeError, match="traced"):
        trainer.step(make_batches()[2])
    assert (trainer.steps_done, int(trainer.state.step)) == (2, 2)
    trainer.step(make_batches()[2])
    assert int(trainer.state.step) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weighting": losses.RankTuner}, "weighting must be such as"),
        ({"tx": optax.adam}, "tx must be such as"),
        ({"hooks": [print]}, r"wrap a function as Hook\(function, every=10\)"),
        ({"hooks": Hook(print)}, "hooks must be a list"),
        ({"accumulation": 0}, "accumulation must be at least 1: got 0"),
        ({"clip_norm": -1.0}, r"clip_norm must be at least 0: got -1\.0"),
    ],
    ids=["weighting", "tx", "function", "hook", "accumulation", "clip_norm"],
)
def test_arguments_of_another_kind_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        make_trainer(**options)


def test_steps_and_batches_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="steps must be a whole number"):
        make_trainer().fit(make_batches(), steps=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got a single batch"):
        make_trainer().fit(make_batches()[0], steps=2)  # type: ignore[arg-type]


def test_a_batch_is_made_of_arrays_by_name() -> None:
    batch = data.Batch.of(make_batches()[0])
    trainer, other = make_trainer(), make_trainer()
    trainer.step(batch)
    other.step(make_batches()[0])
    assert_same_bits(trainer, other)


def test_hooks_see_the_trainer_between_the_steps() -> None:
    seen: list[tuple[int, bool]] = []

    def look(trainer: Trainer) -> None:
        hidden = trainer.model(jnp.ones((1, 3), jnp.int32))
        seen.append((trainer.steps_done, bool(np.isfinite(np.asarray(hidden)).all())))
        assert trainer.metrics["train/loss"] > 0
        trainer.log({"mine/steps": trainer.steps_done})

    trainer = make_trainer(hooks=[Hook(look, every=2)])
    result = trainer.fit(make_batches(), steps=5)
    assert seen == [(2, True), (4, True), (5, True)]  # And once at the end.
    assert result.metrics["mine/steps"] == 5
