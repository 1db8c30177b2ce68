"""The conversations of a training split that are held out for evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from ranktuner_jax.data.records import Conversation

__all__ = ["HOLDOUT", "Holdout"]

HOLDOUT = "holdout"
"""The name of the held-out split."""


class Holdout:
    """The set of held-out conversations of a split, chosen by their prompts.

    Conversations with the same prompt (everything before the first answer, without the system
    prompt) stay together: a model that was trained on one answer to a question is not tested on
    another. If all have the same prompt, whole conversations are compared instead. Prompts are
    chosen by a hash of their text, so neither the order of the rows nor the number of processes
    matters, and adding a row hardly changes which others are held out.

    Args:
      conversations: All conversations of the split.
      size: The fraction of prompts to hold out (at least one prompt), or their number from 1 on.

    Example:
      >>> def sums(*pairs):
      ...     return [
      ...         Conversation(
      ...             ({"role": "user", "content": question},
      ...              {"role": "assistant", "content": answer}), (0.0, 1.0), row={})
      ...         for question, answer in pairs
      ...     ]
      >>> rows = sums(("1+1", "2"), ("2+2", "4"), ("2+2", "It is 4."), ("3+3", "6"))
      >>> holdout = Holdout(rows, size=0.3)
      >>> [row.messages[1]["content"] for row in rows if row in holdout]
      ['4', 'It is 4.']
    """

    def __init__(self, conversations: Iterable[Conversation], size: float) -> None:
        whole, prompts = set(), set()
        for conversation in conversations:
            whole.add(_digest(conversation.messages))
            prompts.add(_digest(_prompt(conversation)))
        self._by_prompt = len(prompts) > 1
        known = sorted(prompts if self._by_prompt else whole)
        count = round(size * len(known)) if size < 1 else int(size)
        self._held = frozenset(known[: max(1, count)])

    def __contains__(self, conversation: Conversation) -> bool:
        turns = _prompt(conversation) if self._by_prompt else conversation.messages
        return _digest(turns) in self._held


def _prompt(conversation: Conversation) -> Iterable[dict[str, Any]]:
    roles = [message["role"] for message in conversation.messages]
    return conversation.messages[: roles.index("assistant")]


def _digest(messages: Iterable[dict[str, Any]]) -> bytes:
    text = json.dumps([m["content"] for m in messages if m["role"] != "system"])
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
