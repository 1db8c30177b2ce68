"""What one device of each kind can do, by the numbers that its vendor gives."""

from __future__ import annotations

import dataclasses
import functools
import timeit

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh

from ranktuner_jax.errors import UserError
from ranktuner_jax.train.telemetry.utilisation import measured_flops

__all__ = ["Chip", "chip_of"]


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device, as JAX counts them.

    Attributes:
      kind: JAX's `device_kind`.
      memory_gb: Its main memory, in GB (1e9 bytes); None if it is the host's.
      flops: FLOP/s of matrix products, in bfloat16 if it has units for them.
      memory_bandwidth: Bytes/s of its main memory.
      network_bandwidth: Bytes/s that it sends to its neighbors over all links; None if it has none.
      dcn_bandwidth: Its share of the bytes/s that its slice sends to others; None if not known.
    """

    kind: str
    memory_gb: float | None
    flops: float
    memory_bandwidth: float
    network_bandwidth: float | None
    dcn_bandwidth: float | None = None


# The chip's interconnect, bit/s one way over all links, from the page of each version under
# https://docs.cloud.google.com/tpu/docs (v5e: "1600 Gbps", elsewhere "bidirectional 400 GBps"); its
# share of the data center's network, from there too (v5e and v6e: that of a pod of 256 chips, 6.4
# and 25.6 Tbps; v4: not given); and the cores that are one device in JAX.
_TPUS: dict[str, tuple[float, float | None, int]] = {
    "TPU v4": (2400e9, None, 2),
    "TPU v5 lite": (1600e9, 25e9, 1),
    "TPU v5": (4800e9, 50e9, 2),
    "TPU v6 lite": (3584e9, 100e9, 1),
}
# NVIDIA's data sheets: memory, bandwidth, dense bfloat16, NVLink (both ways together).
_GPUS = {
    "NVIDIA H100 80GB HBM3": Chip("NVIDIA H100 80GB HBM3", 85.0, 989e12, 3.35e12, 450e9),
    "NVIDIA A100-SXM4-80GB": Chip("NVIDIA A100-SXM4-80GB", 85.0, 312e12, 2.04e12, 300e9),
}


def chip_of(device: jax.Device, compute_dtype: str = "bfloat16") -> Chip:
    """The numbers of a device that may only be compiled for.

    Args:
      device: The device. This machine's CPU is measured, which takes a few seconds.
      compute_dtype: The type of the matrix products that a CPU is measured by.

    Raises:
      UserError: If they are not known.

    Example:
      >>> chip_of(jax.devices()[0]).kind
      'cpu'
    """
    kind = device.device_kind
    if device.platform == "cpu":
        return _measured_cpu(compute_dtype)
    if kind in _GPUS:
        return _GPUS[kind]
    if kind not in _TPUS:
        raise UserError(
            f"--topology: expected one of {', '.join([*_TPUS, *_GPUS])}, whose numbers are known, "
            f"got {kind}"
        )
    # JAX's own constants, which it has by the core.
    from jax.experimental.pallas import tpu as pltpu

    network, dcn, cores = _TPUS[kind]
    abstract = AbstractDevice(kind, num_cores=cores, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=abstract)):
        info = pltpu.get_tpu_info()
    return Chip(
        kind,
        cores * info.hbm_capacity_bytes / 1e9,
        cores * info.bf16_ops_per_second,
        cores * info.mem_bw_bytes_per_second,
        network / 8,
        dcn and dcn / 8,
    )


@functools.cache
def _measured_cpu(compute_dtype: str) -> Chip:
    """This machine's, by large matrix products and by reading an array."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        # A step multiplies all the time, and caches hold part of what it reads: the median of the
        # one, the best of the other.
        flops = float(np.median(measured_flops(compute_dtype, 2048)))
        array = jnp.ones(64 * 2**20, jnp.float32)
        # Read only: a result's memory would be new each time, and cleared first.
        read = jax.jit(jnp.max)
        seconds = timeit.repeat(lambda: read(array).block_until_ready(), number=1, repeat=10)
    return Chip("cpu", None, flops, array.nbytes / min(seconds), None)
