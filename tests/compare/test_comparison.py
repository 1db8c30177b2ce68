"""A comparison trains as `ranktuner train` does, goes on after a stop, and is shared by parts."""

import collections
import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Literal

import pytest

from ranktuner_jax import cli
from ranktuner_jax.compare.comparison import Comparison, Planned
from ranktuner_jax.compare.measure import Measurements, read_outcome
from ranktuner_jax.compare.outcome import Outcome
from ranktuner_jax.compare.page import write_compare_report
from ranktuner_jax.compare.search import best_rates, widened
from ranktuner_jax.compare.variants import Variant, read_variants
from ranktuner_jax.errors import UserError
from ranktuner_jax.evals import Sampling, read_questions
from ranktuner_jax.evals.benchmarks.own import own_benchmark
from ranktuner_jax.train import Hook, Stopped, TrainConfig, Trainer, load_config, train_and_evaluate

pytestmark = pytest.mark.usefixtures("quick_to_compile")

METHODS = "sft,ranktuner:base=one"


@pytest.fixture(scope="module")
def variants(tiny_config_file: pathlib.Path) -> list[Variant]:
    def load(overrides: Sequence[str]) -> TrainConfig:
        config = load_config(str(tiny_config_file), ["--config.train.steps=3", *overrides])
        quiet = dataclasses.replace(config.telemetry, progress=False, tensorboard=False)
        return dataclasses.replace(config, telemetry=quiet)

    return read_variants(METHODS, "tokens", load)


Make = Callable[..., Comparison]


@pytest.fixture(scope="module")
def make(variants: list[Variant]) -> Make:
    def comparison(folder: pathlib.Path, **options: object) -> Comparison:
        chosen: dict[str, object] = {
            "primary": "held-out/pass@1",
            "rates": [3e-2],
            "seeds": 2,
            "search_seeds": 1,
        }
        chosen |= {"measurements": Measurements()} | options
        return Comparison(folder, variants, **chosen)  # type: ignore[arg-type]

    return comparison


