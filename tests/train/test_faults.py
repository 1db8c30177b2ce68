"""Faults of a run: signals, kills, full disks, broken checkpoints, losses that are not finite."""

from __future__ import annotations

import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest

from ranktuner_jax import cli
from ranktuner_jax.errors import RunError, UserError
from ranktuner_jax.train import (
    Hook,
    Stopped,
    TrainConfig,
    Trainer,
    export,
    replay,
    train_and_evaluate,
)
from ranktuner_jax.train.runtime.preemption import PREEMPTED
from tests.train import processes
from tests.train.happenings import BeforeStep, sigterm, sigterm_inside, train_spoiled

MakeConfig = Callable[..., TrainConfig]


def weights(workdir: pathlib.Path) -> bytes:
    return (workdir / "model" / "model.safetensors").read_bytes()


def logged(workdir: pathlib.Path, name: str) -> dict[int, float | None]:
    """A metric by its step."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.fixture(scope="module")
def finished(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("finished")
    train_and_evaluate(tiny_config(), workdir)
    return workdir


# --- A loss that is not finite.


# Noticed at the next step, before a save, and at the end.
@pytest.mark.parametrize(("step", "accumulation"), [(3, 2), (4, 1), (6, 1)])
def test_a_nonfinite_step_stops_the_run_and_can_be_replayed(
    step: int,
    accumulation: int,
    tiny_config: MakeConfig,
    tmp_path: pathlib.Path,
) -> None:
    config = tiny_config(train__accumulation=accumulation, train__batch_size=16)
    with pytest.raises(RunError, match=rf"^step {step}: the loss is nan and .* norm nan") as error:
        train_spoiled(config, tmp_path, step)
    rows = error.value.rows  # type: ignore[attr-defined]
    assert f"on rows {rows[step]} of the data set" in str(error.value)
    assert f"`ranktuner_jax.train.replay('{tmp_path}', {step})` repeats it" in str(error.value)
    assert "\n" not in str(error.value)

    again = replay(tmp_path, step)
    assert np.isnan(again["loss"])
    assert again["nonfinite"] == 1
    # With finite weights the replay equals that step of a healthy run, bit for bit.
    folder = tmp_path / "nonfinite" / f"step_{step}"
    with np.load(folder / "batch.npz") as kept:
        batch = dict(kept)
    assert batch["row_index"].ravel().tolist() == rows[step]
    batch["token_weights"] = batch["mask"].astype(np.float32)
    np.savez(folder / "batch.npz", **batch)
    repaired = replay(tmp_path, step)

    healthy = tmp_path / "healthy"
    train_and_evaluate(config, healthy)
    assert repaired["loss"] == logged(healthy, "train/loss")[step]
    assert repaired["grad_norm"] == logged(healthy, "train/grad_norm")[step]


def test_replay_without_a_nonfinite_step_is_an_error(finished: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"expected a saved non-finite step in .*step_3"):
        replay(finished, 3)


def test_nonfinite_steps_are_skipped_and_counted_up_to_a_limit(
    tiny_config: MakeConfig,
    tmp_path: pathlib.Path,
) -> None:
    skip = {"train__on_nonfinite": "skip", "train__nonfinite_limit": 2}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_spoiled(tiny_config(**skip), whole, 2, 3)
    losses = logged(whole, "train/loss")
    assert [step for step, loss in losses.items() if loss is None] == [2, 3]
    assert list(logged(whole, "train/skipped_steps").values()) == [0, 1, 2, 2, 2, 2]
    rates = logged(whole, "train/learning_rate")
    assert rates[2] == rates[3] == rates[4] != rates[5]  # The schedule waits too.

    # Interrupted between the two, the run ends with the same bits and the same count.
    with pytest.raises(Stopped, match=r"after step 2$"):
        train_spoiled(tiny_config(**skip), cut, 2, 3, hooks=(BeforeStep(2, sigterm),))
    train_spoiled(tiny_config(**skip), cut, 2, 3)
    assert weights(cut) == weights(whole)
    assert list(logged(cut, "train/skipped_steps").values()) == [0, 1, 2, 2, 2, 2]

    with pytest.raises(RunError, match=r"^step 5: "):
        train_spoiled(tiny_config(**skip), tmp_path / "limit", 1, 3, 5)
    assert replay(tmp_path / "limit", 5)["nonfinite"] == 1


# --- A signal outside the steps; those that come while a step runs are in test_loop.py.


@pytest.mark.parametrize("moment", ["load", "evaluate before", "evaluate in between", "export"])
def test_a_signal_outside_the_steps_stops_the_run_and_loses_nothing(
    moment: str,
    finished: pathlib.Path,
    tiny_config_file: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [f"--config={tiny_config_file}", "--config.eval.every_steps=3"]
    command = ["train", *arguments, f"--workdir={tmp_path / 'run'}"]
    inside, call = {
        "load": ("load_pretrained", 1),
        "evaluate before": ("evaluate", 1),
        "evaluate in between": ("evaluate", 2),
        "export": ("save_pretrained", 1),
    }[moment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKTUNER_CACHE", str(tmp_path / "cache"))  # Evaluates before training too.
        with sigterm_inside(inside, call):
            assert cli.main(command) == PREEMPTED
    saved = [int(path.name) for path in tmp_path.glob("run/checkpoints/*")]
    assert max(saved, default=0) == {"evaluate in between": 3, "export": 6}.get(moment, 0)
    assert capsys.readouterr().err.splitlines()[-1].endswith("run the same command to resume")
    assert cli.main(command) == 0
    assert weights(tmp_path / "run") == weights(finished)
    # The evaluation that the signal prevented is there too.
    assert list(logged(tmp_path / "run", "eval/nll")) == [0, 3, 6]


# --- A broken checkpoint.


def test_a_run_resumes_from_the_checkpoint_before_a_broken_one(
    finished: pathlib.Path,
    tiny_config: MakeConfig,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    signal_run(tiny_config(), tmp_path, 5)  # With the checkpoints 2, 4 and 5.
    for path in tmp_path.glob("checkpoints/5/state/ocdbt.process_0/d/*"):
        path.write_bytes(path.read_bytes()[:50])
    capsys.readouterr()
    train_and_evaluate(tiny_config(), tmp_path)
    said = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("checkpoint 5 is broken (") for line in said) == 1
    assert "resuming after step 4 of 6" in said
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    assert weights(tmp_path) == weights(finished)

    # The export of a run skips a broken one too, and moves no files.
    for path in tmp_path.glob("checkpoints/6/state/ocdbt.process_0/d/*"):
        path.unlink()
    assert export(tmp_path, tmp_path / "exported") == 4
    assert "checkpoint 6 is broken (" in capsys.readouterr().err
    assert (tmp_path / "checkpoints" / "6").exists()


def test_a_run_whose_checkpoints_are_all_broken_does_not_start_over(
    tiny_config_file: pathlib.Path,
    tiny_config: MakeConfig,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    signal_run(tiny_config(), tmp_path, 3)
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    (tmp_path / "checkpoints" / "3" / "data" / "metadata").unlink()
    capsys.readouterr()
    assert cli.main(["train", f"--config={tiny_config_file}", f"--workdir={tmp_path}"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ranktuner: no checkpoint in ")
    assert "start over in another --workdir" in last


def signal_run(config: TrainConfig, workdir: pathlib.Path, step: int) -> None:
    """A run that is stopped at a step."""
    with pytest.raises(Stopped):
        train_and_evaluate(config, workdir, hooks=[BeforeStep(step, sigterm)])


# --- A full disk.


def test_a_full_disk_is_a_one_line_error_and_the_run_resumes_once_there_is_space(
    finished: pathlib.Path, tiny_config: MakeConfig, tmp_path: pathlib.Path
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_up(trainer: Trainer) -> None:
        # No file may grow beyond this; the arrays of the tiny model have 60 kB.
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    config = tiny_config(checkpoint__asynchronous=False)
    try:
        with pytest.raises(RunError, match=r"checkpoint of step 4 could not .*File too") as e:
            train_and_evaluate(config, tmp_path, hooks=[Hook(fill_up, every=4, at_end=False)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(e.value)
    assert [path.name for path in tmp_path.glob("checkpoints/?")] == ["2"]
    train_and_evaluate(tiny_config(), tmp_path)
    assert weights(tmp_path) == weights(finished)


def almost_finished(finished: pathlib.Path, workdir: pathlib.Path) -> pathlib.Path:
    """A run with only its result left to write; returns the temporary file that it writes first."""
    shutil.copytree(finished, workdir)
    (workdir / "result.json").unlink()
    return workdir / f"result.json.partial-{os.getpid()}"


def test_a_full_disk_outside_a_checkpoint_is_a_one_line_error_too(
    finished: pathlib.Path, tiny_config: MakeConfig, tmp_path: pathlib.Path
) -> None:
    partial = almost_finished(finished, tmp_path / "run")
    partial.symlink_to("/dev/full")
    with pytest.raises(RunError) as error:
        train_and_evaluate(tiny_config(), tmp_path / "run")
    assert str(error.value) == (
        f"{tmp_path / 'run'}: No space left on device; free some space and run the same command to "
        "resume"
    )
    assert isinstance(error.value.__cause__, OSError)
    assert not partial.is_symlink()  # No partial file is left.
    train_and_evaluate(tiny_config(), tmp_path / "run")


def test_other_file_errors_are_raised_unchanged(
    finished: pathlib.Path, tiny_config: MakeConfig, tmp_path: pathlib.Path
) -> None:
    almost_finished(finished, tmp_path / "run").mkdir()
    with pytest.raises(IsADirectoryError):
        train_and_evaluate(tiny_config(), tmp_path / "run")


# TensorStore continues with the other writes of a save after one of them has failed. Orbax has
# closed its event loop by then: TensorStore's threads print that, from C++, and asyncio may log
# the errors that it got before. The tracebacks have only these frames.
TOLERATED = {
    ("asyncio/base_events.py", "call_soon_threadsafe"),
    ("asyncio/base_events.py", "_check_closed"),
    ("serialization/serialization.py", "async_serialize_from_host"),
    ("serialization/serialization.py", "write_fragment"),
}


@pytest.mark.drill
def test_a_real_full_disk(
    tiny_config_file: pathlib.Path, finished: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Needs `unshare` and a kernel that lets users mount a tmpfs."""
    run = f"{sys.executable} -m ranktuner_jax.cli train --config={tiny_config_file}"
    script = f"""
        mount -t tmpfs -o size=400k tmpfs {tmp_path} || exit 9
        {run} --workdir={tmp_path}/run; echo first $?
        ls {tmp_path}/run/checkpoints
        mount -o remount,size=100m {tmp_path}
        {run} --workdir={tmp_path}/run; echo second $?
        cmp {tmp_path}/run/model/model.safetensors {finished}/model/model.safetensors; echo same $?
    """
    shell = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    assert {"first 1", "second 0", "same 0"} <= set(done.stdout.splitlines())
    # Those threads may print within a line of ours.
    [line] = [line for line in done.stderr.splitlines() if "ranktuner: " in line]
    assert "No space left on device" in line
    frames = re.findall(r'File "[^"]*?([^/"]+/[^/"]+)", line \d+, in (\S+)', done.stderr)
    assert set(frames) <= TOLERATED
    for start in ("Exception in thread", "Exception ignored", "ERROR:absl"):
        assert start not in done.stderr


