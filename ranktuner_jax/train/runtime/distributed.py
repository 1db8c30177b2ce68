"""A run of several processes: the flags by which they find each other."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator

import jax

from ranktuner_jax.errors import RunError, UserError

__all__ = ["add_arguments", "end_alone", "initialize"]

# A process that is silent for so long is taken for dead, and the others end. Checkpoints and
# compilation leave the heartbeat's thread alone, so that silence means what it says.
_HEARTBEAT_SECONDS = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of a run of several processes."""
    group = parser.add_argument_group("several processes")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes that JAX finds by itself: TPU pods, SLURM, Open MPI",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")


def initialize(args: argparse.Namespace) -> None:
    """Joins the other processes; does nothing where no flag asks for it.

    It has to be called before anything touches a device.

    Args:
      args: The flags of `add_arguments`.

    Raises:
      UserError: If the flags do not make a whole, or the others cannot be reached.

    Example:
      >>> parser = argparse.ArgumentParser()
      >>> add_arguments(parser)
      >>> initialize(parser.parse_args([]))
      >>> initialize(parser.parse_args(["--processes=2"]))
      Traceback (most recent call last):
      ranktuner_jax.errors.UserError: --coordinator, --processes, --process: expected all three, ...
    """
    place = (args.coordinator, args.processes, args.process)
    given = sum(value is not None for value in place)
    if (given, args.distributed) == (0, False):
        return
    if (given, args.distributed) not in ((0, True), (3, False)):
        raise UserError(
            "--coordinator, --processes, --process: expected all three, or --distributed alone "
            "where JAX finds the processes by itself; got "
            f"--coordinator={args.coordinator} --processes={args.processes} "
            f"--process={args.process} --distributed={args.distributed}"
        )
    if given and not 0 <= args.process < args.processes:
        raise UserError(
            f"--process: expected a number from 0 to {args.processes - 1} (--processes minus 1), "
            f"got {args.process}"
        )
    try:
        jax.distributed.initialize(*place, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--distributed: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def end_alone() -> Iterator[None]:
    """Lets a process that cannot go on end at once, in one line and with exit code 1.

    Saves and the end of JAX's own service wait for all processes, of which one may be gone. A run
    of one process raises as ever.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, RunError) as error:
        if jax.process_count() == 1:
            raise
        line = str(error).splitlines()[0]
        if not isinstance(error, RunError):
            line = (
                f"a device or another process of the run is gone ({line[:200]}); the same command, "
                "in all processes, goes on from the newest checkpoint"
            )
        print(f"ranktuner: {line}", file=sys.stderr, flush=True)
        os._exit(1)
