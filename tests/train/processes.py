"""Runs of several real processes on this machine, over loopback."""

from __future__ import annotations

import concurrent.futures
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence


def start(
    arguments: Sequence[str],
    *,
    command: str = "train",
    processes: int = 2,
    devices: int = 4,
    env: Mapping[str, str] | None = None,
    own: Sequence[str] | None = None,
) -> list[subprocess.Popen[str]]:
    """Starts a command in each of several processes, which connect over a free port.

    Args:
      arguments: What follows `ranktuner` and the command.
      command: The command.
      processes: The number of processes.
      devices: Fake CPU devices of each.
      env: Further environment variables.
      own: One further argument for each process.
    """
    cluster = [f"--coordinator={_free_address()}", f"--processes={processes}"]
    run = ["-m", "ranktuner_jax.cli", command, *arguments, *cluster]
    return [
        _python(
            [*run, f"--process={process}", *(own[process : process + 1] if own else ())],
            devices,
            env,
        )
        for process in range(processes)
    ]


def start_script(script: str, *, processes: int = 2) -> list[subprocess.Popen[str]]:
    """Runs Python code in each of several processes, with the coordinator's address and its index.

    Args:
      script: The code; its arguments are in `sys.argv[1:]`.
      processes: The number of processes.
    """
    address = _free_address()
    return [_python(["-c", script, address, str(process)]) for process in range(processes)]


def _free_address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def _python(
    arguments: Sequence[str], devices: int = 1, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # The last of several values counts.
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        **(env or {}),
    }
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait(processes: Sequence[subprocess.Popen[str]], timeout: float) -> list[tuple[int, str]]:
    """Each process's exit code and standard error; all are killed after `timeout` seconds."""
    deadline = time.monotonic() + timeout

    def end(process: subprocess.Popen[str]) -> tuple[int, str]:
        try:
            _, stderr = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            for other in processes:
                other.kill()
            _, stderr = process.communicate()
        return process.returncode, stderr

    # Read concurrently: a process whose pipe is full blocks, and the others wait for it.
    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(end, processes))
