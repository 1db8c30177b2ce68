"""What happens to a run in the tests of faults: through its own doors, at an exact moment."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import numpy as np

from ranktuner_jax import data
from ranktuner_jax.train import Hook, Run, TrainConfig, Trainer


class BeforeStep(Hook):
    """Lets something happen just before a step that a run takes."""

    at_end = False

    def __init__(self, step: int, happening: Callable[[], object]) -> None:
        super().__init__()
        self.step, self.happening = step, happening

    def before_step(self, trainer: Trainer, step: int) -> None:
        if step == self.step:
            self.happening()


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def sigterm_inside(function: str, call: int = 1) -> Iterator[None]:
    """Sends SIGTERM as soon as this thread has entered a function.

    Args:
      function: Its qualified name, such as "save_pretrained".
      call: In which of its calls it is sent, from 1.
    """
    calls = 0

    def watch(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        if event == "call" and frame.f_code.co_qualname == function:
            calls += 1
            if calls == call:
                sigterm()

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(before)
    assert calls >= call, f"{function} was called {calls} times"


class Spoiled:
    """The batches of a run; in the n-th steps the weights of all tokens are NaN.

    Attributes:
      rows: The rows of each step that was spoiled.
    """

    def __init__(self, batches: data.BatchIterator, *steps: int) -> None:
        self._batches, self._steps = batches, steps
        self._step = 0
        self.rows: dict[int, list[int]] = {}

    def __iter__(self) -> Spoiled:
        return self

    def __next__(self) -> Mapping[str, Any]:
        batch = vars(next(self._batches))
        self._step += 1
        if self._step in self._steps:
            self.rows[self._step] = batch["row_index"].tolist()
            return batch | {"token_weights": np.full_like(batch["token_weights"], np.nan)}
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"batches": self._batches.get_state(), "step": self._step}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._batches.set_state(state["batches"])
        self._step = state["step"]


def train_spoiled(
    config: TrainConfig, workdir: pathlib.Path, *steps: int, hooks: tuple[Hook, ...] = ()
) -> Spoiled:
    """A run from Python whose n-th steps are not finite; resumes, and exports to `model`."""
    run = Run.open(config, workdir=workdir)
    run.claim()
    size = config.train.batch_size
    batches = Spoiled(data.BatchIterator(run.rows, batch_size=size, seed=config.seed), *steps)
    trainer = run.trainer(hooks)
    trainer.resume()
    try:
        trainer.fit(batches, run.steps)
    except Exception as error:
        error.rows = batches.rows  # type: ignore[attr-defined]
        raise
    run.save_pretrained(trainer.model, workdir / "model")
    return batches
