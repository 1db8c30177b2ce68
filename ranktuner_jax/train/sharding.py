"""The mesh of a run, and batches placed on it; where parameters lie, `models.partition` says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ranktuner_jax.errors import UserError
from ranktuner_jax.train.config import MeshConfig

__all__ = ["AXES", "BATCH_AXES", "check_batch", "make_mesh", "place_batch"]

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the axes data, fsdp and tensor; a size of -1 takes the devices left over.

    Args:
      config: The sizes.
      devices: The devices to use; all by default.

    Returns:
      The mesh.

    Raises:
      UserError: If the sizes do not multiply to the number of devices.

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
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


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
