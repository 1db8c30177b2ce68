"""The tokens at which a completion ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ranktuner_jax.data import turn_end_id
from ranktuner_jax.models import turn_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["stop_ids"]


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an assistant's turn.

    They are the end-of-sequence token, the end-of-turn tokens of known model families as far as
    the tokenizer has them, and the token with which the chat template, if any, ends a turn.

    Raises:
      UserError: If there is a chat template that refuses even a short conversation.
    """
    added = tokenizer.get_added_vocab()
    ends = {added[end] for end in turn_ends() if end in added}
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        ends.add(turn_end_id(tokenizer))
    return sorted(ends)
