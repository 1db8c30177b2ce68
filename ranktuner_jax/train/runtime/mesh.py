"""The device mesh and the placement of batches; `models.partition` shards the parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ranktuner_jax.data import Batch
from ranktuner_jax.errors import UserError
from ranktuner_jax.train.config import MeshConfig

__all__ = ["AXES", "BATCH_AXES", "check_batch", "make_mesh", "place_batch", "row_share"]

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor; a size of -1 takes all remaining devices.

    Later axes communicate more, so their devices are closer to each other.

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
    """Arranges the devices in the mesh so that neighbors are directly connected."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1 or devices[0].platform != "tpu":
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    # The network between slices is slower: only data crosses it, and fsdp if data is too small.
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

    Processes that hold the same rows, because a tensor axis spans them, read the same share.

    Args:
      mesh: The mesh.
      process: The process; this one by default.

    Returns:
      The index of the share, from 0, and the number of shares, which all have the same size.

    Raises:
      UserError: If the rows of two processes overlap only in part.

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
    """Checks that the micro-batches of a batch can be divided over the devices.

    Raises:
      UserError: If batch_size is not a multiple of accumulation × the data and fsdp axes.
    """
    parts = accumulation * math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % parts:
        raise UserError(
            f"train.batch_size: expected a multiple of train.accumulation × mesh.data × mesh.fsdp "
            f"({parts}), got {batch_size}"
        )


def place_batch(mesh: Mesh, batch: Batch, accumulation: int) -> Batch:
    """Places this process's share of a batch as global arrays [accumulation, rows, ...].

    The batch is split into micro-batches here, on the host, so that each device holds rows of every
    micro-batch and no row moves between devices.

    Args:
      mesh: The mesh; rows are divided over `BATCH_AXES`.
      batch: Arrays whose first axis is this process's rows.
      accumulation: The number of micro-batches.

    Returns:
      The global arrays.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))

    def place(array: np.ndarray) -> jax.Array:
        split = array.reshape(accumulation, -1, *array.shape[1:])
        return jax.make_array_from_process_local_data(sharding, split)

    return jax.tree.map(place, batch)