# --- Killed.


def start(config: pathlib.Path, workdir: pathlib.Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ranktuner_jax.cli", "train", f"--config={config}", *more]
    return subprocess.Popen([*command, f"--workdir={workdir}"], stderr=subprocess.PIPE, text=True)


def unfinished_saves(workdir: pathlib.Path) -> list[pathlib.Path]:
    return list(workdir.glob("checkpoints/*orbax-checkpoint-tmp*"))


def test_a_run_killed_during_a_save_resumes_to_the_same_bits(
    finished: pathlib.Path,
    tiny_config: MakeConfig,
    tiny_config_file: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    process, deadline = start(tiny_config_file, tmp_path), time.monotonic() + 120
    while not unfinished_saves(tmp_path):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
    process.kill()
    process.communicate()
    train_and_evaluate(tiny_config(), tmp_path)
    assert weights(tmp_path) == weights(finished)


@pytest.mark.drill
def test_a_run_killed_25_times_ends_with_the_same_bits(
    tiny_config: MakeConfig, tiny_config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    more = ("--config.train.steps=300", "--config.checkpoint.every_steps=3")
    config = tiny_config(train__steps=300, checkpoint__every_steps=3)
    train_and_evaluate(config, tmp_path / "whole")
    moments, during_saves, workdir = random.Random(0), 0, tmp_path / "killed"
    for kill in range(25):
        process = start(tiny_config_file, workdir, *more)
        assert process.stderr is not None
        for line in process.stderr:  # Until the first step is logged.
            if line.startswith("step "):
                break
        delay = moments.uniform(0, 2)
        time.sleep(delay)
        if kill % 3 == 0:  # Every third one during a save.
            while not unfinished_saves(workdir) and process.poll() is None:
                pass
        process.kill()
        process.communicate()
        saves = unfinished_saves(workdir)
        during_saves += bool(saves)
        saved = sorted(path.name for path in workdir.glob("checkpoints/*") if path not in saves)
        print(f"kill {kill}: {line.split()[1]} + {delay:.2f} s, saved {saved}, torn {len(saves)}")
        assert process.returncode == -signal.SIGKILL, "it finished before: more steps are needed"
    assert during_saves >= 5
    train_and_evaluate(config, workdir)
    assert weights(workdir) == weights(tmp_path / "whole")


# --- Two processes.


def two_processes(config: pathlib.Path, workdir: pathlib.Path) -> list[subprocess.Popen[str]]:
    """Two processes that are past step 4 of very many."""
    arguments = [f"--config={config}", f"--workdir={workdir}", "--config.train.steps=3000"]
    started, deadline = processes.start(arguments), time.monotonic() + 120
    while not (workdir / "checkpoints" / "4").exists():
        if any(process.poll() is not None for process in started) or time.monotonic() > deadline:
            pytest.fail(str(processes.wait(started, 1)))
        time.sleep(0.02)
    return started


@pytest.mark.parametrize(
    ("receiver", "number"),
    [pytest.param(0, signal.SIGINT, marks=pytest.mark.drill), (1, signal.SIGTERM)],
)
def test_a_signal_to_one_process_stops_both_at_the_same_step(
    receiver: int, number: signal.Signals, tiny_config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    started = two_processes(tiny_config_file, tmp_path)
    started[receiver].send_signal(number)
    ends = processes.wait(started, timeout=60)
    assert [code for code, _ in ends] == [PREEMPTED, PREEMPTED], ends
    said = re.findall(r"stopped and saved after step (\d+): run the same command", ends[0][1])
    newest = max(int(path.name) for path in tmp_path.glob("checkpoints/*"))
    assert said == [str(newest)]
    # One process reads what two wrote, with the same checksums.
    assert export(tmp_path, tmp_path / "exported") == newest
    assert not (tmp_path / "broken").exists()


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.drill), 1])
def test_when_one_process_dies_the_other_exits_with_a_message(
    victim: int, tiny_config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    started = two_processes(tiny_config_file, tmp_path)
    started[victim].kill()
    killed = time.monotonic()
    code, stderr = processes.wait(started, timeout=100)[1 - victim]
    assert time.monotonic() - killed < 90
    # Reported by what notices first: a collective that fails, or JAX's coordination service,
    # which aborts the process.
    assert (code, "another process of the run failed" in stderr) == (1, True) or (
        (code, "another task died" in stderr) == (-signal.SIGABRT, True)
    ), (code, stderr)
    assert "Traceback" not in stderr


def test_both_of_two_processes_name_all_rows_of_a_nonfinite_step(
    tiny_config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    arguments = [f"--config={tiny_config_file}", f"--workdir={tmp_path}"]
    ends = processes.wait(
        processes.start([*arguments, "--config.optimizer.learning_rate=1e38"]), timeout=120
    )
    assert [code for code, _ in ends] == [1, 1], ends
    [step, rows] = re.findall(r"ranktuner: step (\d): .* on rows \[(.*?)\] of the", ends[0][1])[0]
    assert len(set(rows.split(", "))) == 8
    assert replay(tmp_path, int(step))["nonfinite"] == 1
