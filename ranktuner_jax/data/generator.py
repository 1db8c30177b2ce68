"""reasoning-gym, which generates the built-in data sets and judges answers to them."""

from __future__ import annotations

import warnings
from typing import Any

from ranktuner_jax.errors import UserError

__all__ = ["import_reasoning_gym"]


def import_reasoning_gym(wanted_by: str) -> Any:
    """The module, imported without the warnings of its dependencies.

    Args:
      wanted_by: What needs it, for the error: a config key with its value, or a command.

    Raises:
      UserError: If it is not installed.

    Example:
      >>> import_reasoning_gym("data.source=chain_sum").__name__
      'reasoning_gym'
    """
    try:
        with warnings.catch_warnings():
            # Of cellpylib, when Python first compiles it, which uv leaves to the first import.
            warnings.simplefilter("ignore", SyntaxWarning)
            import reasoning_gym
    except ImportError as error:
        raise UserError(
            f"{wanted_by}: expected the package reasoning-gym, got {error}; "
            "run pip install 'ranktuner-jax[eval]'"
        ) from error
    return reasoning_gym
