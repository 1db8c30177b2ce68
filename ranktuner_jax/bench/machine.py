"""What a benchmark ran on, and how fast that multiplies matrices by itself."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import jax

from ranktuner_jax.train.telemetry.utilisation import measured_flops

__all__ = ["describe_machine"]

DTYPES = ("float32", "bfloat16")


def describe_machine() -> dict[str, Any]:
    """The machine, as every record of a benchmark names it.

    Returns:
      `name`, of the device, or of the processor if that is the device; `backend`; `devices`;
      `cores`, those that this process may use; `jax`, its version; `load`, that of the last minute;
      and `peak_flops`: FLOP/s of the fastest of ten large matrix products on one device, by dtype,
      measured now in JAX's default precision, which for float32 is TF32 on NVIDIA's newer devices.

    Example:
      >>> machine = describe_machine()
      >>> machine["backend"], sorted(machine["peak_flops"])
      ('cpu', ['bfloat16', 'float32'])
    """
    device = jax.devices()[0]
    size = 1024 if device.platform == "cpu" else 8192
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "name": _processor() if device.platform == "cpu" else device.device_kind,
        "backend": device.platform,
        "devices": jax.device_count(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "jax": jax.__version__,
        "load": os.getloadavg()[0],
        "peak_flops": {dtype: max(measured_flops(dtype, size)) for dtype in DTYPES},
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "cpu")
