"""The job script of SLURM, with `srun` a few lines of bash: two real processes over loopback."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]

# Starts two processes that JAX takes for tasks of SLURM, and writes their ids to a file.
SRUN = """
shift
export SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=1 SLURM_STEP_NODELIST=localhost
for i in 0 1; do
  SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
  pids[i]=$!
done
echo "${pids[@]}" > "$PIDS"
code=0
for pid in "${pids[@]}"; do
  wait "$pid" || code=$?
done
exit "$code"
"""


def write_script(path: pathlib.Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


@pytest.mark.drill
def test_a_preempted_job_is_requeued_and_finishes(
    tmp_path: pathlib.Path, tiny_config_file: pathlib.Path
) -> None:
    repository, workdir, pids = tmp_path / "repository", tmp_path / "run", tmp_path / "pids"
    shutil.copytree(ROOT / "launch", repository / "launch")
    ranktuner = f'exec {sys.executable} -m ranktuner_jax.cli "$@"'
    write_script(repository / ".venv" / "bin" / "ranktuner", ranktuner)
    write_script(tmp_path / "bin" / "srun", SRUN)
    write_script(tmp_path / "bin" / "scontrol", f'echo "$*" > {tmp_path}/scontrol')
    command = [
        *("bash", str(repository / "launch" / "slurm.sbatch")),
        *(f"--config={tiny_config_file}", f"--workdir={workdir}"),
        *("--config.mesh.data=2", "--config.train.steps=40", "--config.eval.task="),
    ]
    env = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "PIDS": str(pids),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
    }
    job = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    metrics, deadline = workdir / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and "train/nll" in metrics.read_text()):
        assert job.poll() is None, job.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(
        int(pids.read_text().split()[1]), signal.SIGTERM
    )  # Only one of the processes gets the signal.
    stderr = job.communicate(timeout=120)[1]
    assert job.returncode == 0, stderr
    assert "stopped and saved after step" in stderr
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
    assert not (workdir / "result.json").exists()

    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    assert "resuming after step" in ran.stderr
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == [0, *range(1, 41), 40]
    assert (workdir / "result.json").exists()
