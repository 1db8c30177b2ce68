"""Export a run's checkpoint as a Hugging Face folder for transformers and vLLM.

ranktuner export --workdir=runs/first --output=exported
ranktuner export --workdir=runs/first --step=50 --output=exported-50
ranktuner export --workdir=runs/lora --merge --output=merged
"""

from __future__ import annotations

import argparse
import ctypes
import sys

from ranktuner_jax.train.export import export

__all__ = ["add_arguments", "run"]

_M_MMAP_THRESHOLD = -3  # From malloc.h.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ranktuner export`."""
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--output", required=True, help="folder to write; must not exist yet")
    parser.add_argument("--step", type=int, help="step of the checkpoint [the newest intact one]")
    parser.add_argument(
        "--merge", action="store_true", help="write the whole model, with its adapters added to it"
    )


def run(args: argparse.Namespace) -> int:
    """Exports the checkpoint."""
    _return_freed_memory()
    step = export(args.workdir, args.output, args.step, merge=args.merge)
    print(f"exported step {step} of {args.workdir} to {args.output}")
    return 0


def _return_freed_memory() -> None:
    """Makes glibc return large freed blocks to the system instead of keeping them per thread."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 2**20)
