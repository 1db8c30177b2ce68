"""What process 0 knows, in every process."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from ranktuner_jax.errors import UserError

__all__ = ["from_first_process", "on_first_process"]

_T = TypeVar("_T")


def from_first_process(text: str) -> str:
    """The text of process 0, in every process; all must call.

    Example:
      >>> from_first_process("one process has its own")
      'one process has its own'
    """
    if jax.process_count() == 1:
        return text
    encoded = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(encoded.size)))
    if jax.process_index() != 0:
        encoded = np.zeros(size, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(encoded)).decode()


def on_first_process(function: Callable[[], _T]) -> _T:
    """Calls a function in process 0 and returns its result in every process; all must call.

    Args:
      function: Returns what JSON can hold.

    Raises:
      UserError: In every process, if the function does: the others would wait for the first one.

    Example:
      >>> on_first_process(lambda: [1, 2])
      [1, 2]
    """
    answer: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            answer["result"] = function()
        except UserError as error:
            answer["mistake"] = str(error)
    answer = json.loads(from_first_process(json.dumps(answer)))
    if "mistake" in answer:
        raise UserError(answer["mistake"])
    result: _T = answer["result"]
    return result
