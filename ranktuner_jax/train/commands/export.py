"""Write a run's checkpoint as a Hugging Face folder, which transformers and vLLM load.

ranktuner export --workdir=runs/first --output=exported
ranktuner export --workdir=runs/first --step=50 --output=exported-50
"""

from __future__ import annotations

import argparse
import ctypes
import sys

from ranktuner_jax.train.export import export

__all__ = ["add_arguments", "run"]

_M_MMAP_THRESHOLD = -3  # As malloc.h has it.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `ranktuner export` takes."""
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--output", required=True, help="folder to write; it must not exist yet")
    parser.add_argument("--step", type=int, help="which checkpoint; the newest by default")


def run(args: argparse.Namespace) -> int:
    """Runs it."""
    _give_back_what_is_freed()
    step = export(args.workdir, args.output, args.step)
    print(f"step {step} of {args.workdir} is in {args.output}")
    return 0


def _give_back_what_is_freed() -> None:
    """Large blocks go back to the system: glibc keeps those that each thread of a pool freed."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 2**20)
