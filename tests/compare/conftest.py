"""The tiny model, data and config of the tests of training."""

from collections.abc import Iterator

import jax
import pytest

from tests.train.conftest import (  # noqa: F401 (fixtures)
    cache,
    sums,
    tiny_config_file,
    tiny_model,
)


@pytest.fixture(scope="module")
def quick_to_compile() -> Iterator[None]:
    """Programs of three steps, of which there is one for each method and learning rate."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
