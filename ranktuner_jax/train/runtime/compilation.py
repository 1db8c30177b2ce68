"""Compiled programs, kept between runs."""

from __future__ import annotations

import jax

from ranktuner_jax import models

__all__ = ["keep_compiled"]


def keep_compiled() -> None:
    """Lets JAX keep what it compiles in the user's cache: a run that goes on starts at once.

    A setting of the user's (`JAX_COMPILATION_CACHE_DIR`, such as a bucket that all hosts share)
    stays.

    Example:
      >>> before = jax.config.values["jax_compilation_cache_dir"]
      >>> keep_compiled()
      >>> jax.config.values["jax_compilation_cache_dir"] is None
      False
      >>> jax.config.update("jax_compilation_cache_dir", before)
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = models.default_cache_dir() / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))
