"""What the tests of all trainers share: rows, a comparison, and the examples."""

import os

# Programs of tests run a few times: compiling them is most of the work, so LLVM optimizes nothing.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true",
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pathlib
import runpy
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from ranktuner_jax import losses

jax.config.update("jax_default_matmul_precision", "highest")

EXAMPLES = pathlib.Path(__file__).parents[3] / "examples" / "trainers"
VOCAB = 61


class Rows:
    """Four rows of text, of which the last 2, 9, 4 and 11 tokens are supervised."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(0, VOCAB, (4, 16)).astype(np.int32)
        self.mask = np.arange(16) >= 16 - np.array([[2], [9], [4], [11]])


@pytest.fixture
def rows() -> Rows:
    return Rows()


@pytest.fixture
def weighting() -> losses.Weighting:
    """A method whose weights are far from equal, so that leaving them out is seen."""
    return losses.RankTuner("one")


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """Whether two trees agree to 1e-5 (or `atol`) of the largest entry of each leaf."""

    def check(actual: Any, expected: Any, atol: float = 1e-5) -> None:
        def compare(a: Any, b: Any) -> None:
            np.testing.assert_allclose(a, b, rtol=0, atol=atol * np.abs(b).max())

        assert jax.tree.leaves(expected)
        jax.tree.map(compare, actual, expected)

    return check


@pytest.fixture
def run_example() -> Callable[[str], list[float]]:
    """Runs the example of that name; returns the plain NLL that it logged at each step."""
    return lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()
