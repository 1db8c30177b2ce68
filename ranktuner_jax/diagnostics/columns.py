"""The columns of `tokens.parquet`: their types, units and meanings, and how they are computed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from ranktuner_jax import losses
from ranktuner_jax.diagnostics.scoring import ALL_FIELDS, in_blocks, method_weights
from ranktuner_jax.diagnostics.texts import TokenTexts
from ranktuner_jax.losses.ranktuner import expected_rank_bound

__all__ = ["MEASURED", "WEIGHT", "describe", "token_schema", "token_stats_of", "token_table"]

WEIGHT = "weight/"
"""What the names of weight columns begin with."""


@dataclasses.dataclass(frozen=True)
class _Column:
    name: str
    type: pa.DataType
    unit: str
    description: str

    @property
    def field(self) -> pa.Field:
        metadata = {"description": self.description, "unit": self.unit}
        return pa.field(self.name, self.type, nullable=False, metadata=metadata)


_SHARE, _NATS, _RANK = "1", "nats", "rank, from 1"
_COLUMNS = [
    _Column(
        "conversation",
        pa.int64(),
        "number, from 0",
        "the conversation, in the order of the data; what was dropped or skipped is not counted",
    ),
    _Column(
        "position",
        pa.int32(),
        "number, from 0",
        "index of the token in its conversation; 0 is the conversation's first token",
    ),
    _Column(
        "source",
        pa.dictionary(pa.int32(), pa.string()),
        "name",
        "the data source; of a mixture, the part's",
    ),
    _Column("token_id", pa.int32(), "id", "the supervised token"),
    _Column(
        "token",
        pa.string(),
        "text",
        "its text, as it reads in context; U+FFFD is a part of a character",
    ),
    _Column("nll", pa.float32(), _NATS, "-log p, p the model's probability of the token"),
    _Column("prob", pa.float32(), _SHARE, "p, the model's probability of the token"),
    _Column(
        "rank", pa.int32(), _RANK, "R, the tokens that are at least as likely, itself included"
    ),
    _Column("entropy", pa.float32(), _NATS, "H, of the prediction over the whole vocabulary"),
    _Column("max_prob", pa.float32(), _SHARE, "probability of the likeliest token"),
    _Column(
        "expected_rank",
        pa.float32(),
        _RANK,
        "E[R], the mean rank of a token drawn from the prediction; E[R] - 1 to within 0.35 %",
    ),
    _Column("expected_rank_bound", pa.float32(), _RANK, "s(H), RankTuner's lower bound of E[R]"),
    _Column(
        "topk_entropy",
        pa.float32(),
        _NATS,
        "entropy of the prediction renormalised over its 20 likeliest tokens",
    ),
    _Column("collision", pa.float32(), _SHARE, "sum of the squared probabilities"),
    _Column(
        "relative_rank",
        pa.float32(),
        _SHARE,
        "I, the Relative Rank Indicator with the exact E[R]; near 1 with R > 1 is the Noise Region",
    ),
    _Column(
        "relative_scale",
        pa.float32(),
        _SHARE,
        "S, the Relative Scale with the bound s(H), which RankTuner trains with",
    ),
    _Column(
        "relative_scale_exact", pa.float32(), _SHARE, "S with the exact E[R], the inverse of I"
    ),
]

_KEYS = ("conversation", "position", "token_id")
_SCORED = ("nll", "rank", "entropy", "max_prob", *ALL_FIELDS)

MEASURED = pa.schema([column.field for column in _COLUMNS if column.name in (*_KEYS, *_SCORED)])
"""What a model is needed for: the other columns follow from these."""


def token_schema(methods: Mapping[str, losses.Weighting], about: Mapping[str, Any]) -> pa.Schema:
    """The schema of `tokens.parquet`.

    Args:
      methods: The methods by name.
      about: Written as JSON to the metadata of the schema, under "ranktuner".
    """
    weights = [
        _Column(f"{WEIGHT}{name}", pa.float32(), _SHARE, f"the weight under {method}")
        for name, method in methods.items()
    ]
    fields = [column.field for column in (*_COLUMNS, *weights)]
    return pa.schema(fields, metadata={"ranktuner": json.dumps(about, sort_keys=True)})


def describe() -> list[tuple[str, str, str]]:
    """The name, unit and description of every column but the weights.

    Example:
      >>> describe()[5]
      ('nll', 'nats', "-log p, p the model's probability of the token")
    """
    return [(column.name, column.unit, column.description) for column in _COLUMNS]


def token_stats_of(measured: pa.Table, vocab_size: int) -> losses.TokenStats:
    """The statistics that a table with the columns of `MEASURED` holds."""
    arrays = {name: measured[name].to_numpy() for name in _SCORED}
    return losses.TokenStats(**arrays, vocab_size=vocab_size)


def token_table(
    measured: pa.Table,
    schema: pa.Schema,
    *,
    methods: Mapping[str, losses.Weighting],
    batch_stats: Mapping[str, float],
    vocab_size: int,
    texts: TokenTexts,
    sources: Sequence[tuple[str, int]],
) -> pa.Table:
    """All columns, from those that were measured.

    Args:
      measured: A table with the columns of `MEASURED`.
      schema: The schema of the result, from `token_schema`.
      methods: The methods by name.
      batch_stats: The statistics that some methods take over the whole data set, by name.
      vocab_size: The number of vocabulary entries.
      texts: Gives the tokens' texts.
      sources: The name of each source and the number of its conversations, in order.
    """
    stats = token_stats_of(measured, vocab_size)
    columns: dict[str, Any] = {name: measured[name] for name in measured.column_names}
    columns |= in_blocks(_indicators, stats)
    columns |= method_weights(stats, _SCALES)
    weights = method_weights(stats, methods, batch_stats)
    columns |= {f"{WEIGHT}{name}": weights[name] for name in methods}
    names, counts = zip(*sources, strict=True)
    part = np.searchsorted(np.cumsum(counts), columns["conversation"].to_numpy(), side="right")
    distinct = list(dict.fromkeys(names))
    index = np.array([distinct.index(name) for name in names], np.int32)[part]
    columns["source"] = pa.DictionaryArray.from_arrays(index, distinct)
    ids, which = np.unique(columns["token_id"].to_numpy(), return_inverse=True)
    words = pa.DictionaryArray.from_arrays(which.astype(np.int32), texts.of(ids))
    columns["token"] = words.dictionary_decode()
    return pa.table([columns[name] for name in schema.names], schema=schema)


_SCALES: dict[str, losses.Weighting] = {
    "relative_scale": losses.RankTuner("one", "bound"),
    "relative_scale_exact": losses.RankTuner("one", "exact"),
}


@jax.jit
def _indicators(stats: losses.TokenStats) -> dict[str, jax.Array]:
    return {
        "prob": stats.prob,
        "expected_rank_bound": expected_rank_bound(stats),
        "relative_rank": losses.relative_rank(stats),
    }
