"""Runs of several processes: their flags, how they connect, and how they exit on failure."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Iterator

import jax

from ranktuner_jax.errors import RunError, UserError

__all__ = ["add_arguments", "exit_without_waiting", "initialize"]

# A process without a heartbeat for this long is considered dead, and the others exit. Neither
# checkpoints nor compilation block the heartbeat's thread.
_HEARTBEAT_SECONDS = 30


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
    """Makes a process that cannot continue exit immediately, with exit code 1.

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
        if not isinstance(error, RunError | jax.errors.JaxRuntimeError):
            traceback.print_exc()
            os._exit(1)
        if not isinstance(error, RunError):
            line = (
                f"a device or another process of the run failed ({line[:200]}); run the same "
                "command in all processes to resume from the newest checkpoint"
            )
        print(f"ranktuner: {line}", file=sys.stderr, flush=True)
        os._exit(1)
