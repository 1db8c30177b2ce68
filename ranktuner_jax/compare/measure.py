"""One run of a comparison: trained as by `ranktuner train`, then measured."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ranktuner_jax import data, evals, files
from ranktuner_jax.compare.outcome import Outcome
from ranktuner_jax.compare.variants import Variant
from ranktuner_jax.errors import DivergedError, UserError
from ranktuner_jax.evals.benchmarks import Benchmark, Question, digest
from ranktuner_jax.evals.scores import CHOICE_SCORES, which_k
from ranktuner_jax.train import Hook, Run, TrainConfig, Trainer, train_and_evaluate
from ranktuner_jax.train.run import with_trained

__all__ = ["OUTCOME", "OWN", "Measurements", "read_outcome"]

OUTCOME = "outcome.json"
OWN = "held-out"
"""The name of the task that a config itself evaluates on: its held-out questions."""

_MOST_POINTS = 200
_CURVES = ("nll", "loss", "grad_norm", "learning_rate")
_MEMORY = "memory/step_gb"


@dataclasses.dataclass(frozen=True)
class Measurements:
    """What is measured after a run, beside its own held-out evaluation.

    Attributes:
      tasks: Benchmarks and their questions.
      sampling: How answers to them are drawn.
      ks: The values of k of pass@k.
      cache_gb: Memory for keys and values while answers are drawn.
      retain: Rows whose plain NLL shows what is forgotten; "" for none.
      keep_models: Whether checkpoints and models are kept.
    """

    tasks: Sequence[tuple[Benchmark, Sequence[Question]]] = ()
    sampling: evals.Sampling = evals.Sampling()  # noqa: RUF009 (frozen)
    ks: Sequence[int] = ()
    cache_gb: float = 1.0
    retain: str = ""
    keep_models: bool = False

    def primary(self, own_questions: int, wanted: str = "") -> str:
        """The score that decides: pass@1 of a task, or its accuracy if it is one of choices.

        Args:
          own_questions: How many questions the config itself has.
          wanted: The name of the task; by default the config's own, or the first of `tasks`.

        Raises:
          UserError: If there is no such task, or no question at all.

        Example:
          >>> Measurements().primary(own_questions=200)
          'held-out/pass@1'
        """
        scores = {OWN: f"{OWN}/pass@1"} if own_questions else {}
        for benchmark, _ in self.tasks:
            if benchmark.name == OWN:
                raise UserError(
                    f"--tasks: expected no file named {OWN}, which the config's own questions are "
                    "called; rename it"
                )
            statistic = "accuracy" if benchmark.choices else "pass@1"
            scores[benchmark.name] = f"{benchmark.name}/{statistic}"
        if not scores:
            raise UserError(
                "eval.task: expected questions to compare the methods by, found none in the "
                "held-out rows; set eval.task and use rows with an `answer`, or name benchmarks "
                "with --tasks"
            )
        if wanted and wanted not in scores:
            raise UserError(f"--primary: expected one of {', '.join(scores)}, got {wanted!r}")
        return scores[wanted] if wanted else next(iter(scores.values()))

    def check(self, opened: Run) -> None:
        """Finds a user's mistakes before anything is trained.

        Raises:
          UserError: If a grader lacks its package, a k is above the samples, or the rows to retain
            cannot be read.
        """
        self._suite(pathlib.Path())
        if self.retain:
            self._retained(opened)

    def run(
        self,
        variant: Variant,
        rate: float,
        seed: int,
        role: Literal["search", "main"],
        folder: pathlib.Path,
        hooks: Sequence[Hook] = (),
    ) -> Outcome:
        """Trains a model and measures it; goes on where it was interrupted.

        A run whose loss or gradient is not finite has no model: it answers nothing right.

        Args:
          variant: The method.
          rate: The peak learning rate.
          seed: The seed.
          role: What the run is for.
          folder: Its folder, which then holds `outcome.json`.
          hooks: Called while it trains.
        """
        config = variant.with_run(rate, seed)
        try:
            after = train_and_evaluate(config, folder, hooks=[*hooks, Hook(_log_memory)]).after
        except DivergedError as error:
            print(f"{folder}: counts as wrong everywhere; {error}", file=sys.stderr)
            after, scores, retention = self._diverged(config)
        else:
            trained = with_trained(config, folder / "model")
            scores, retention = self._of_model(trained, folder / "evals")
        digests = {benchmark.name: digest(questions) for benchmark, questions in self.tasks}
        if after.right:
            scores[f"{OWN}/pass@1"] = [float(right) for right in after.right]
            digests[OWN] = after.digest
        curves, metrics = _training(folder, config)
        outcome = Outcome(
            method=variant.method,
            normalize=variant.normalize,
            rate=rate,
            seed=seed,
            role=role,
            metrics={"nll": after.nll, "token_accuracy": after.token_accuracy}
            | metrics
            | retention,
            scores=scores,
            digests=digests,
            curves=curves,
        )
        files.write_whole(folder / OUTCOME, json.dumps(outcome.to_json()))
        if not self.keep_models:
            for name in ("model", "checkpoints", "nonfinite"):
                shutil.rmtree(folder / name, ignore_errors=True)
        return outcome

    def before(self, config: TrainConfig, folder: pathlib.Path) -> dict[str, float]:
        """What the model of a config scores before training, as means; kept in a folder."""
        path = folder / "before.json"
        if not path.exists():
            scores, found = self._of_model(config, folder / "evals")
            found |= {name: sum(values) / len(values) for name, values in scores.items()}
            opened = Run.open(config)
            own = opened.held_out.cached(opened.model)
            found |= {"nll": own.nll, "token_accuracy": own.token_accuracy}
            if own.accuracy is not None:
                found[f"{OWN}/pass@1"] = own.accuracy
            files.write_whole(path, json.dumps(found))
        before: dict[str, float] = json.loads(path.read_text())
        return before

    def _diverged(
        self, config: TrainConfig
    ) -> tuple[evals.EvalResult, dict[str, Sequence[float]], dict[str, float]]:
        """What stands for a run without a model: every answer wrong, and no likelihood."""
        opened = Run.open(config)
        own = opened.held_out.cached(opened.model)
        wrong = dataclasses.replace(
            own, nll=math.nan, token_accuracy=math.nan, right=(False,) * len(own.right)
        )
        passes = [f"pass@{k}" for k in which_k(self.sampling.samples, self.ks)]
        scores: dict[str, Sequence[float]] = {
            f"{benchmark.name}/{statistic}": [0.0] * len(questions)
            for benchmark, questions in self.tasks
            for statistic in (CHOICE_SCORES if benchmark.choices else passes)
        }
        return wrong, scores, {}

    def _of_model(
        self, config: TrainConfig, folder: pathlib.Path
    ) -> tuple[dict[str, Sequence[float]], dict[str, float]]:
        """The scores of the benchmarks, and the NLL of the rows to retain.

        Args:
          config: The model, how to read data and how to compute.
          folder: Keeps the answers.
        """
        scores: dict[str, Sequence[float]] = {}
        retention: dict[str, float] = {}
        if not self.tasks and not self.retain:
            return scores, retention
        train = dataclasses.replace(config.train, remat="none")
        opened = Run.open(dataclasses.replace(config, train=train))
        if self.tasks:
            engine = evals.LocalEngine(
                opened.model,
                opened.tokenizer,
                # Not the folder's name: the comparison may be moved while it is interrupted.
                name="",
                enable_thinking=config.data.enable_thinking,
                cache_gb=self.cache_gb,
            )
            for task, of_task in self._suite(folder).run(engine).items():
                for statistic, values in of_task.by_question.items():
                    scores[f"{task}/{statistic}"] = values
        if self.retain:
            result = evals.evaluate(
                opened.model,
                rows=self._retained(opened),
                config=dataclasses.replace(config.eval, task=""),
            )
            retention = {"retention_nll": result.nll}
        return scores, retention

    def _suite(self, folder: pathlib.Path) -> evals.Suite:
        return evals.Suite(self.tasks, self.sampling, folder, ks=self.ks)

    def _retained(self, opened: Run) -> data.Rows:
        source = dataclasses.replace(
            opened.config.data, source=self.retain, mixture=(), split="train", holdout=0.0
        )
        return data.load_rows(source, opened.tokenizer)


def read_outcome(folder: pathlib.Path) -> Outcome | None:
    """The outcome of a run; None if it is not finished.

    Raises:
      UserError: If its file is broken.
    """
    path = folder / OUTCOME
    try:
        return Outcome.from_json(json.loads(path.read_text())) if path.exists() else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: expected the outcome of a run, got a broken file ({error}); delete its "
            "folder to repeat the run"
        ) from error


def _log_memory(trainer: Trainer) -> None:
    """Into metrics.jsonl, so that a run that is interrupted after training keeps it."""
    if (memory := trainer.step_memory_gb) is not None:
        trainer.log({_MEMORY: memory})


def _training(
    folder: pathlib.Path, config: TrainConfig
) -> tuple[dict[str, Sequence[float]], dict[str, float]]:
    """The curves and metrics of training, from metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    needed = ["step", "train/step_seconds", *(f"train/{name}" for name in _CURVES)]
    # A value that is not finite, of a step that was skipped, is null.
    steps = [line for line in lines if all(line.get(name) is not None for name in needed)]
    if not steps:
        return {}, {}
    norms = _values(steps, "train/grad_norm")
    seconds = _values(steps, "train/step_seconds")
    metrics = {
        "grad_norm": sum(norms) / len(norms),
        "seconds": sum(seconds) / len(seconds) * steps[-1]["step"],
    }
    if config.optimizer.clip_norm:
        clipped = sum(norm > config.optimizer.clip_norm for norm in norms)
        metrics["clip_share"] = clipped / len(norms)
    if memory := [line[_MEMORY] for line in lines if _MEMORY in line]:
        metrics["memory_gb"] = memory[-1]
    thinned = steps[:: math.ceil(len(steps) / _MOST_POINTS)]
    curves: dict[str, Sequence[float]] = {"step": _values(thinned, "step")}
    for name in _CURVES:
        curves[name] = _values(thinned, f"train/{name}")
    return curves, metrics


def _values(lines: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [float(line[name]) for line in lines]
