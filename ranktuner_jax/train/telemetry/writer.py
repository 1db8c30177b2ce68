"""The metrics writer: metrics.jsonl, TensorBoard and Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, TextIO

import jax
from etils import epath

from ranktuner_jax.files import write_whole
from ranktuner_jax.train.config import TelemetryConfig
from ranktuner_jax.train.telemetry.object_store import LocalCopy
from ranktuner_jax.train.telemetry.tensorboard import Board
from ranktuner_jax.train.telemetry.weights_and_biases import start_wandb

__all__ = ["Writer"]


class Writer:
    """Writes metrics on process 0; does nothing on the others.

    Lines of metrics.jsonl after `start` are dropped first: a resumed run repeats these steps. For
    an object store, which does not support appending, the files are written to a local folder and
    copied once a minute and at the end.

    Args:
      workdir: The folder of the run, for metrics.jsonl and tensorboard/.
      start: The step from which the run resumes, or 0.
      config: What is written in addition to metrics.jsonl.
      run: The config of the run, for Weights & Biases.

    Raises:
      UserError: If Weights & Biases fails to start.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        start: int = 0,
        config: TelemetryConfig = TelemetryConfig(),  # noqa: B008 (frozen)
        run: Mapping[str, Any] | None = None,
    ) -> None:
        folder = epath.Path(workdir)
        self.start = start
        self.metrics_path = folder / "metrics.jsonl"
        self.tensorboard_path = folder / "tensorboard" if config.tensorboard else None
        self.profile_path: os.PathLike[str] = folder / "profile"
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._copy = LocalCopy(folder) if "://" in os.fspath(folder) else None
        local = self._copy.local if self._copy else pathlib.Path(folder)
        if self._copy:
            self.profile_path = local / "profile"
        self._file = _reopen(self.metrics_path, local / "metrics.jsonl", start)
        self._board = Board(local / "tensorboard", start + 1) if config.tensorboard else None
        self._wandb = start_wandb(config.wandb, folder, local, run) if config.wandb else None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records metrics of a step by name, such as "train/nll"."""
        if not self._active:
            return
        record = {name: float(value) for name, value in metrics.items()}
        # JSON has no NaN or infinity; every parser accepts null.
        line = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        self._file.flush()
        if self._board:
            self._board.write(step, record)
        if self._wandb:
            # Ignores steps that it already has, which a resumed run repeats.
            self._wandb.log(record, step=step)
        if self._copy:
            self._copy.update(force=False)

    def close(self) -> None:
        """Flushes everything; a second call does nothing."""
        if not self._active:
            return
        self._active = False
        with contextlib.ExitStack() as stack:  # Closes all, even if one of them fails.
            if self._copy:
                stack.callback(self._copy.update, force=True)
            if self._wandb:
                stack.callback(self._wandb.finish)
            if self._board:
                stack.callback(self._board.close)
            stack.callback(self._file.close)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _reopen(source: epath.Path, target: pathlib.Path, step: int) -> TextIO:
    """Opens metrics.jsonl for appending; drops later steps and incomplete lines."""
    kept = []
    for line in source.read_text().splitlines() if source.exists() else ():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_whole(target, "".join(kept))
    return target.open("a")
