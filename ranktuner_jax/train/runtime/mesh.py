"""The mesh of a run, and batches placed on it; where parameters lie, `models.partition` says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ranktuner_jax.errors import UserError
from ranktuner_jax.train.config import MeshConfig

__all__ = ["AXES", "BATCH_AXES", "check_batch", "make_mesh", "place_batch", "row_share"]

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the axes data, fsdp and tensor; a size of -1 takes the devices left over.

    The later an axis, the more it talks, and the nearer to each other are its devices.

    Args:
      config: The sizes.
      devices: The devices to use; all by default.

    Returns:
      The mesh.

    Raises:
      UserError: If the sizes do not multiply to the number of devices, or do not divide over the
        slices of a TPU.

    Example:
      >>> dict(make_mesh(MeshConfig(data=-1), jax.devices()[:1]).shape)
      {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    given = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // given if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh: expected sizes that multiply to the number of devices, {len(devices)}, got "
            + ", ".join(f"{axis}={getattr(config, axis)}" for axis in AXES)
        )
    return Mesh(_lay_out(sizes, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def _lay_out(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices by their places in the mesh, such that neighbours are wired to each other."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1 or devices[0].platform != "tpu":
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    # Between slices there is a slower network: data crosses it, and fsdp where data is too small.
    data, fsdp, _ = sizes
    across = math.gcd(data, slices)
    if fsdp % (slices // across):
        raise UserError(
            f"mesh: expected mesh.data × mesh.fsdp to divide over the {slices} slices, got "
            f"data={data} fsdp={fsdp}"
        )
    outer = (across, slices // across, 1)
    inner = [size // parts for size, parts in zip(sizes, outer, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, allow_split_physical_axes=True
    )


def row_share(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """Which share of a batch's rows a process reads, and how many shares there are.

    Processes that hold the same rows, as where a tensor axis spans them, read the same share.

    Args:
      mesh: The mesh.
      process: The process; this one by default.

    Returns:
      The number of the share, from 0, and how many there are: all are of the same size.

    Raises:
      UserError: If the devices of a process hold a part of another one's rows.

    Example:
      >>> row_share(make_mesh(MeshConfig(data=-1), jax.devices()[:1]))
      (0, 1)
    """
    parts = mesh.devices.reshape(-1, mesh.shape["tensor"])
    held: dict[int, list[int]] = {}
    for part, devices in enumerate(parts):
        for owner in {device.process_index for device in devices}:
            held.setdefault(owner, []).append(part)
    shares = sorted(set(map(tuple, held.values())))
    if sum(map(len, shares)) != len(parts) or len(set(map(len, shares))) > 1:
        raise UserError(
            "mesh.tensor: expected a divisor or a multiple of the "
            f"{mesh.size // len(held)} devices of a process, got {mesh.shape['tensor']}"
        )
    mine = held[jax.process_index() if process is None else process]
    return shares.index(tuple(mine)), len(shares)


def check_batch(mesh: Mesh, batch_size: int, accumulation: int) -> None:
    """Refuses a batch whose micro-batches cannot be divided over the devices.

    Raises:
      UserError: If it is so.
    """
    parts = accumulation * math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % parts:
        raise UserError(
            f"train.batch_size: expected a multiple of train.accumulation × mesh.data × mesh.fsdp "
            f"({parts}), got {batch_size}"
        )


def place_batch(
    mesh: Mesh, batch: Mapping[str, np.ndarray], accumulation: int
) -> dict[str, jax.Array]:
    """One process's share of a batch as global arrays [accumulation, rows, ...].

    Micro-batches are cut here, on the host: each device then has rows of every one of them, and
    no row moves between devices.

    Args:
      mesh: The mesh; rows are divided over `BATCH_AXES`.
      batch: Arrays whose first dimension is this process's rows.
      accumulation: The number of micro-batches.

    Returns:
      The global arrays.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
    return {
        name: jax.make_array_from_process_local_data(
            sharding, value.reshape(accumulation, -1, *value.shape[1:])
        )
        for name, value in batch.items()
    }
