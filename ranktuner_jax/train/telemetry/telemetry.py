"""The output of a run: the progress on the terminal, and the metrics files in its folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax

from ranktuner_jax.train.config import TelemetryConfig
from ranktuner_jax.train.telemetry.progress import Progress
from ranktuner_jax.train.telemetry.writer import Writer

__all__ = ["Telemetry"]


class Telemetry:
    """The progress display and the metrics writer; can be closed and opened again.

    Args:
      workdir: The folder of the run; None writes nothing.
      config: What is written in addition to metrics.jsonl.
      run: The config of the run.

    Attributes:
      metrics: The latest value of each metric, in every process.
      metric_steps: The step of each of these values.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str] | None,
        config: TelemetryConfig,
        run: Mapping[str, Any],
    ) -> None:
        self._workdir, self._config, self._run = workdir, config, run
        self.metrics: dict[str, float] = {}
        self.metric_steps: dict[str, int] = {}
        self._silent = jax.process_index() != 0 or not config.progress
        self._progress: Progress | None = None
        self._writer: Writer | None = None

    def open(self, steps: int, start: int) -> None:
        """Opens the progress display and the writer, if they are not open.

        Args:
          steps: Steps of the whole run.
          start: The step to resume from; metrics of later steps are dropped.
        """
        if self._progress is None:
            self._progress = Progress(steps, silent=self._silent)
        if self._writer is None and self._workdir is not None:
            self._writer = Writer(self._workdir, start, self._config, self._run)

    def rewind(self, step: int) -> None:
        """Drops the recorded metrics of later steps."""
        if self._writer is not None and self._workdir is not None and step < self._writer.start:
            self._writer.close()
            self._writer = Writer(self._workdir, step, self._config, self._run)

    @property
    def progress(self) -> Progress:
        """The progress display; one without a bar while nothing is open."""
        return self._progress or Progress(0, silent=self._silent, bar=False)

    @property
    def profile_path(self) -> os.PathLike[str] | None:
        """A local folder for traces; None without a workdir."""
        return None if self._writer is None else self._writer.profile_path

    def record(self, step: int, metrics: Mapping[str, float], write: bool = True) -> None:
        """Records metrics of a step by name, such as "train/nll"; `write` puts them on disk."""
        self.metrics.update({name: float(value) for name, value in metrics.items()})
        self.metric_steps.update(dict.fromkeys(metrics, step))
        if write and self._writer is not None:
            self._writer.write(step, metrics)

    def close(self) -> None:
        """Flushes and closes everything."""
        progress, self._progress = self._progress, None
        writer, self._writer = self._writer, None
        if progress is not None:
            progress.close()
        if writer is not None:
            writer.close()
