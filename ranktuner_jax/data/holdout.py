"""Which conversations of a training split are kept out of training, to be evaluated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from ranktuner_jax.data.records import Conversation

__all__ = ["HOLDOUT", "Holdout"]

HOLDOUT = "holdout"
"""The name of the split that `data.holdout` makes."""


class Holdout:
    """Parts a split in two, by what each conversation begins with.

    Conversations with the same prompt (all that comes before the first answer, without the system
    prompt) stay on one side: a model that was trained on one answer to a question is not tested
    on another. Where all share one prompt, whole conversations are compared. Which prompts are
    held out is decided by a hash of their text, so that neither the order of the rows nor the
    number of processes matters, and a row that is added later moves hardly any other.

    Args:
      conversations: All of the split.
      size: Below 1 the share of the prompts that is held out, at least one; from 1 on their
        number.

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


def _prompt(conversation: Conversation) -> Iterable[dict[str, str]]:
    roles = [message["role"] for message in conversation.messages]
    return conversation.messages[: roles.index("assistant")]


def _digest(messages: Iterable[dict[str, str]]) -> bytes:
    text = json.dumps([m["content"] for m in messages if m["role"] != "system"])
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
