"""Meshes and placed batches."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from jax.sharding import Mesh

from ranktuner_jax.data import Batch
from ranktuner_jax.errors import UserError
from ranktuner_jax.train import MeshConfig, check_batch, make_mesh, place_batch, row_share


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh reads of a chip of a TPU v5e."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    process_index: int = 0


def pod(rows: int, columns: int, slices: int = 1) -> list[Chip]:
    """Slices of chips in a grid, four chips a process."""
    places = itertools.product(range(slices), range(rows), range(columns))
    return [
        Chip(number, (row, column, 0), piece, process_index=number // 4)
        for number, (piece, row, column) in enumerate(places)
    ]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"data": -1}, (8, 1, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 2)),
        ({"data": 1, "fsdp": 1, "tensor": 8}, (1, 1, 8)),
    ],
    ids=str,
)
def test_minus_one_takes_the_devices_left_over(
    sizes: dict[str, int], expected: tuple[int, ...]
) -> None:
    assert tuple(make_mesh(MeshConfig(**sizes)).shape.values()) == expected


@pytest.mark.parametrize(
    "sizes", [{"data": 3}, {"data": -1, "fsdp": 16}, {"data": -1, "fsdp": 3}], ids=str
)
def test_sizes_that_do_not_fit_the_devices_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(UserError, match="multiply to the number of devices, 8"):
        make_mesh(MeshConfig(**sizes))


def test_every_device_holds_rows_of_every_micro_batch() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = np.arange(16 * 3).reshape(16, 3)
    batch = Batch.of({"tokens": rows, "labels": rows, "mask": rows > 0})
    placed = place_batch(mesh, batch, accumulation=2).tokens
    assert placed.shape == (2, 8, 3)
    np.testing.assert_array_equal(np.asarray(placed).reshape(16, 3), rows)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2, 3)}


def test_rows_that_cannot_be_divided_are_refused() -> None:
    mesh = make_mesh(MeshConfig(data=8))
    with pytest.raises(UserError, match=r"train.batch_size: expected a multiple .* \(16\), got 8"):
        check_batch(mesh, batch_size=8, accumulation=2)
    check_batch(mesh, batch_size=8, accumulation=1)


def test_devices_that_communicate_most_are_neighbours() -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=4), pod(4, 4))
    for line in mesh.devices[0]:  # Each tensor axis is a line of the grid.
        coords = np.array([chip.coords for chip in line])
        assert (np.ptp(coords, axis=0) == 0).sum() == 2
    # A ring through the grid, each step of which is one link.
    ring = make_mesh(MeshConfig(data=1, fsdp=16), pod(4, 4))
    coords = np.array([chip.coords for chip in ring.devices.ravel()])
    np.testing.assert_array_equal(np.abs(coords - np.roll(coords, 1, axis=0)).sum(axis=1), 1)


@pytest.mark.parametrize(
    ("sizes", "across"),
    [
        ({"data": 2, "fsdp": 4, "tensor": 2}, 0),
        ({"data": -1}, 0),
        ({"data": 1, "fsdp": 8, "tensor": 2}, 1),
    ],
    ids=str,
)
def test_slices_are_divided_along_the_axis_that_communicates_least(
    sizes: dict[str, int], across: int
) -> None:
    mesh = make_mesh(MeshConfig(**sizes), pod(2, 4, slices=2))
    pieces = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    assert set(pieces.ravel()) == {0, 1}
    for half in np.split(pieces, 2, axis=across):
        assert len(set(half.ravel())) == 1


def test_a_tensor_axis_over_slices_is_refused() -> None:
    with pytest.raises(UserError, match=r"divide over the 2 slices, got data=1 fsdp=1"):
        make_mesh(MeshConfig(data=1, tensor=16), pod(2, 4, slices=2))


def cluster(data: int, fsdp: int, tensor: int, of_a_process: int) -> Mesh:
    chips = [
        Chip(n, (n, 0, 0), process_index=n // of_a_process) for n in range(data * fsdp * tensor)
    ]
    return Mesh(np.array(chips).reshape(data, fsdp, tensor), ("data", "fsdp", "tensor"))


@pytest.mark.parametrize(
    ("mesh", "shares"),
    [
        (cluster(8, 1, 1, 4), [(0, 2), (1, 2)]),
        (cluster(2, 2, 2, 4), [(0, 2), (1, 2)]),
        (cluster(1, 1, 8, 4), [(0, 1), (0, 1)]),
        (cluster(2, 1, 8, 4), [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
    ids=["data", "all", "tensor", "both"],
)
def test_processes_that_hold_the_same_rows_read_the_same_rows(
    mesh: Mesh, shares: list[tuple[int, int]]
) -> None:
    assert [row_share(mesh, process) for process in range(len(shares))] == shares


def test_processes_that_share_only_some_rows_are_refused() -> None:
    with pytest.raises(UserError, match=r"multiple of the 3 devices of a process, got 2"):
        row_share(cluster(3, 1, 2, 3))
