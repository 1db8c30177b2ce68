"""metrics.jsonl, TensorBoard, and what the terminal shows."""

import io
import json
import pathlib

import pytest

from ranktuner_jax.train import Writer


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def read(path: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_are_lines_of_json_and_events(tmp_path: pathlib.Path) -> None:
    with Writer(tmp_path, start=0, steps=2, stream=io.StringIO()) as writer:
        writer.write(1, {"train/nll": 0.5, "train/loss": float("nan")})
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "train/nll": 0.5, "train/loss": None}]
    events = list((tmp_path / "tensorboard").iterdir())
    assert len(events) == 1
    assert b"train/nll" in events[0].read_bytes()


def test_lines_of_steps_that_are_done_again_are_dropped(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st')
    with Writer(tmp_path, start=1, steps=3, stream=io.StringIO()) as writer:
        writer.write(2, {"train/nll": 1.0})
    assert [line["step"] for line in read(path)] == [0, 1, 2]


def test_without_a_terminal_progress_is_plain_lines(tmp_path: pathlib.Path) -> None:
    stream = io.StringIO()
    with Writer(tmp_path, start=0, steps=90, stream=stream) as writer:
        writer.progress(3, loss=1.5, nll=2.5, speed=1234.4, left=3725)
        writer.evaluating(1, 2)
    assert stream.getvalue() == (
        "step 3/90  loss 1.5000  nll 2.5000  1,234 tokens/s  1:02:05 left\n"
    )


def test_on_a_terminal_progress_is_a_bar(tmp_path: pathlib.Path) -> None:
    stream = Terminal()
    with Writer(tmp_path, start=0, steps=90, stream=stream) as writer:
        writer.evaluating(1, 2)
        writer.evaluating(2, 2)
        writer.progress(3, loss=1.5, nll=2.5, speed=1234.4, left=30)
        writer.say("[said] as it is")
    shown = stream.getvalue()
    assert "3/90" in shown
    assert "[said] as it is" in shown
    assert "step 3/90" not in shown


def test_other_processes_write_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jax.process_index", lambda: 1)
    stream = io.StringIO()
    with Writer(tmp_path, start=0, steps=1, stream=stream) as writer:
        writer.write(1, {"train/nll": 0.5})
        writer.progress(1, loss=1.0, nll=1.0, speed=1.0, left=0.0)
        writer.say("hello")
    assert stream.getvalue() == ""
    assert list(tmp_path.iterdir()) == []
