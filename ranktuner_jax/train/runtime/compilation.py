"""JAX's persistent compilation cache."""

from __future__ import annotations

import jax

from ranktuner_jax.files import cache_dir

__all__ = ["keep_compiled"]


def keep_compiled() -> None:
    """Enables JAX's persistent compilation cache, so that a resumed run starts quickly.

    It is kept in the user's cache, unless `JAX_COMPILATION_CACHE_DIR` is set (e.g. to a bucket that
    all hosts share).

    Example:
      >>> before = jax.config.values["jax_compilation_cache_dir"]
      >>> keep_compiled()
      >>> jax.config.values["jax_compilation_cache_dir"] is None
      False
      >>> jax.config.update("jax_compilation_cache_dir", before)
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = cache_dir() / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))
