"""The same in torch, eager and compiled, and Liger's fused cross entropy; where they are there."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Iterator

from ranktuner_jax.bench import torch_losses
from ranktuner_jax.bench.gpu.case import Case
from ranktuner_jax.bench.gpu.loss_speed import speed_cases

__all__ = ["cases"]


def cases(small: bool) -> Iterator[Case]:
    """None without torch; what needs Triton only on a GPU."""
    found = dict(torch_losses.EAGER)
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed: no comparison with it", file=sys.stderr)
        found = {}
    elif _has_gpu():
        found |= torch_losses.COMPILED
        if importlib.util.find_spec("liger_kernel") is not None:
            found |= torch_losses.FUSED
    rows = {
        name: functools.partial(torch_losses.torch_row, name, loss) for name, loss in found.items()
    }
    return speed_cases(rows, small)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
