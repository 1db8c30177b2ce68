"""The TFDS data set of conversations, which `write_dataset` fills."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

__all__ = ["VERSION", "Conversations"]

VERSION = "1.0.0"
_COLUMNS = ("role", "content", "weight")


class Conversations(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Conversations with weights; the source's row is kept in `row`, as JSON."""

    VERSION = tfds.core.Version(VERSION)
    # Nothing is downloaded. To look for checksums of downloads beside the code, TFDS 4.9.10 would
    # import importlib_resources, which it does not install.
    code_path = None

    def __init__(self, name: str, splits: Mapping[str, Iterable[Mapping[str, Any]]], folder: Path):
        self.name = name
        self._splits = splits
        # array_record has random access and needs no TensorFlow.
        super().__init__(data_dir=str(folder), file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        weight = tfds.features.Scalar(dtype=np.float32)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Conversations for supervised fine-tuning.",
            features=tfds.features.FeaturesDict(
                {
                    "messages": tfds.features.Sequence(
                        # Tool calls and the like, as JSON, are in `more`.
                        {"role": text, "content": text, "weight": weight, "more": text}
                    ),
                    "weight": weight,
                    "row": text,
                }
            ),
            disable_shuffling=True,  # so that index i is row i of the source
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # nothing is downloaded
        return {
            split: (
                (i, {**record, "messages": [_stored(turn) for turn in record["messages"]]})
                for i, record in enumerate(records)
            )
            for split, records in self._splits.items()
        }

    def _generate_examples(self) -> None:  # the generators come with the splits
        raise NotImplementedError


def _stored(turn: Mapping[str, Any]) -> dict[str, Any]:
    more = {key: value for key, value in turn.items() if key not in _COLUMNS}
    return {**{key: turn[key] for key in _COLUMNS}, "more": json.dumps(more)}
