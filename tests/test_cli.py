"""The command line: its imports, its help, and how it fails."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from ranktuner_jax import cli


def test_help_lists_every_command_without_importing_jax(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; from ranktuner_jax import cli; cli.main(['--help']); print(*sys.modules)"
    start = time.perf_counter()
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 5
    assert all(name in ran.stdout for name in cli.COMMANDS)
    modules = ran.stdout.splitlines()[-1].split()
    assert "jax" not in modules
    assert len(modules) < 150
    assert cli.main([]) == 0
    assert "ranktuner COMMAND" in capsys.readouterr().out


def test_help_of_a_group_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "data prepare" in shown
    assert "bench loss" not in shown


def test_help_of_train_lists_keys_with_values_and_meaning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--workdir" in shown
    assert "--config.optimizer.learning_rate=0.0001" in shown
    assert "Peak learning rate." in shown


def test_help_shows_the_values_of_the_config_that_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    def rate(*arguments: str) -> str:
        assert cli.main(["train", *arguments, "--help"]) == 0
        [line] = [
            s for s in capsys.readouterr().out.splitlines() if "optimizer.learning_rate=" in s
        ]
        return line.split()[0].split("=")[1]

    mine = tmp_path / "mine.py"
    mine.write_text("def get_config():\n    return {'optimizer': {'learning_rate': 0.125}}\n")
    assert rate() == "0.0001"  # That of smollm2_chain_sum, the default.
    assert rate("--config=numina_math") == "5e-05"
    assert rate("--config", str(mine)) == "0.125"
    assert rate(f"--config={mine}", "--config.optimizer.learning_rate=0.25") == "0.25"
    assert cli.main(["train", "--help", "--config=numina_meth"]) == 2
    assert "did you mean numina_math?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train", "eval", "data prepare", "data inspect", "bench data"])
def test_every_command_with_data_takes_a_config_and_its_keys(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    needed = {"train": ["--workdir"], "data prepare": ["--output"]}.get(name, [])
    arguments = [f"{flag}={tmp_path}/x" for flag in needed]
    source = "--config.data.source=none.jsonl"
    assert cli.main([*name.split(), *arguments, "--config=own_data", source]) == 2
    shown = capsys.readouterr().err
    assert "data.source: expected a file, got none.jsonl" in shown
    assert cli.main([*name.split(), "--help", "--config=own_data"]) == 0
    assert "--config.data.holdout=0.05" in capsys.readouterr().out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*name.split(), "--help"]) == 0
    assert f"ranktuner {name}" in capsys.readouterr().out


def run_buffered(argv: list[str], stdout: int) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, whose output is buffered as usual."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "ranktuner_jax.cli", *argv]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=env)


# The first is written at exit, the second exceeds the buffer and is written before.
LONG_AND_SHORT = pytest.mark.parametrize("argv", [["--help"], ["train", "--help"]], ids=" ".join)


@LONG_AND_SHORT
def test_a_full_disk_is_a_one_line_error_with_exit_code_1(argv: list[str]) -> None:
    with open("/dev/full", "w") as full:
        ran = run_buffered(argv, full.fileno())
    assert ran.returncode == 1
    assert ran.stderr == (
        "ranktuner: [Errno 28] No space left on device; free some space and run the command again\n"
    )


@LONG_AND_SHORT
def test_a_closed_pipe_prints_no_error(argv: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ran = run_buffered(argv, writer)
    os.close(writer)
    assert ran.stderr == ""
    assert ran.returncode == 1


MISTAKES = [
    ["train", "--workdir=x", "--config.data.source=none.jsonl"],
    ["train", "--workdir=x", "--config=broken.py"],
    ["eval", "--config=own_data", "--model=none"],
    ["data", "inspect", "--config.data.source=none.jsonl"],
    ["data", "prepare", "--output=y", "--config.data.source=none.jsonl"],
    ["bench", "data", "--config.model=none"],
    ["export", "--workdir=none", "--output=y"],
]


def test_user_errors_print_one_line_each_and_nothing_else(tmp_path: pathlib.Path) -> None:
    """In a process of their own, where libraries may print something when they are imported."""
    (tmp_path / "broken.py").write_text("def get_config():\n    return {\n")
    code = """
import json, sys
from ranktuner_jax import cli
for argv in json.loads(sys.argv[1]):
    print(f"> {argv}", file=sys.stderr)
    assert cli.main(argv) == 2, argv
