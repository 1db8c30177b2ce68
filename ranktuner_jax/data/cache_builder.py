"""The parts of a cache, each written once, whoever else writes them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from etils import epath

from ranktuner_jax.data.arrays import write_arrays
from ranktuner_jax.data.cache_files import forget_copy, locked, part_path, read_facts, set_aside
from ranktuner_jax.data.chat import ChatEncoder
from ranktuner_jax.data.chats import Facts, Part, checksums
from ranktuner_jax.data.encode import Split
from ranktuner_jax.data.summary import Summary
from ranktuner_jax.errors import RunError

__all__ = ["Builder"]


class Builder:
    """Writes the parts of a cache, each once, whoever else does.

    Args:
      split: What to read.
      encoder: Makes tokens of it.
      folder: Where to write.
      rows: Rows of the source in a part.
    """

    def __init__(self, split: Split, encoder: ChatEncoder, folder: epath.Path, rows: int) -> None:
        self._encoder, self._rows = encoder, rows
        self.split, self.folder = split, folder

    def job(self) -> tuple[Any, ...]:
        """What `serve` makes another such builder of; what is held out is found once."""
        split = self.split
        return split.config, split.name, split.split, split.held_out, self.folder, self._rows

    def build(self, number: int, wait: bool) -> bool:
        """Writes a part unless it is there.

        Args:
          number: Which part.
          wait: Whether to wait for another process that writes it.

        Returns:
          Whether it is there now.
        """
        path = part_path(self.folder, number)
        with locked(path, wait) as held:
            if not held:
                return False
            if not path.exists():
                self._write(path, number)
            return True

    def repair(self, number: int, facts: Facts) -> None:
        """Sets a broken part aside and writes it anew.

        Raises:
          RunError: If the source gives other tokens now.
        """
        path = part_path(self.folder, number)
        with locked(path, wait=True):
            forget_copy(path)
            if read_facts(path) == facts:
                return  # Another process was faster.
            set_aside(path)
            self._write(path, number)
            if read_facts(path) != facts:
                raise RunError(
                    f"data cache: {path} was broken, and the source has changed since it was "
                    "written; run the same command again to tokenize the source anew"
                )

    def _write(self, path: epath.Path, number: int) -> None:
        summary = Summary(self.split.config.row_length)
        start = number * self._rows
        stop = min(start + self._rows, len(self.split.source))
        chats = list(self.split.samples(self._encoder, summary, start, stop))
        summary.supervised = sum(int(chat.mask[1:].sum()) for chat in chats)
        part = Part.of(chats)
        tokens, weights = part.open()
        write_arrays(
            path,
            {
                "tokens": tokens,
                "weights": weights,
                "lengths": part.lengths,
                "checksums": checksums(chats),
                "counts": np.frombuffer(json.dumps(summary.counts()).encode(), np.uint8),
            },
        )
