"""The held-out rows and questions of a config: the same for every evaluation of a run."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

from ranktuner_jax import data, evals, models
from ranktuner_jax.train.config import TrainConfig

__all__ = ["HeldOut"]

Progress = Callable[[int, int], None]


class HeldOut:
    """The data that a run is evaluated on.

    Args:
      config: The config of the run.
      folder: The folder of the initial model.
      tokenizer: Its tokenizer.

    Raises:
      UserError: If the split does not exist, a row is invalid, or the task cannot score the rows.

    Attributes:
      questions: The number of questions.
      size: The number of rows and questions, as text.
      note: A remark on the questions, such as why there are none; "" for none.
    """

    def __init__(self, config: TrainConfig, folder: pathlib.Path, tokenizer: Any) -> None:
        self._config, self._folder, self._tokenizer = config.eval, folder, tokenizer
        self._data, self._adapter = config.data, config.lora.adapter
        split = config.eval.split
        self._rows = data.load_rows(config.data, tokenizer, split=split, seed=config.seed)
        self._examples: list[data.Example] = []
        self.note = ""
        if config.eval.task:
            self._examples, self.note = evals.scorable(
                config.eval.task,
                data.load_examples(config.data, tokenizer, split=split, limit=config.eval.examples),
            )
        self.questions = len(self._examples)
        rows = min(len(self._rows), config.eval.rows)
        self.size = f"{rows:,} held-out rows, {self.questions:,} questions"

    def evaluate(self, model: models.Decoder, progress: Progress | None = None) -> evals.EvalResult:
        """Scores the rows and answers the questions."""
        return evals.evaluate(
            model,
            self._tokenizer,
            rows=self._rows,
            examples=self._examples,
            config=self._config,
            progress=progress,
        )

    def cached(self, model: models.Decoder, progress: Progress | None = None) -> evals.EvalResult:
        """Like `evaluate`, for the initial model; the result is kept in the user's cache.

        That of a model with trained adapters, whose files are not all in its folder, is not.
        """
        if self._adapter:
            return self.evaluate(model, progress)
        result, _ = evals.cached_evaluation(
            model,
            self._tokenizer,
            rows=self._rows,
            examples=self._examples,
            config=self._config,
            model_folder=self._folder,
            progress=progress,
        )
        return result

    def examples(self, count: int) -> list[data.Example]:
        """The first held-out conversations, whether a task can score them or not."""
        return data.load_examples(
            self._data, self._tokenizer, split=self._config.split, limit=count
        )
