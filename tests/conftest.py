"""Settings of every test: eight fake CPU devices, strict arithmetic, programs compiled quickly."""

import os
import shutil
import tempfile
from importlib.metadata import version

# Before jax is imported, in this process and in those that tests start.
# Programs of tests are small and run a few times, so that compiling them is most of the work: LLVM
# optimizes nothing, and no fusion goes through MLIR. XLA_FLAGS of the caller come after these:
# XLA_FLAGS="--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true".
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        # Later versions know no other way, and not the flag.
        "--xla_cpu_use_fusion_emitters=false" * (version("jaxlib") < "0.11"),
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
    ]
)
os.environ["JAX_PLATFORMS"] = "cpu"
# Each program is compiled once: by one of the workers, or by a process that a test starts.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_sessionstart(session: pytest.Session) -> None:
    if jax.device_count() != 8:
        pytest.exit(f"the tests need 8 fake CPU devices, got {jax.devices()}", returncode=3)


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # Not a worker of xdist.
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture
def rng() -> np.random.Generator:
    """A NumPy generator with a fixed seed."""
    return np.random.default_rng(0)
