"""The losses in torch, to compare with: eager, compiled, and Liger's fused cross entropy."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ranktuner_jax.bench.row import Row

__all__ = ["COMPILED", "EAGER", "FUSED", "torch_ranktuner", "torch_row"]


def torch_ranktuner(torch: Any, logits: Any, labels: Any, base: str = "prob") -> Any:
    """The paper's loss, as in its authors' code."""
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    nll = -log_probs.gather(1, labels[:, None])[:, 0]
    with torch.no_grad():
        probs = log_probs.exp()
        bits = -(probs * log_probs).sum(-1) / np.log(2)
        bound = torch.where(bits >= 2, 0.25 * 2**bits + 1, 2 - probs.max(-1).values)
        rank = (logits >= logits.gather(1, labels[:, None])).sum(-1)
        exponent = 1 / torch.log2(torch.maximum(bound, rank) + 1) ** 2
        prob = torch.exp(-nll)
        weights = torch.clamp(prob * bound, min=1e-6) ** -exponent
        weights = prob * weights if base == "prob" else weights
    return (weights * nll).sum() / len(nll)


def _cross_entropy(hidden: Any, unembed: Any, labels: Any, mask: Any) -> Any:
    import torch

    logits = (hidden @ unembed.T).float()
    return torch.nn.functional.cross_entropy(logits, labels.where(mask, -100))


def _logits_filtered(hidden: Any, unembed: Any, labels: Any, mask: Any) -> Any:
    import torch

    return torch_ranktuner(torch, (hidden @ unembed.T)[mask], labels[mask])


def _hidden_filtered(hidden: Any, unembed: Any, labels: Any, mask: Any) -> Any:
    import torch

    return torch_ranktuner(torch, hidden[mask] @ unembed.T, labels[mask])


def _compiled(loss: Callable[..., Any]) -> Callable[..., Any]:
    @functools.cache
    def compiled() -> Any:
        import torch

        return torch.compile(loss)

    return lambda *inputs: compiled()(*inputs)


def _liger(hidden: Any, unembed: Any, labels: Any, mask: Any) -> Any:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(unembed, hidden, labels.where(mask, -100))


# Functions of (hidden, unembed, labels, mask), tensors, that return the mean loss.
EAGER: dict[str, Callable[..., Any]] = {
    "torch CE": _cross_entropy,
    "torch RankTuner, logits filtered": _logits_filtered,
    "torch RankTuner, hidden filtered": _hidden_filtered,
}
COMPILED = {f"{name}, compiled": _compiled(loss) for name, loss in EAGER.items()}
FUSED = {"Liger fused CE": _liger}  # Triton kernels: only for a GPU.


def torch_row(
    name: str,
    loss: Callable[..., Any],
    inputs: tuple[np.ndarray, ...],
    masks: Mapping[float, np.ndarray],
    dtype: str,
) -> Row:
    """Runs a loss and its gradients on a GPU if torch has one, else on all cores.

    Args:
      name: The loss.
      loss: The loss.
      inputs: As `random_inputs` returns them.
      masks: The supervised positions, by their fraction.
      dtype: What hidden states and unembedding are cast to.
    """
    import torch

    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    hidden, unembed = (
        torch.from_numpy(x).to(device, getattr(torch, dtype)).requires_grad_() for x in inputs[:2]
    )
    labels = torch.from_numpy(inputs[2]).long().to(device)

    def step(mask: Any) -> None:
        hidden.grad = unembed.grad = None
        loss(hidden, unembed, labels, mask).backward()
        if gpu:
            torch.cuda.synchronize()

    placed = {share: torch.from_numpy(mask).to(device) for share, mask in masks.items()}
    row = Row(name, {share: functools.partial(step, mask) for share, mask in placed.items()})
    if gpu:
        call = next(iter(row.calls.values()))
        call()  # Compiles, and allocates what is kept.
        hidden.grad = unembed.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        row.peak_bytes = torch.cuda.max_memory_allocated() - before
    return row
