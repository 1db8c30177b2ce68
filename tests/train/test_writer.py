"""metrics.jsonl, TensorBoard, and what the terminal shows."""

import importlib.util
import io
import json
import math
import pathlib
import socket
import sys
import time
import types
from collections.abc import Iterator
from typing import Any

import pytest
from etils import epath
from tensorboardX.proto import event_pb2

from ranktuner_jax.errors import UserError
from ranktuner_jax.train import TelemetryConfig, Writer
from ranktuner_jax.train.telemetry.progress import Progress
from ranktuner_jax.train.telemetry.weights_and_biases import check_telemetry
from tests.buckets import bucket


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def read(path: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_are_lines_of_json_and_events(tmp_path: pathlib.Path) -> None:
    with Writer(tmp_path, start=0) as writer:
        writer.write(1, {"train/nll": 0.5, "train/loss": float("nan")})
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "train/nll": 0.5, "train/loss": None}]
    events = list((tmp_path / "tensorboard").iterdir())
    assert len(events) == 1
    assert b"train/nll" in events[0].read_bytes()


def events(folder: pathlib.Path) -> list[event_pb2.Event]:
    """The events of a file: each is its length, the length's checksum, itself, and its checksum."""
    [path] = folder.iterdir()
    content, found = path.read_bytes(), []
    while content:
        size = int.from_bytes(content[:8], "little")
        found.append(event_pb2.Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    return found


def test_tensorboard_drops_steps_that_are_repeated(tmp_path: pathlib.Path) -> None:
    with Writer(tmp_path, start=4) as writer:
        writer.write(5, {"train/nll": 0.5, "train/loss": float("nan")})
        # Flushed already, before the close.
        assert len(events(tmp_path / "tensorboard")) == 3
    version, session, metrics = events(tmp_path / "tensorboard")
    assert version.file_version == "brain.Event:2"
    assert (session.step, session.session_log.status) == (5, event_pb2.SessionLog.START)
    assert metrics.step == 5
    values = {value.tag: value.simple_value for value in metrics.summary.value}
    assert values == {"train/nll": 0.5, "train/loss": pytest.approx(math.nan, nan_ok=True)}


def test_a_full_disk_raises_on_write_and_on_close(tmp_path: pathlib.Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    for second in range(9):
        name = f"events.out.tfevents.{int(time.time()) + second}.{socket.gethostname()}"
        (tmp_path / "tensorboard" / name).symlink_to("/dev/full")
    writer = Writer(tmp_path, start=0)
    with pytest.raises(OSError, match="No space left"):
        writer.write(1, {"train/nll": 0.5})
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    assert writer._file.closed


def test_lines_of_repeated_steps_are_dropped(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st')
    with Writer(tmp_path, start=1) as writer:
        writer.write(2, {"train/nll": 1.0})
    assert [line["step"] for line in read(path)] == [0, 1, 2]


def test_without_a_terminal_progress_is_plain_lines() -> None:
    stream = io.StringIO()
    progress = Progress(90, stream)
    progress.step(3, loss=1.5, nll=2.5, speed=1234.4, left=3725)
    progress.evaluation(1, 2)
    progress.close()
    assert stream.getvalue() == (
        "step 3/90  loss 1.5000  nll 2.5000  1,234 tokens/s  1:02:05 left\n"
    )


def test_on_a_terminal_progress_is_a_bar() -> None:
    stream = Terminal()
    progress = Progress(90, stream)
    progress.evaluation(1, 2)
    progress.evaluation(2, 2)
    progress.step(3, loss=1.5, nll=2.5, speed=1234.4, left=30)
    progress.say("[said] as it is")
    progress.close()
    shown = stream.getvalue()
    assert "3/90" in shown
    assert "[said] as it is" in shown
    assert "step 3/90" not in shown


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_a_silent_process_shows_nothing(stream: io.StringIO) -> None:
    progress = Progress(1, stream, silent=True)
    progress.step(1, loss=1.0, nll=1.0, speed=1.0, left=0.0)
    progress.evaluation(1, 2)
    progress.say("hello")
    progress.close()
    assert stream.getvalue() == ""


def test_only_the_first_process_writes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with Writer(tmp_path) as writer:
        writer.write(1, {"train/nll": 0.5})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def written(tmp_path: pathlib.Path) -> Iterator[list[str]]:
    """The names of the files written to gs://bucket, which is a local folder."""
    with bucket(tmp_path) as names:
        yield names


RUN = epath.Path("gs://bucket/run")


@pytest.mark.usefixtures("written")
def test_on_an_object_store_files_are_written_whole_and_a_run_resumes() -> None:
    with Writer(RUN, start=0) as one:
        one.write(1, {"train/nll": 0.5})
        one.write(2, {"train/nll": 0.4})
        assert not (RUN / "metrics.jsonl").exists()  # Copied once a minute and at the end.
    assert [line["step"] for line in read(RUN / "metrics.jsonl")] == [1, 2]
    with Writer(RUN, start=1) as two:
        two.write(2, {"train/nll": 0.3})
    assert [line["train/nll"] for line in read(RUN / "metrics.jsonl")] == [0.5, 0.3]
    [event, *_] = (RUN / "tensorboard").iterdir()
    assert b"train/nll" in event.read_bytes()


def test_an_object_store_is_updated_once_a_minute(
    written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Writer(RUN, start=0) as one:
        trace = pathlib.Path(one.profile_path)
        trace.mkdir()
        (trace / "trace").write_text("as it stays")
        for step, seconds in ((1, 30.0), (2, 29.0), (3, 2.0), (4, 30.0)):
            now[0] += seconds
            one.write(step, {"train/nll": 0.5})
            shown = read(RUN / "metrics.jsonl") if (RUN / "metrics.jsonl").exists() else []
            assert [line["step"] for line in shown] == ([1, 2, 3] if step >= 3 else [])
    assert written.count("metrics.jsonl") == 2
    assert written.count("trace") == 1
    assert (RUN / "profile" / "trace").read_text() == "as it stays"
    assert len(read(RUN / "metrics.jsonl")) == 4


def test_a_second_close_does_nothing(tmp_path: pathlib.Path) -> None:
    with Writer(tmp_path, start=0) as one:
        one.close()
    one.write(1, {"train/nll": 0.5})
    assert read(tmp_path / "metrics.jsonl") == []


def test_wandb_gets_the_same_numbers_and_continues_an_interrupted_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []

    class Run:
        def log(self, record: dict[str, float], step: int) -> None:
            calls.append(("log", (step, record)))

        def finish(self) -> None:
            calls.append(("finish", None))

    def init(**options: Any) -> Run:
        calls.append(("init", options))
        return Run()

    fake = types.SimpleNamespace(init=init, Settings=lambda **options: options, Error=ValueError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = TelemetryConfig(wandb="team/project")
    for start in (0, 1):
        with Writer(tmp_path, start, config, {"seed": 3}) as one:
            one.write(start + 1, {"train/nll": 0.5})
    names = [name for name, _ in calls]
    assert names == ["init", "log", "finish"] * 2
    first, second = (options for name, options in calls if name == "init")
    assert (first["entity"], first["project"]) == ("team", "project")
    assert first["id"] == second["id"]
    assert first["resume"] == "allow"
    assert first["config"] == {"seed": 3}
    assert first["name"] == tmp_path.name
    assert calls[1] == ("log", (1, {"train/nll": 0.5}))


def test_wandb_itself_writes_a_run_without_a_network(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = TelemetryConfig(wandb="project")
    check_telemetry(config)
    with Writer(tmp_path, 0, config, {"seed": 3}) as one:
        one.write(1, {"train/nll": 0.5})
    [log] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    identity = (tmp_path / "wandb_id").read_text()
    assert identity in log.name
    assert "train/nll 0.5" in capsys.readouterr().err  # The summary that wandb prints.


def test_an_error_of_wandb_is_a_user_error(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**options: Any) -> None:
        raise ValueError("no API key\nand more")

    fake = types.SimpleNamespace(init=init, Settings=lambda **options: options, Error=ValueError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(UserError, match=r"telemetry\.wandb=mine: no API key$"):
        Writer(tmp_path, 0, TelemetryConfig(wandb="mine"))


def test_a_missing_wandb_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_telemetry(TelemetryConfig())
    with pytest.raises(UserError, match=r"telemetry\.wandb=mine: expected the package wandb"):
        check_telemetry(TelemetryConfig(wandb="mine"))
