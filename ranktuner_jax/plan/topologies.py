"""Devices to compile for, by the name of a topology; none of them has to be attached."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax._src import xla_bridge
from jax.experimental import topologies

from ranktuner_jax.errors import UserError

__all__ = ["ACCELERATORS", "TOPOLOGIES", "devices"]

TOPOLOGIES = (
    "a TPU's version and shape such as v5e:8x8 or v5p:4x4x4 (v4, v5e, v5p, v6e), with N*, such as "
    "2*v5e:8x8, for N slices; its name in Google Cloud such as v5litepod-64; h100 or a100-80g, "
    "with :N for N GPUs; or cpu:N"
)

# Google Cloud names a slice by its chips, or by its cores (two a chip) in v4 and v5p. Shapes are
# those of https://docs.cloud.google.com/tpu/docs.
_SQUARES = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {
    8: "2x2x1",
    16: "2x2x2",
    32: "2x2x4",
    64: "2x4x4",
    128: "4x4x4",
    256: "4x4x8",
    512: "4x8x8",
    1024: "8x8x8",
}
ACCELERATORS = {
    **{f"v5litepod-{n}": f"v5e:{shape}" for n, shape in _SQUARES.items()},
    **{f"v6e-{n}": f"v6e:{shape}" for n, shape in _SQUARES.items()},
    **{f"v4-{n}": f"v4:{shape}" for n, shape in _CUBES.items()},
    **{f"v5p-{n}": f"v5p:{shape}" for n, shape in _CUBES.items()},
}

# What XLA wants to know of a GPU that is not there (GpuTargetConfigProto, as text), with the
# numbers of NVIDIA's data sheets and of its CUDA programming guide for that compute capability.
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {core_bytes}
  shared_memory_per_block_optin: {block_bytes}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2_bytes}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{name}"
"""
_GPUS = {
    "h100": {
        "name": "NVIDIA H100 80GB HBM3",
        "cores": 132,
        "lanes": 128,
        "core_bytes": 233472,
        "block_bytes": 232448,
        "bandwidth": 3352000000000,
        "l2_bytes": 52428800,
        "clock": 1.98,
        "memory": 85520809984,
        "major": 9,
    },
    "a100-80g": {
        "name": "NVIDIA A100-SXM4-80GB",
        "cores": 108,
        "lanes": 64,
        "core_bytes": 167936,
        "block_bytes": 166912,
        "bandwidth": 2039000000000,
        "l2_bytes": 41943040,
        "clock": 1.41,
        "memory": 85899345920,
        "major": 8,
    },
}
_PER_HOST = 8


def devices(name: str) -> Sequence[jax.Device]:
    """The devices of a topology.

    Args:
      name: One of `TOPOLOGIES`.

    Raises:
      UserError: If there is no such topology, or what compiles for it is not installed.

    Example:
      >>> devices("cpu:1")[0].platform
      'cpu'
    """
    name = ACCELERATORS.get(name, name)
    if match := re.fullmatch(r"cpu:(\d+)", name):
        return _cpus(int(match[1]))
    if match := re.fullmatch(r"(?:(\d+)\*)?(v\d\w*:\d+(?:x\d+)+)", name):
        return _tpus(match[2], int(match[1] or 1))
    if (match := re.fullmatch(r"([a-z]\w*(?:-\w+)?)(?::(\d+))?", name)) and match[1] in _GPUS:
        return _gpus(match[1], int(match[2] or 1))
    raise UserError(f"--topology: expected {TOPOLOGIES}, got {name!r}")


def _cpus(count: int) -> Sequence[jax.Device]:
    # Before the backend is initialized there may be as many as one likes.
    if not xla_bridge.backends_are_initialized():
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    found = jax.devices("cpu")
    if not 0 < count <= len(found):
        raise UserError(f"--topology: expected cpu:1 to cpu:{len(found)} here, got cpu:{count}")
    return found[:count]


def _tpus(name: str, slices: int) -> Sequence[jax.Device]:
    # Without a TPU there is no server that knows about it, and warnings about that help nobody.
    for variable, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-8"),
        ("TPU_MIN_LOG_LEVEL", "3"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "true"),
    ):
        os.environ.setdefault(variable, value)
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if name.startswith("v4"):
        options["chip_config_name"] = "megacore"  # As JAX runs them: the two cores are one device.
    needs = "libtpu (pip install 'ranktuner-jax[tpu]'; no TPU), and a shape that its version has"
    return _described(name, needs, platform="tpu", topology_name=name, **options)


def _gpus(name: str, count: int) -> Sequence[jax.Device]:
    if not count > 0 or (count > _PER_HOST and count % _PER_HOST):
        raise UserError(
            f"--topology: expected at most {_PER_HOST} GPUs, or a multiple, got {name}:{count}"
        )
    shape = f"1x{max(1, count // _PER_HOST)}x{min(count, _PER_HOST)}"
    needs = "JAX's CUDA plugin (pip install 'ranktuner-jax[cuda]'; no GPU)"
    return _described(
        name,
        needs,
        platform="cuda",
        topology_name=shape,
        topology=shape,
        target_config=_GPU.format(**_GPUS[name]),
    )


def _described(name: str, needs: str, **description: Any) -> Sequence[jax.Device]:
    # What is compiled for a device that is not there must not look for one.
    jax.config.update("jax_platforms", "cpu")
    try:
        return topologies.get_topology_desc(**description).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        lines = str(error).splitlines()
        raise UserError(f"--topology: {name!r} needs {needs}: {lines[0]}") from None
