"""Where a run's numbers go: metrics.jsonl, TensorBoard, Weights & Biases, and the terminal."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import pathlib
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from typing import Any, TextIO

import jax
import rich.console
import rich.progress
from etils import epath
from tensorboardX import record_writer
from tensorboardX.proto import event_pb2, summary_pb2

from ranktuner_jax.errors import UserError
from ranktuner_jax.train.config import TelemetryConfig

__all__ = ["Writer", "check_telemetry"]

_SECONDS_BETWEEN_COPIES = 60.0
_SECONDS_BETWEEN_FLUSHES = 10.0


def check_telemetry(config: TelemetryConfig) -> None:
    """Refuses a config that needs what is not installed, before a run has begun.

    Raises:
      UserError: If it is so.
    """
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"telemetry.wandb={config.wandb}: expected the package wandb, which is not installed; "
            "run pip install 'ranktuner-jax[wandb]'"
        )


class Writer:
    """Writes metrics on process 0; the others stay silent.

    Lines of metrics.jsonl beyond `start` are dropped first: they belong to steps of an
    interrupted run that are done again. On an object store, where nothing can be appended, the
    files grow in a local folder and are copied once a minute and at the end.

    Args:
      workdir: The folder of the run; metrics.jsonl and tensorboard/ lie in it.
      start: The step from which the run goes on.
      steps: The steps of the whole run, for the progress bar.
      config: What is written beside metrics.jsonl.
      run: The config of the run, for Weights & Biases.
      stream: Where progress is shown; standard error by default.

    Raises:
      UserError: If Weights & Biases refuses to start.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        start: int,
        steps: int,
        config: TelemetryConfig = TelemetryConfig(),  # noqa: B008 (frozen)
        run: Mapping[str, Any] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        place = epath.Path(workdir)
        self.metrics_path = place / "metrics.jsonl"
        self.tensorboard_path = place / "tensorboard" if config.tensorboard else None
        self.profile_path: os.PathLike[str] = place / "profile"
        self._active = jax.process_index() == 0
        self._stream = stream or sys.stderr
        self._steps = steps
        self._bar: rich.progress.Progress | None = None
        self._evaluation: rich.progress.TaskID | None = None
        if not self._active:
            return
        self._copy = _Copy(place) if "://" in os.fspath(place) else None
        folder = self._copy.local if self._copy else pathlib.Path(place)
        if self._copy:
            self.profile_path = folder / "profile"
        self._file = _reopen(self.metrics_path, folder / "metrics.jsonl", start)
        self._board = _Board(folder / "tensorboard", start + 1) if config.tensorboard else None
        self._wandb = _start_wandb(config.wandb, place, folder, run) if config.wandb else None
        if self._stream.isatty():
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[numbers]}"),
                rich.progress.TimeRemainingColumn(),
                console=rich.console.Console(file=self._stream),
            )
            self._task = self._bar.add_task("train", total=steps, completed=start, numbers="")
            self._bar.start()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records metrics of a step by their names, such as "train/nll"."""
        if not self._active:
            return
        record = {name: float(value) for name, value in metrics.items()}
        # JSON has no NaN or infinity; null is what every reader takes.
        line = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        self._file.flush()
        if self._board:
            self._board.write(step, record)
        if self._wandb:
            # Steps that an interrupted run does again are there already: it takes none twice.
            self._wandb.log(record, step=step)
        if self._copy:
            self._copy.update(at_once=False)

    def progress(self, step: int, loss: float, nll: float, speed: float, left: float) -> None:
        """Shows how far the run is: a bar on a terminal, a line elsewhere.

        Args:
          step: Steps done.
          loss: The loss of the last one.
          nll: Its plain negative log-likelihood.
          speed: Tokens a second.
          left: Seconds left.
        """
        numbers = f"loss {loss:.4f}  nll {nll:.4f}  {speed:,.0f} tokens/s"
        if not self._active:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        else:
            self.say(f"step {step}/{self._steps}  {numbers}  {_duration(left)} left")

    def evaluating(self, done: int, total: int) -> None:
        """Shows how far an evaluation is; only a terminal's bar says so."""
        if self._bar is None:
            return
        if self._evaluation is None:
            self._evaluation = self._bar.add_task("evaluate", total=total, numbers="")
        self._bar.update(self._evaluation, completed=done, total=total)
        if done >= total:
            self._bar.remove_task(self._evaluation)
            self._evaluation = None

    def say(self, text: str) -> None:
        """Shows a line of text."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Flushes everything; a second call does nothing."""
        if not self._active:
            return
        self._active = False
        if self._bar is not None:
            self._bar.stop()
        with contextlib.ExitStack() as stack:  # One that cannot be closed is not in another's way.
            if self._copy:
                stack.callback(self._copy.update, at_once=True)
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
    """Opens metrics.jsonl with its lines of steps up to `step`; a torn last line goes too."""
    kept = []
    for line in source.read_text().splitlines() if source.exists() else ():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    partial = target.with_name(target.name + ".partial")
    partial.write_text("".join(kept))
    os.replace(partial, target)
    return target.open("a")


class _Board:
    """TensorBoard's file of events, written by the thread that trains.

    tensorboardX's own writer has a thread and a queue: once a full disk has ended the thread, the
    queue fills up and the run stands still.
    """

    def __init__(self, folder: pathlib.Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._file = record_writer.RecordWriter(str(folder / name))
        self._flushed = -math.inf
        self._add(event_pb2.Event(file_version="brain.Event:2"))
        # Of what was shown before, TensorBoard forgets that step and those after it.
        session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(event_pb2.Event(step=first_step, session_log=session))

    def write(self, step: int, record: Mapping[str, float]) -> None:
        """Records metrics of a step."""
        values = [
            summary_pb2.Summary.Value(tag=name, simple_value=value)
            for name, value in record.items()
        ]
        self._add(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=values)))
        if time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes it."""
        self._file.close()

    def _add(self, event: event_pb2.Event) -> None:
        event.wall_time = time.time()
        self._file.write(event.SerializeToString())


class _Copy:
    """A local folder whose files are copied to an object store."""

    def __init__(self, remote: epath.Path) -> None:
        self._remote = remote
        self._folder = tempfile.TemporaryDirectory(prefix="ranktuner-")
        self.local = pathlib.Path(self._folder.name)
        self._copied: dict[pathlib.Path, tuple[int, int]] = {}
        self._last = time.monotonic()

    def update(self, at_once: bool) -> None:
        """Copies what changed, unless that was done within the last minute."""
        if not at_once and time.monotonic() - self._last < _SECONDS_BETWEEN_COPIES:
            return
        for path in sorted(self.local.rglob("*")):
            state = path.stat().st_size, path.stat().st_mtime_ns
            if path.is_file() and self._copied.get(path) != state:
                target = self._remote / path.relative_to(self.local).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
                self._copied[path] = state
        self._last = time.monotonic()


def _start_wandb(
    project: str, workdir: epath.Path, folder: pathlib.Path, run: Mapping[str, Any] | None
) -> Any:
    """A run of Weights & Biases that an interrupted run goes on with."""
    import wandb

    identity = workdir / "wandb_id"
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex[:12])
    entity, _, name = project.rpartition("/")
    try:
        return wandb.init(
            entity=entity or None,
            project=name,
            id=identity.read_text(),
            resume="allow",
            name=workdir.name,
            dir=folder,
            config=dict(run or {}),
            settings=wandb.Settings(console="off"),
        )
    except wandb.Error as error:
        raise UserError(f"telemetry.wandb={project}: {str(error).splitlines()[0]}") from error


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
