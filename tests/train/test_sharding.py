"""Meshes and placed batches."""

import numpy as np
import pytest

from ranktuner_jax.errors import UserError
from ranktuner_jax.train import MeshConfig, check_batch, make_mesh, place_batch


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
    placed = place_batch(mesh, {"tokens": rows}, accumulation=2)["tokens"]
    assert placed.shape == (2, 8, 3)
    np.testing.assert_array_equal(np.asarray(placed).reshape(16, 3), rows)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2, 3)}


def test_rows_that_cannot_be_divided_are_refused() -> None:
    mesh = make_mesh(MeshConfig(data=8))
    with pytest.raises(UserError, match=r"train.batch_size: expected a multiple .* \(16\), got 8"):
        check_batch(mesh, batch_size=8, accumulation=2)
    check_batch(mesh, batch_size=8, accumulation=1)
