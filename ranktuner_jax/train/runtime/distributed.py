"""Runs of several processes: their flags, how they connect, and how they exit on failure."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # The store has no public API.

from ranktuner_jax.errors import RunError, UserError

__all__ = ["add_arguments", "exit_without_waiting", "initialize"]

# A process without a heartbeat for this long is considered dead, and the others exit. Neither
# checkpoints nor compilation block the heartbeat's thread.
_HEARTBEAT_SECONDS = 30
# How long a failed process 0 waits for the others to report their own failure.
_LAST_EXIT_SECONDS = 20.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a multi-process run."""
    group = parser.add_argument_group("multi-process runs")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="let JAX detect the other processes (TPU pods, SLURM, Open MPI)",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process", type=int, metavar="I", help="index of this one, from 0")


def initialize(args: argparse.Namespace) -> None:
    """Connects to the other processes; does nothing if none of the flags is given.

    Must be called before JAX initializes its devices.

    Args:
      args: The flags of `add_arguments`.

    Raises:
      UserError: If some of the flags are missing, or the other processes cannot be reached.

    Example:
      >>> parser = argparse.ArgumentParser()
      >>> add_arguments(parser)
      >>> initialize(parser.parse_args([]))
      >>> initialize(parser.parse_args(["--processes=2"]))
      Traceback (most recent call last):
      ranktuner_jax.errors.UserError: --coordinator, --processes, --process: expected all three, ...
    """
    address = (args.coordinator, args.processes, args.process)
    given = sum(value is not None for value in address)
    if (given, args.distributed) == (0, False):
        return
    if (given, args.distributed) not in ((0, True), (3, False)):
        raise UserError(
            "--coordinator, --processes, --process: expected all three, or --distributed alone "
            "if JAX can detect the processes; got "
            f"--coordinator={args.coordinator} --processes={args.processes} "
            f"--process={args.process} --distributed={args.distributed}"
        )
    if given and not 0 <= args.process < args.processes:
        raise UserError(
            f"--process: expected a number from 0 to {args.processes - 1} (--processes minus 1), "
            f"got {args.process}"
        )
    try:
        jax.distributed.initialize(*address, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--distributed: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def exit_without_waiting() -> Iterator[None]:
    """Makes a process that cannot continue exit with code 1, without waiting for the others' work.

    A failed process, device or disk is one line; an error in the code keeps its traceback.

    A normal exit would wait for all processes (saves, JAX's shutdown), and one may be dead. A run
    of one process raises the error instead.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or isinstance(error, UserError):
            raise
        line = (str(error).splitlines() or [""])[0]
        if isinstance(error, RunError):
            print(f"ranktuner: {line}", file=sys.stderr, flush=True)
        elif isinstance(error, jax.errors.JaxRuntimeError):
            print(
                f"ranktuner: a device or another process of the run failed ({line[:200]}); run the "
                "same command in all processes to resume from the newest checkpoint",
                file=sys.stderr,
                flush=True,
            )
        else:
            traceback.print_exc()
            sys.stderr.flush()
        _let_others_exit_first()
        os._exit(1)


def _let_others_exit_first() -> None:
    """On process 0, waits briefly until the others are about to exit; tells it so on the others.

    JAX aborts a process that loses process 0, which hosts the coordination service. Where all fail
    together, each should exit with its own message instead.
    """
    store: Any = jax_distributed.global_state.client
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        if jax.process_index():
            store.key_value_set(f"ranktuner/exits/{jax.process_index()}", "")
            return
        deadline = time.monotonic() + _LAST_EXIT_SECONDS
        for process in range(1, jax.process_count()):
            left = max(deadline - time.monotonic(), 0.001)
            store.blocking_key_value_get(f"ranktuner/exits/{process}", int(1000 * left))
        time.sleep(1.0)  # From the notice to the exit.
