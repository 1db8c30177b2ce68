"""RankTuner's loss and its gradients on this device, beside their definition in float64 NumPy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from ranktuner_jax import losses
from ranktuner_jax.bench.gpu.case import Case

__all__ = ["cases", "definition"]

SHAPE = {False: (1024, 256, 8191), True: (64, 16, 257)}
# Of the loss, and of gradients divided by their largest entry. Sums in another order are 2e-5 off.
# The expected rank of "exact" comes from a histogram, within 0.34 % of it by construction. In
# bfloat16 logits and sums are float32, but the gradient of the logits is rounded to 2^-9.
ALLOWED = {
    ("bound", "float32"): (2e-5, 2e-5),
    ("exact", "float32"): (1e-3, 1e-3),
    ("bound", "bfloat16"): (2e-5, 1e-2),
    ("exact", "bfloat16"): (1e-3, 1e-2),
}


def cases(small: bool) -> Iterator[Case]:
    """Fused and sharded, each scale, in both types."""
    size, features, vocab = SHAPE[small]
    rng = np.random.default_rng(0)
    hidden = 4 * rng.standard_normal((size, features))
    unembed = rng.standard_normal((vocab, features)) / features**0.5
    # Half of the labels are those that the model is surest of, so that no rank is left out.
    labels = np.where(
        rng.random(size) < 0.5, (hidden @ unembed.T).argmax(1), rng.integers(0, vocab, size)
    ).astype(np.int32)
    mask = rng.random(size) < 0.8
    forms = {"fused": _fused, f"sharded over {jax.device_count()} devices": _sharded}
    for dtype in ("float32", "bfloat16"):
        # Rounded first: the definition gets the same numbers.
        arrays = jnp.asarray(hidden, dtype), jnp.asarray(unembed, dtype), labels, mask
        for scale in ("bound", "exact"):
            for name, form in forms.items():
                yield Case(
                    f"N {size}, D {features}, V {vocab}, beside float64",
                    f'{name}, scale="{scale}", {dtype}',
                    dtype,
                    functools.partial(_compare, form, scale, arrays, ALLOWED[scale, dtype]),
                )


def _compare(
    form: Callable[..., Any], scale: str, arrays: tuple[Any, ...], allowed: tuple[float, float]
) -> dict[str, float]:
    graded = jax.value_and_grad(form(scale, len(arrays[1])), argnums=(0, 1))
    with jax.default_matmul_precision("highest"):  # Not TF32.
        loss, gradients = jax.jit(graded)(*arrays)
    want, *wanted = definition(scale, *arrays)
    differences = [
        np.abs(np.asarray(ours, np.float64) - right).max() / np.abs(right).max()
        for ours, right in zip(gradients, wanted, strict=True)
    ]
    return {
        "loss error": abs(float(loss) - want) / want,
        "loss allowed": allowed[0],
        "gradient error": float(max(differences)),
        "gradient allowed": allowed[1],
    }


def _fused(scale: Literal["bound", "exact"], vocab: int) -> Callable[..., Any]:
    def loss(hidden: Any, unembed: Any, labels: Any, mask: Any) -> Any:
        weighting = losses.RankTuner(scale=scale)
        return losses.fused_weighted_nll(hidden, unembed, labels, mask, weighting=weighting).mean()

    return loss


def _sharded(scale: Literal["bound", "exact"], vocab: int) -> Callable[..., Any]:
    devices = jax.device_count()
    parts = 2 if devices % 2 == 0 else 1
    mesh = jax.make_mesh(
        (devices // parts, parts), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2
    )
    sharded = losses.sharded_weighted_nll(
        mesh,
        batch_axes="data",
        vocab_axis="tensor",
        weighting=losses.RankTuner(scale=scale),
        vocab_size=vocab,
    )

    def loss(hidden: Any, unembed: Any, labels: Any, mask: Any) -> Any:
        padded = jnp.pad(unembed, ((0, -vocab % parts), (0, 0)))
        return sharded(hidden, padded, labels, mask).mean()

    return loss


def definition(
    scale: str, hidden: Any, unembed: Any, labels: np.ndarray, mask: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """The paper's loss in float64, and its gradients by hidden states and unembedding.

    Args:
      scale: "bound" or "exact".
      hidden: Hidden states [N, D].
      unembed: Unembedding [V, D].
      labels: Labels [N].
      mask: Supervised positions [N].

    Example:
      >>> ones = np.ones((1, 1))  # Two tokens, equally likely: the label ranks second of 1.5.
      >>> loss, _, _ = definition("exact", ones, np.ones((2, 1)), np.array([0]), ones[0] > 0)
      >>> round(float(loss / (0.5 * np.log(2))), 4)
      1.0909
    """
    hidden, unembed = (np.asarray(array, np.float64) for array in (hidden, unembed))
    rows, vocab = np.arange(len(labels)), len(unembed)
    logits = hidden @ unembed.T
    logits -= logits.max(1, keepdims=True)
    probs = np.exp(logits)
    probs /= probs.sum(1, keepdims=True)
    prob = probs[rows, labels]
    rank = (logits >= logits[rows, labels][:, None]).sum(1)
    if scale == "exact":
        expected = np.sort(probs, axis=1)[:, ::-1] @ np.arange(1, vocab + 1)
        weights = 2 ** (1 / np.log2(expected + 1) - 1 / np.log2(rank + 1))
    else:
        bits = -(probs * np.log2(probs, where=probs > 0, out=np.zeros_like(probs))).sum(1)
        bound = np.where(bits >= 2, 2**bits / 4 + 1, 2 - probs.max(1))
        exponent = 1 / np.log2(np.maximum(bound, rank) + 1) ** 2
        weights = np.maximum(prob * bound, 1e-6) ** -exponent
    weights = mask * prob * weights / mask.sum()
    d_logits = probs
    d_logits[rows, labels] -= 1
    d_logits *= weights[:, None]
    return float(-(weights * np.log(prob)).sum()), d_logits @ unembed, d_logits.T @ hidden
