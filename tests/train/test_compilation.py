"""Compiled programs are kept in a cache for the next run."""

import os
import pathlib
import subprocess
import sys

import pytest

LOAD_AND_COMPILE = """
import jax
from ranktuner_jax.train.runtime.compilation import keep_compiled
keep_compiled()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x + 1)(1.0)
"""


@pytest.mark.parametrize("chosen", ["", "mine"])
def test_compiled_programs_are_cached_in_the_default_or_the_chosen_folder(
    chosen: str, tmp_path: pathlib.Path
) -> None:
    environment = os.environ | {"RANKTUNER_CACHE": str(tmp_path)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    if chosen:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / chosen)
    subprocess.run([sys.executable, "-c", LOAD_AND_COMPILE], env=environment, check=True)
    assert list((tmp_path / (chosen or "compiled")).iterdir())
    assert len(list(tmp_path.iterdir())) == 1
