"""The conversations of a training split that are held out for evaluation."""

from __future__ import annotations

import array
import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ranktuner_jax.data.records import Conversation

if TYPE_CHECKING:
    from jaxtyping import Int64

__all__ = ["HOLDOUT", "held_out_rows"]

HOLDOUT = "holdout"
"""The name of the held-out split."""


def held_out_rows(
    conversations: Iterable[tuple[int, Conversation]], size: float
) -> Int64[np.ndarray, " rows"]:
    """Chooses the held-out conversations of a split, by their prompts.

    Conversations with the same prompt (everything before the first answer, without the system
    prompt) stay together: a model that was trained on one answer to a question is not tested on
    another. If all have the same prompt, whole conversations are compared instead. Prompts are
    chosen by a hash of their text, so neither the order of the rows nor the number of processes
    matters, and adding a row hardly changes which others are held out.

    Args:
      conversations: All conversations of the split, each after the number of its row.
      size: The fraction of prompts to hold out (at least one prompt), or their number from 1 on.

    Returns:
      The numbers of those that are held out, in ascending order.

    Example:
      >>> def sums(*pairs):
      ...     return [
      ...         Conversation(
      ...             ({"role": "user", "content": question},
      ...              {"role": "assistant", "content": answer}), (0.0, 1.0), row={})
      ...         for question, answer in pairs
      ...     ]
      >>> rows = sums(("1+1", "2"), ("2+2", "4"), ("2+2", "It is 4."), ("3+3", "6"))
      >>> held_out_rows(enumerate(rows), size=0.3).tolist()
      [1, 2]
    """
    numbers, whole, prompts = array.array("q"), bytearray(), bytearray()
    for number, conversation in conversations:
        numbers.append(number)
        whole += _digest(conversation.messages)
        prompts += _digest(_prompt(conversation))
    # Of the highest byte first, so that their order is that of the bytes.
    digests, alone = (np.frombuffer(part, ">u8").astype(np.uint64) for part in (prompts, whole))
    known = np.unique(digests)
    if len(known) == 1:
        digests, known = alone, np.unique(alone)
    count = round(size * len(known)) if size < 1 else int(size)
    held = np.isin(digests, known[: max(1, count)])
    return np.array(numbers, np.int64)[held]


def _prompt(conversation: Conversation) -> Iterable[dict[str, Any]]:
    roles = [message["role"] for message in conversation.messages]
    return conversation.messages[: roles.index("assistant")]


def _digest(messages: Iterable[dict[str, Any]]) -> bytes:
    text = json.dumps([m["content"] for m in messages if m["role"] != "system"])
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