"""
    command = [sys.executable, "-c", code, json.dumps(MISTAKES)]
    env = os.environ | {"RANKTUNER_CACHE": str(tmp_path / "cache")}
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == ""
    lines = ran.stderr.splitlines()
    assert lines[::2] == [f"> {argv}" for argv in MISTAKES]
    assert all(line.startswith("ranktuner: ") for line in lines[1::2]), ran.stderr
    assert len(lines) == 2 * len(MISTAKES), ran.stderr


# Packages that take long to import, and that only a run which is not refused needs.
HEAVY = {"altair", "grain", "orbax", "reasoning_gym", "tensorflow_datasets", "transformers"}
OWN = ["train", "--workdir=x", "--config=own_data"]
REFUSED_EARLY = [
    ["train"],
    ["train", "--workdir=x", "--steps=3"],
    ["train", "--workdir=x", "--config=nothing"],
    ["train", "--workdir=x", "--config=broken.py"],
    ["train", "--workdir=x", "--config.train.stps=3"],
    ["train", "--workdir=x", "--config.train.steps=a"],
    ["train", "--workdir=x", "--config.loss.weighting=rank"],
    ["train", "--workdir=x", "--config.eval.task=chain_sun"],
    ["train", "--workdir=x", "--config.mesh.data=3"],
    ["train", "--workdir=x", "--config.train.batch_size=3"],
    ["train", "--workdir=other", "--config.seed=5"],
    [*OWN, "--config.data.source=none.jsonl"],
    [*OWN, "--config.data.source=rows.jsonl", "--config.data.split=test"],
    [*OWN, "--config.data.source=rows.jsonl", "--config.eval.split=test"],
    [*OWN, "--config.data.source=rows.jsonl", "--config.model=none"],
    ["eval", "--config=own_data", "--model=none", "--config.data.source=rows.jsonl"],
    ["eval", "--workdir=none"],
    ["audit", "--output=y", "--config=nothing"],
    ["data", "inspect", "--config.data.source=none.jsonl"],
    ["data", "prepare", "--config.data.source=none.jsonl"],
    ["export", "--workdir=none", "--output=y"],
    ["noise", "--output=y", "--config=nothing"],
    ["compare", "--output=y", "--methods=sft,rank"],
]
SHOWN_EARLY = [
    [*name.split(), "--help"]
    for name in (
        *("train", "eval", "audit", "noise", "compare", "export", "data prepare"),
        *("data inspect", "plan"),
    )
]


def test_help_and_mistakes_do_not_wait_for_heavy_imports(tmp_path: pathlib.Path) -> None:
    (tmp_path / "broken.py").write_text("def get_config():\n    return {\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "2 + 2", "completion": "4"}\n' * 40)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"seed": 3}')
    code = """
import json, sys
from ranktuner_jax import cli
argvs, heavy = json.loads(sys.argv[1])
for argv in argvs:
    code = cli.main(argv)
    assert code == (0 if "--help" in argv else 2), argv
    loaded = {name.split(".")[0] for name in sys.modules} & set(heavy)
    assert not loaded, (argv, loaded)
"""
    arguments = json.dumps([SHOWN_EARLY + REFUSED_EARLY, sorted(HEAVY)])
    command = [sys.executable, "-c", code, arguments]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stderr.splitlines()) == len(REFUSED_EARLY), ran.stderr


def test_a_user_error_ends_the_command_with_2(tmp_path: pathlib.Path) -> None:
    ran = run_buffered(["export", f"--workdir={tmp_path}/none", "--output=y"], subprocess.PIPE)
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr.startswith("ranktuner: ")
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "expected a command"),
        (["bench", "speed"], "expected a command (bench loss"),
        (["train"], "--workdir"),
        (["train", "--workdir=x", "--steps=3"], "--steps=3"),
        (["train", "--workdir=x", "--config=nothing"], "--config: expected"),
        (["train", "--workdir=x", "--config.train.stps=3"], "unknown key --config.train.stps"),
        (["train", "--workdir=x", "--config.train.steps=a"], "config.train.steps"),
        (["export", "--workdir=nowhere", "--output=y"], "--workdir: expected the config of a run"),
        (["export", "--workdir=nowhere", "--output=y", "--stp=1"], "unknown argument '--stp=1'"),
    ],
)
def test_a_user_error_is_one_line_and_exit_code_2(
    argv: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
