"""The launch scripts: what they print, and what they do with a cloud of a few lines of bash."""

import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted(path for path in (ROOT / "launch").iterdir() if path.suffix != ".md")
POD = {"ZONE": "us-west4-a", "TYPE": "v5litepod-16", "RUNTIME": "v2-alpha-tpuv5-lite"}

Fake = Callable[[str, str], None]


@pytest.fixture
def repository(tmp_path: pathlib.Path) -> pathlib.Path:
    """A repository with nothing but the scripts."""
    shutil.copytree(ROOT / "launch", tmp_path / "repository" / "launch")
    return tmp_path / "repository"


@pytest.fixture
def fake(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Installs a command at the front of PATH; each call is appended to `calls` as a line."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("PYTHON", sys.executable)

    def install(name: str, body: str) -> None:
        path = folder / name
        path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" | head -n 1 >> "$CALLS"\n{body}\n')
        path.chmod(0o755)

    return install


def launch(
    script: pathlib.Path, *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    # From another folder: scripts must not depend on it.
    return subprocess.run(
        ["bash", script, *arguments],
        cwd="/",
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
    )


def calls(tmp_path: pathlib.Path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_valid_and_shellcheck_finds_nothing(script: pathlib.Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    # Where pip installed it, also when the environment is not activated.
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    checker = shutil.which("shellcheck", path=path)
    assert checker is not None, "shellcheck is not installed: pip install '.[test]'"
    command = [checker, "--shell=bash", "--external-sources", f"--source-path={ROOT}", str(script)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("gpus", [False, True])
def test_a_dry_run_of_local_prints_its_commands_and_changes_nothing(
    gpus: bool, repository: pathlib.Path, fake: Fake
) -> None:
    fake("nvidia-smi", "exit 0" if gpus else "exit 9")
    before = sorted(repository.rglob("*"))
    ran = launch(repository / "launch" / "local.sh", "--dry-run", "--config=a b.py")
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0].startswith(f"{sys.executable} -m venv")
    extras = r"train\,eval\,cuda" if gpus else r"train\,eval"
    install = rf".venv/bin/uv pip install --quiet --python .venv --editable .\[{extras}\] "
    assert install in lines
    assert lines[-1].startswith("exec .venv/bin/ranktuner train --config=smollm2_chain_sum")
    assert lines[-1].endswith(r"--config=a\ b.py ")
    assert sorted(repository.rglob("*")) == before


def test_local_refuses_an_old_python(repository: pathlib.Path, fake: Fake) -> None:
    fake("python3", "exit 1")
    ran = launch(repository / "launch" / "local.sh", env={"PYTHON": "python3"})
    assert ran.returncode == 2
    assert "ranktuner needs Python 3.11 or later" in ran.stderr


def test_a_dry_run_of_a_pod_prints_every_command(
    repository: pathlib.Path, fake: Fake, tmp_path: pathlib.Path
) -> None:
    fake("gcloud", "exit 1")
    ran = launch(
        repository / "launch" / "tpu_pod.sh",
        "--dry-run",
        "x",
        "--workdir=gs://b/x",
        "--a=b c",
        env=POD,
    )
    assert ran.returncode == 0, ran.stderr
    starts = (
        ".venv/bin/ranktuner plan --topology=v5litepod-16 ",
        "gcloud compute tpus queued-resources create x --node-id=x --zone=us-west4-a",
        "tar --create",
        "gcloud compute tpus tpu-vm scp",
        "gcloud compute tpus tpu-vm ssh x --zone=us-west4-a --worker=all",
        "gcloud compute tpus tpu-vm ssh x --zone=us-west4-a --worker=all",
        "gcloud compute tpus queued-resources delete x",
    )
    lines = ran.stdout.splitlines()
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True)), lines
    assert "--spot" in lines[1]
    # Quoted twice: for the shell of a worker, and for the one this is pasted into.
    assert r"ranktuner train --distributed --workdir=gs://b/x --a=b\\ c" in lines[5]
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(
    ("arguments", "missing", "message"),
    [
        (["--workdir=gs://b/x"], "", "expected NAME --workdir=gs://BUCKET/FOLDER"),
        (["name", "--workdir=runs/x"], "", "expected NAME --workdir=gs://BUCKET/FOLDER"),
        (["name", "--workdir=gs://b/x"], "ZONE", "ZONE: must be set, e.g. us-west4-a"),
        (["name", "--workdir=gs://b/x"], "RUNTIME", "RUNTIME: must be set to the TPU software"),
    ],
)
def test_a_pod_needs_a_name_a_bucket_and_a_tpu_type(
    arguments: list[str], missing: str, message: str, repository: pathlib.Path, fake: Fake
) -> None:
    fake("gcloud", "exit 1")
    env = {name: value for name, value in POD.items() if name != missing}
    ran = launch(repository / "launch" / "tpu_pod.sh", *arguments, env=env)
    assert ran.returncode
    assert message in ran.stderr


# A fake cloud: each line of `story` is the next state of the slice; after ACTIVE comes the exit
# code of the run.
CLOUD = """
case "$*" in
  *describe*)
    read -r now < "$STORY" || exit 1
    [[ $now == ABSENT ]] && { sed -i 1d "$STORY"; exit 1; }
    echo "$now"
    [[ $now == ACTIVE ]] || sed -i 1d "$STORY" ;;
  *ranktuner\\ train*)
    code=$(sed -n 2p "$STORY")
    sed -i 1,2d "$STORY"
    exit "$code" ;;
esac
"""


@pytest.mark.parametrize(
    ("story", "code", "wanted"),
    [
        # Created, waited for, trained, deleted.
        (["ABSENT", "PROVISIONING", "ACTIVE", "0"], 0, ["create", "train", "delete"]),
        # Preempted with a notice: the state was saved, the slice was lost and created again.
        (
            ["ACTIVE", "75", "SUSPENDING", "SUSPENDED", "ABSENT", "ACTIVE", "0"],
            0,
            ["train", "delete", "create", "train", "delete"],
        ),
        # Preempted without one: the connection broke.
        (
            ["ACTIVE", "255", "SUSPENDED", "ABSENT", "ACTIVE", "0"],
            0,
            ["train", "delete", "create", "train", "delete"],
        ),
        # One worker was preempted, the others failed with errors of their own.
        (
            ["ACTIVE", "1", "SUSPENDED", "ABSENT", "ACTIVE", "0"],
            0,
            ["train", "create", "train", "delete"],
        ),
        # A bug, and a user error: the slice is kept.
        (["ACTIVE", "1", "ACTIVE", "-"], 1, ["train"]),
        (["ACTIVE", "2", "SUSPENDED"], 2, ["train"]),
    ],
)
def test_a_pod_is_created_again_until_the_run_is_finished(
    story: list[str],
    code: int,
    wanted: list[str],
    repository: pathlib.Path,
    fake: Fake,
    tmp_path: pathlib.Path,
) -> None:
    fake("gcloud", CLOUD)
    fake("sleep", "")
    (tmp_path / "story").write_text("".join(f"{line}\n" for line in story))
    ran = launch(
        repository / "launch" / "tpu_pod.sh",
        *("x", "--workdir=gs://b/x"),
        env={**POD, "STORY": str(tmp_path / "story"), "SPOT": "0"},
    )
    assert ran.returncode == code, ran.stderr
    did = []
    for line in (tmp_path / "calls").read_text().splitlines():
        did += [word for word in ("create", "delete") if f"queued-resources {word}" in line]
        did += ["train"] if "--command=cd ranktuner && while pkill" in line else []
        assert "--spot" not in line
    assert did == wanted
    assert ("to delete it:" in ran.stderr) == bool(code)


def install_planner(repository: pathlib.Path, code: int) -> None:
    """A .venv whose `ranktuner plan` ends with this code."""
    folder = repository / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name, body in (
        ("python", "exit 0"),
        ("ranktuner", f'echo "$*" >> "$PLANNED"\nexit {code}'),
    ):
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("planned", "skipped", "code", "requested"),
    [(0, "", 0, True), (3, "", 3, False), (2, "", 0, True), (3, "0", 0, True)],
)
def test_a_slice_is_not_requested_for_a_run_that_cannot_fit(
    planned: int,
    skipped: str,
    code: int,
    requested: bool,
    repository: pathlib.Path,
    fake: Fake,
    tmp_path: pathlib.Path,
) -> None:
    install_planner(repository, planned)
    fake("gcloud", CLOUD)
    fake("sleep", "")
    (tmp_path / "story").write_text("ABSENT\nACTIVE\n0\n")
    ran = launch(
        repository / "launch" / "tpu_pod.sh",
        *("x", "--workdir=gs://b/x", "--config=my.py", "--config.seed=1"),
        env={
            **POD,
            "STORY": str(tmp_path / "story"),
            "PLANNED": str(tmp_path / "planned"),
            **({"PLAN": skipped} if skipped else {}),
        },
    )
    assert ran.returncode == code, ran.stderr
    made = (tmp_path / "calls").is_file() and "queued-resources create" in "".join(calls(tmp_path))
    assert made == requested
    wanted = "plan --topology=v5litepod-16 --config=my.py --config.seed=1\n"
    assert (tmp_path / "planned").exists() == (not skipped)
    assert skipped or (tmp_path / "planned").read_text() == wanted
    assert ("no plan could be made" in ran.stderr) == (planned == 2)


@pytest.mark.parametrize(
    ("gpu", "planned", "code"),
    [("NVIDIA H100 80GB HBM3", 3, 3), ("NVIDIA H100 80GB HBM3", 0, 0), ("NVIDIA L4", 3, 0)],
)
def test_slurm_does_not_start_what_cannot_fit_on_a_gpu_that_is_known(
    gpu: str, planned: int, code: int, repository: pathlib.Path, fake: Fake, tmp_path: pathlib.Path
) -> None:
    install_planner(repository, planned)
    fake("nvidia-smi", f'echo "{gpu}"')
    fake("srun", "exit 0")
    env = {"SLURM_NTASKS": "8", "PLANNED": str(tmp_path / "planned")}
    ran = launch(repository / "launch" / "slurm.sbatch", "--workdir=x", "--config=my.py", env=env)
    assert ran.returncode == code, ran.stderr
    assert any(call.startswith("srun") for call in calls(tmp_path)) == (code == 0)
    if "H100" in gpu:
        assert (tmp_path / "planned").read_text() == "plan --topology=h100:8 --config=my.py\n"
    else:
        assert "no plan: it is made for" in ran.stderr


def test_a_dry_run_of_slurm_prints_its_commands(repository: pathlib.Path) -> None:
    ran = launch(repository / "launch" / "slurm.sbatch", "--dry-run", "--workdir=runs/x")
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0].endswith(".venv/bin/ranktuner train --distributed --workdir=runs/x ")
    assert lines[-1] == "exec scontrol requeue JOB "


def test_each_task_of_an_array_does_its_part_of_a_comparison(
    repository: pathlib.Path, fake: Fake, tmp_path: pathlib.Path
) -> None:
    fake("srun", "exit 0")
    array = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "8"}
    command = ("compare", "--output=runs/x")
    assert launch(repository / "launch" / "slurm.sbatch", *command, env=array).returncode == 0
    [call] = calls(tmp_path)
    assert call.endswith(".venv/bin/ranktuner compare --output=runs/x --part=2/8")


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (2, False), (75, True)])
def test_slurm_requeues_a_preempted_run_and_no_other(
    code: int, requeued: bool, repository: pathlib.Path, fake: Fake, tmp_path: pathlib.Path
) -> None:
    fake("srun", f"exit {code}")
    fake("scontrol", "")
    ran = launch(repository / "launch" / "slurm.sbatch", "--workdir=x", env={"SLURM_JOB_ID": "7"})
    assert ran.returncode == (0 if requeued else code)
    assert ("scontrol requeue 7" in calls(tmp_path)) == requeued
