"""Settings of every test: eight fake CPU devices, and strict arithmetic."""

import os

# Before jax is imported, in this process and in those that tests start.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_sessionstart(session: pytest.Session) -> None:
    if jax.device_count() != 8:
        pytest.exit(f"the tests need 8 fake CPU devices, got {jax.devices()}", returncode=3)


@pytest.fixture
def rng() -> np.random.Generator:
    """A NumPy generator with a fixed seed."""
    return np.random.default_rng(0)
