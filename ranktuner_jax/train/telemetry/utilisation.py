"""Utilisation of the hardware by a training step: FLOPs and memory."""

from __future__ import annotations

import functools
import math
import resource
import sys
import time
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from ranktuner_jax import models

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PEAK_FLOPS", "Utilisation", "measured_flops", "peak_flops", "step_flops"]

# Dense bfloat16 FLOP/s of one JAX device, as specified by its vendor, by prefix of `device_kind`;
# the first match counts. TPUs: the page of each version under
# https://docs.cloud.google.com/tpu/docs. GPUs: NVIDIA's data sheets, without sparsity.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,  # v6e, Trillium
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,  # SXM
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
}


def peak_flops(device_kind: str) -> float | None:
    """The peak bfloat16 FLOP/s of a device; None if unknown.

    Example:
      >>> peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("cpu")
      (989000000000000.0, None)
    """

    def fits(name: str) -> bool:
        # Whole words only: an L40S is not an L4.
        rest = device_kind.removeprefix(name)
        return rest != device_kind and not rest[:1].isalnum()

    return next((peak for name, peak in PEAK_FLOPS.items() if fits(name)), None)


def measured_flops(dtype: str, size: int) -> list[float]:
    """FLOP/s of each of ten products of two square matrices, on the first device.

    They are summed in float32, as the model's are: a CPU's units for 16 bits do no others.

    Args:
      dtype: Of the matrices.
      size: Their rows and columns.

    Example:
      >>> min(measured_flops("bfloat16", 64)) > 0
      True
    """
    # Random numbers, for a device draws less power with ones, and then runs faster.
    square = jax.random.normal(jax.random.key(0), (size, size), dtype)
    function = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    product = jax.jit(function).lower(square, square).compile()
    jax.block_until_ready(product(square, square))
    found = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(product(square, square))
        found.append(2 * size**3 / (time.perf_counter() - start))
    return found


def step_flops(
    config: models.DecoderConfig,
    tokens: float,
    supervised: float,
    seen: float,
    lora: models.Lora | None = None,
) -> float:
    """Model FLOPs of the matrix products of a step, forward and backward.

    6 per token and parameter of the layers, 6 per supervised token and entry of the unembedding,
    and 12·heads·head_dim per layer and pair of tokens of which one attends to the other (ignoring
    sliding windows). Padding, recomputation and masked attention are not counted. What adapters
    keep frozen has no gradient: 4 instead of 6 for it, and 6 for the adapters, that of the head per
    supervised token; the B of the embeddings' is looked up.

    Args:
      config: The model.
      tokens: Number of tokens that are not padding.
      supervised: Number of tokens with a loss.
      seen: Number of tokens that each token attends to, itself included, summed over all tokens.
      lora: The adapters, if they alone are trained.

    Example:
      >>> tiny = models.DecoderConfig(vocab_size=10, hidden_size=2, intermediate_size=3,
      ...                             num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2)
      >>> step_flops(tiny, tokens=1, supervised=0, seen=0) / 6  # q, k, v, o and the mlp's three
      34.0
      >>> step_flops(tiny, tokens=0, supervised=1, seen=1)
      144
    """
    width, heads = config.hidden_size, config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    layer = 2 * width * (heads + kv_heads) + 3 * width * config.intermediate_size
    passes, adapters, head = 6, 0, 0
    if lora is not None:
        passes = 4
        for name, shape in models.adapter_shapes(config, lora).items():
            if name.startswith("head"):
                head += math.prod(shape)
            elif name != "embed_lora_b":
                adapters += math.prod(shape)
    return (
        (passes * config.num_layers * layer + 6 * adapters) * tokens
        + (passes * width * config.vocab_size + 6 * head) * supervised
        + 12 * config.num_layers * heads * seen
    )


class Utilisation:
    """Compares the FLOPs of a step with the peak of the devices, and reads their memory use.

    Args:
      config: The model.
      devices: All devices of the run.
      lora: The adapters, if they alone are trained.
    """

    def __init__(
        self,
        config: models.DecoderConfig,
        devices: Sequence[jax.Device],
        lora: models.Lora | None = None,
    ) -> None:
        self._config, self._count, self._lora = config, len(devices), lora
        self._peak = peak_flops(devices[0].device_kind)

    def metrics(
        self, *, tokens: float, supervised: float, seen: float, seconds: float
    ) -> dict[str, float]:
        """Utilisation metrics of one step.

        Returns:
          `tflops_per_device` (per second), `mfu` if the peak of the devices is known,
          `memory/host_peak_gb` (of this process, since its start) and, if the backend reports it,
          `memory/device_peak_gb` (the fullest device of this process).
        """
        flops = step_flops(self._config, tokens, supervised, seen, self._lora)
        rate = flops / seconds / self._count
        values = {"tflops_per_device": rate / 1e12, "memory/host_peak_gb": _host_peak() / 1e9}
        if self._peak is not None:
            values["mfu"] = rate / self._peak
        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        if used := [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]:
            values["memory/device_peak_gb"] = max(used) / 1e9
        return values


def _host_peak() -> int:
    """The peak memory of this process, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