@pytest.fixture(scope="module")
def finished(make: Make, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of a comparison that was never interrupted."""
    folder = tmp_path_factory.mktemp("compared") / "whole"
    comparison = make(folder)
    assert comparison.run()
    comparison.write_results()
    return folder


class Drawn(Measurements):
    """In the place of training: scores that depend on the method and the learning rate alone."""

    def before(self, config: TrainConfig, folder: pathlib.Path) -> dict[str, float]:
        return {"nll": 3.0}

    def run(
        self,
        variant: Variant,
        rate: float,
        seed: int,
        role: Literal["search", "main"],
        folder: pathlib.Path,
        hooks: Sequence[Hook] = (),
    ) -> Outcome:
        best = {"sft": 1e-2, "ranktuner:base=one": 3.0}[variant.method]
        right = (1.0, float(rate == best), 0.0)
        outcome = Outcome(
            *(variant.method, "tokens", rate, seed, role),
            metrics={"nll": abs(math.log(rate / best)), "token_accuracy": 0.5},
            scores={"held-out/pass@1": right},
            digests={"held-out": "a"},
            curves={},
        )
        folder.mkdir(parents=True)
        (folder / "outcome.json").write_text(json.dumps(outcome.to_json()))
        return outcome


def numbers(folder: pathlib.Path) -> dict[str, tuple[object, ...]]:
    """What must not depend on when and where a run was done, by its folder."""
    paths = sorted((folder / "runs").glob("*/*/*/outcome.json"))
    found: dict[str, tuple[object, ...]] = {}
    for path in paths:
        outcome = json.loads(path.read_text())
        metrics = {k: v for k, v in outcome["metrics"].items() if k not in ("seconds", "memory_gb")}
        name = str(path.parent.relative_to(folder / "runs"))
        found[name] = (metrics, outcome["scores"], outcome["digests"], outcome["curves"].get("nll"))
    return found


def test_a_run_is_that_of_ranktuner_train(
    finished: pathlib.Path, variants: list[Variant], tmp_path: pathlib.Path
) -> None:
    config = variants[1].with_run(3e-2, seed=1)
    assert config.loss.make_weighting().base == "one"
    alone = train_and_evaluate(config, tmp_path / "alone")
    folder = finished / "runs/ranktuner,base=one/0.03/seed-1"
    saved = json.loads((folder / "config.json").read_text())
    assert (saved["optimizer"]["learning_rate"], saved["seed"]) == (3e-2, 1)
    assert saved["loss"]["options"]["base"] == "one"
    outcome = read_outcome(folder)
    assert outcome is not None
    assert outcome.metrics["nll"] == alone.after.nll
    assert outcome.scores["held-out/pass@1"] == tuple(map(float, alone.after.right))
    assert len(alone.after.right) == alone.after.questions == 8
    assert sum(alone.after.right) == alone.after.correct
    lines = (tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "train/nll" in line]
    assert outcome.curves["nll"] == tuple(line["train/nll"] for line in steps)
    norms = [line["train/grad_norm"] for line in steps]
    assert outcome.metrics["grad_norm"] == pytest.approx(sum(norms) / len(norms))
    assert outcome.metrics["clip_share"] == sum(norm > 1 for norm in norms) / len(norms)
    assert outcome.metrics["memory_gb"] > 0


def test_the_runs_answer_the_same_questions_and_leave_everything_but_their_models(
    finished: pathlib.Path,
) -> None:
    results = json.loads((finished / "results.json").read_text())
    outcomes = [Outcome.from_json(saved) for saved in results["outcomes"]]
    assert [(o.method, o.seed) for o in outcomes] == [
        (method, seed) for seed in (0, 1) for method in METHODS.split(",")
    ]
    assert len({outcome.digests["held-out"] for outcome in outcomes}) == 1
    assert not list(finished.glob("runs/**/checkpoints"))
    assert not list(finished.glob("runs/**/model"))
    assert len(list(finished.glob("runs/**/metrics.jsonl"))) == len(outcomes)
    assert results["settings"]["before"].keys() >= {"nll", "held-out/pass@1"}


def test_a_stopped_comparison_goes_on_to_the_same_numbers(
    finished: pathlib.Path, make: Make, tmp_path: pathlib.Path
) -> None:
    def interrupt(trainer: Trainer) -> None:
        if trainer.steps_done == 2:
            raise Stopped("as by Ctrl-C")

    done: list[str] = []

    def second(run: Planned, number: int, total: int) -> Sequence[Hook]:
        done.append(run.name)
        return [Hook(interrupt, every=1)] if len(done) == 2 else []

    folder = tmp_path / "stopped"
    with pytest.raises(Stopped):
        make(folder, started=second).run()
    assert len(numbers(folder)) == 1
    again: list[str] = []

    def noted(run: Planned, number: int, total: int) -> Sequence[Hook]:
        again.append(run.name)
        return []

    moved = folder.rename(tmp_path / "moved")
    assert make(moved, started=noted, seeds=1).run()
    assert again == done[1:]
    assert numbers(moved).items() <= numbers(finished).items()
    assert len(numbers(moved)) == 2


def test_the_grid_grows_for_all_methods_where_one_of_them_is_best_at_its_end(
    make: Make, tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "whole"
    comparison = make(folder, measurements=Drawn(), rates=[1e-3, 1e-2, 1e-1])
    assert comparison.run()
    # 3.0 is not reached: beyond 0.1 the grid grows by tens, and the score is the same everywhere.
    assert comparison.best_rates() == {"sft": 1e-2, "ranktuner,base=one": 1.0}
    outcomes = [json.loads(path.read_text()) for path in folder.glob("runs/*/*/*/outcome.json")]
    runs = collections.Counter((o["method"], o["rate"], o["role"], o["seed"]) for o in outcomes)
    assert set(runs.values()) == {1}
    searched = {run[:2] for run in runs if run[2:] == ("search", 1000)}
    assert searched == set(itertools.product(METHODS.split(","), (1e-3, 1e-2, 1e-1, 1.0, 10.0)))
    counted = {run for run in runs if run[2] == "main"}
    assert counted == {
        (method, rate, "main", seed)
        for method, rate in (("sft", 1e-2), ("ranktuner:base=one", 1.0))
        for seed in (0, 1)
    }


def test_the_table_and_the_page_show_differences_from_the_baseline_that_is_asked_for(
    finished: pathlib.Path, make: Make
) -> None:
    comparison = make(finished)
    assert comparison.run()
    [base, other] = comparison.write_results("ranktuner:base=one").groups["tokens"]
    assert (base.method, other.method) == ("ranktuner:base=one", "sft")
    page = write_compare_report(finished).read_text()
    assert "minus RankTuner base=one" in page
    assert "minus SFT" not in page
    comparison.write_results()
    assert "minus SFT" in write_compare_report(finished).read_text()


def test_parts_wait_for_each_other_and_come_to_the_same_result(
    make: Make, tmp_path: pathlib.Path
) -> None:
    options = {"measurements": Drawn(), "rates": [1e-3, 1e-2, 1e-1]}
    assert make(tmp_path / "whole", **options).run()
    folder = tmp_path / "parts"
    # Each of the parts in turn, until there is nothing left for it.
    turns = {1: 0, 0: 0}
    waiting = list(turns)
    while waiting:
        for k in list(waiting):
            part = make(folder, part=(k, 2), **options)
            turns[k] += 1
            if part.run():
                waiting.remove(k)
            elif turns == {1: 1, 0: 0}:
                assert part.missing() == 3
        assert max(turns.values()) < 8
    assert min(turns.values()) > 1
    assert numbers(folder) == numbers(tmp_path / "whole")


def test_only_part_0_waits_for_the_runs_that_count(make: Make, tmp_path: pathlib.Path) -> None:
    options = {"measurements": Drawn(), "rates": [1e-2]}
    assert not make(tmp_path / "compared", part=(0, 2), **options).run()
    assert make(tmp_path / "compared", part=(1, 2), **options).run()
    other = make(tmp_path / "other", part=(1, 2), **options)
    assert other.run()
    assert other.missing() == 2


def test_a_run_that_diverges_answers_nothing_right_and_the_comparison_goes_on(
    make: Make, sums: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = own_benchmark(sums.format(split="test"), "number")
    tasks = [(benchmark, read_questions(benchmark, {}, 3))]
    measurements = Measurements(
        tasks=tasks, sampling=Sampling(samples=2, temperature=1.0, max_new_tokens=2)
    )
    comparison = make(tmp_path / "run", rates=[1e38], seeds=1, measurements=measurements)
    assert comparison.run()
    assert "counts as wrong everywhere; step 2: the loss is" in capsys.readouterr().err
    diverged = read_outcome(tmp_path / "run/runs/sft/1e+38/seed-0")
    assert diverged is not None
    assert math.isnan(diverged.metrics["nll"])
    assert diverged.scores == {
        "held-out/pass@1": (0.0,) * 8,
        "test/pass@1": (0.0,) * 3,
        "test/pass@2": (0.0,) * 3,
    }
    assert diverged.digests.keys() == {"held-out", "test"}
    [_, other] = comparison.write_results().groups["tokens"]
    assert other.measured["held-out/pass@1"].mean.value == 0
    assert "nll" not in other.measured
    saved = (tmp_path / "run" / "results.json").read_text()
    json.loads(saved, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_broken_file_of_a_comparison_is_named(make: Make, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "compared"
    options = {"measurements": Drawn(), "rates": [1e-2]}
    assert make(folder, **options).run()
    broken = folder / "runs/sft/0.01/seed-0/outcome.json"
    broken.write_text(broken.read_text()[:40])
    with pytest.raises(
        UserError, match=r"outcome\.json: expected the outcome of a run, got a broken"
    ):
        make(folder, **options).run()
    (folder / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings\.json: expected the settings of a comparison"):
        make(folder, **options)


def test_seeds_and_methods_can_be_added_but_nothing_else_may_change(
    finished: pathlib.Path, make: Make, variants: list[Variant]
) -> None:
    before = numbers(finished)
    with pytest.raises(UserError, match=r"holds a comparison with other settings \(retain: ''"):
        make(finished, measurements=Measurements(retain="rows.jsonl"))
    (other := finished.parent / "other").mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        make(other)
    assert make(finished, seeds=3).run()
    assert numbers(finished).items() > before.items()
    assert len(numbers(finished)) == len(before) + 2


def outcome(method: str, rate: float, right: Sequence[float], nll: float = 1.0) -> Outcome:
    return Outcome(method, "tokens", rate, 1000, "search", {"nll": nll}, {"t": right}, {}, {})


def test_the_best_rate_has_the_highest_mean_score_and_of_equals_the_lower_nll() -> None:
    sft, dft = Variant("sft", "tokens", TrainConfig()), Variant("dft", "tokens", TrainConfig())
    searched = [
        outcome("sft", 1e-4, (1.0, 0.0)),
        outcome("sft", 1e-4, (0.0, 0.0)),
        outcome("sft", 1e-3, (1.0, 0.0)),
        outcome("sft", 1e-3, (1.0, 0.0)),
        outcome("dft", 1e-4, (0.0, 0.0), nll=2.0),
        outcome("dft", 1e-3, (0.0, 0.0), nll=1.5),
        dataclasses.replace(outcome("dft", 1e-4, (1.0, 1.0)), role="main"),
    ]
    assert best_rates(searched, [sft, dft], "t") == {"sft": 1e-3, "dft": 1e-3}
    assert widened([1e-4, 1e-3], {"sft": 1e-3, "dft": 1e-4}) == [1e-5, 1e-4, 1e-3, 1e-2]


def test_a_mistake_in_how_questions_are_asked_is_found_before_training(
    tiny_config_file: pathlib.Path,
    sums: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, questions = tmp_path / "compared", sums.format(split="test")
    command = ["compare", f"--config={tiny_config_file}", f"--output={output}", "--k=2"]
    assert cli.main([*command, f"--tasks={questions}", "--grader=number"]) == 2
    message = "--k: expected numbers from 1 to the 1 samples of a question, got 2"
    assert message in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods=dft"], "--methods: expected sft among them"),
        (["--methods=sft,sft"], "--methods: expected each method once, got sft twice"),
        (["--methods=sft,ranktuner:one"], "expected options such as base=one after ranktuner:"),
        (["--methods=sft,rank"], "loss.weighting: expected"),
        (["--methods=sft,ranktuner:base=two"], "base"),
        (["--seeds=0"], "--seeds: expected at least 1, got 0"),
        (["--rates=fast"], "--rates: expected numbers separated by commas, got 'fast'"),
        (["--rates=0"], "--rates: expected numbers above 0, got 0.0"),
        (["--rates=1e-3,nan"], "--rates: expected numbers above 0, got nan"),
        (
            ["--config.optimizer.learning_rate=0.0"],
            "optimizer.learning_rate: expected numbers above 0, got 0.0",
        ),
        (["--retain=absent.jsonl", "--part=1/2"], "expected a file, got absent.jsonl"),
        (["--k=2"], "--k: expected --tasks beside it, got none"),
        (["--part=2/2"], "--part: expected K/N with K from 0 to N - 1"),
        (["--normalize=weights"], "--normalize: expected tokens or tokens,weights"),
        (["--config.eval.task="], "eval.task: expected questions to compare the methods by"),
        (["--tasks=absent.jsonl", "--grader=number"], "absent.jsonl"),
        (["--adapter=absent"], "lora.adapter: expected PEFT's folder, found no absent"),
        (["--primary=ood"], "--primary: expected one of held-out, got 'ood'"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_trained(
    flags: list[str],
    message: str,
    tiny_config_file: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "compared"
    command = ["compare", f"--config={tiny_config_file}", f"--output={output}", *flags]
    assert cli.main(command) == 2
    assert message in capsys.readouterr().err
    assert not (output / "runs").exists()
