"""The tables of a noise run, and the paper's beside them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

from ranktuner_jax.diagnostics.noise.inject import KINDS
from ranktuner_jax.diagnostics.noise.table import Measure

__all__ = [
    "CEILING",
    "CHANCE",
    "PAPER",
    "RESULTS",
    "SCORES",
    "Result",
    "Table",
    "compare",
    "meaning",
    "title",
]

RESULTS = "results.json"

PAPER: dict[str, dict[str, float]] = {
    "H": {"tok_prec": 0.0454, "tok_rec": 0.5533, "hit": 0.77},
    "1 − p": {"tok_prec": 0.0325, "tok_rec": 0.3965, "hit": 0.77},
    "S bound": {"tok_prec": 0.0216, "tok_rec": 0.2639, "hit": 0.09},
}
"""Table 1 of Yu et al., arXiv:2602.01745. Its rows "entropy-dominant", "probability-dominant" and
"RankTuner" stand under the scores that fit them best; precision ÷ recall × 10 % gives the rate of
noise, 0.82 %, and its SEQ HIT does not say which of our three readings it is."""

# What tokens are ranked by, and the method whose weight that is; "" for what is none.
SCORES = {
    "H": "entropy",
    "1 − p": "",
    "S bound": "ranktuner_one",
    "S exact": "ranktuner_one_exact",
    "p": "dft",
    "p·S bound": "ranktuner",
    "p·S exact": "ranktuner_exact",
}
CHANCE, CEILING = "chance (sft)", "ceiling"


@dataclasses.dataclass(frozen=True)
class Table:
    """The measures of all scores for one kind of noise, one length and one rate.

    Attributes:
      kind: The kind of noise.
      length: Of a span; 0 for kinds without one.
      rate: The rate that was asked for.
      realised: The rate in each draw.
      polluted: The number of polluted sequences in each draw.
      noise: The number of noise tokens in each draw.
      tokens: The number of supervised tokens in each draw.
      rows: The measures of each score, by their names in `MEASURES`.
    """

    kind: str
    length: int
    rate: float
    realised: tuple[float, ...]
    polluted: tuple[int, ...]
    noise: tuple[int, ...]
    tokens: tuple[int, ...]
    rows: dict[str, dict[str, Measure]]


@dataclasses.dataclass(frozen=True)
class Result:
    """What results.json holds.

    Attributes:
      settings: What decided the result: model, data, and which noise was drawn.
      sequences: The number of sequences.
      tokens: The number of their supervised tokens, without noise.
      tables: One for each kind, length and rate.
      paper: Table 1 of the paper, shares by score and measure.
    """

    settings: dict[str, Any]
    sequences: int
    tokens: int
    tables: tuple[Table, ...]
    paper: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=lambda: PAPER)

    def to_json(self) -> str:
        """As text."""
        fields = {"version": 1, **_without_nan(dataclasses.asdict(self))}
        return json.dumps(fields, indent=1, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Result:
        """From the text that `to_json` returned."""
        fields = json.loads(text)
        del fields["version"]
        return cls(**fields | {"tables": tuple(map(_table, fields["tables"]))})


def _without_nan(value: Any) -> Any:
    """What JSON can hold: null in place of NaN."""
    if isinstance(value, Mapping):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _measure(numbers: Mapping[str, Any]) -> Measure:
    value, low, high, *seeds = (
        math.nan if number is None else number
        for number in (numbers["value"], numbers["low"], numbers["high"], *numbers["seeds"])
    )
    return Measure(value, low, high, tuple(seeds))


def _table(fields: dict[str, Any]) -> Table:
    rows = {
        score: {name: _measure(numbers) for name, numbers in row.items()}
        for score, row in fields["rows"].items()
    }
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return Table(**{**fields, **lists, "rows": rows})


def meaning(table: Table) -> str:
    """The noise of a table, such as "16 tokens drawn uniformly and inserted"."""
    return KINDS[table.kind].meaning.format(length=table.length)


def title(table: Table) -> str:
    """What a table is of, in one line."""
    mean = sum(table.realised) / len(table.realised)
    few, many = min(table.polluted), max(table.polluted)
    sequences = f"{few}" if few == many else f"{few} to {many}"
    draws = f"{len(table.realised)} draws, polluted sequences in each: {sequences}"
    return f"{mean:.2%} noise: {meaning(table)}; {draws}"


def compare(table: Table) -> list[str]:
    """Where a table agrees with the paper's and where not, in sentences.

    An agreement in the order of scores is one of the means; of a number, that the paper's lies in
    our interval.
    """
    sentences = []
    names = list(PAPER)
    for measure, heading, theirs in (
        ("tok_prec", "TOK PREC@10%", "tok_prec"),
        ("tok_rec", "TOK REC@10%", "tok_rec"),
        ("hit_mean", "SEQ HIT@10%, read as HIT mean", "hit"),
        ("hit_any", "SEQ HIT@10%, read as HIT any", "hit"),
        ("hit_span", "SEQ HIT@10%, read as HIT span", "hit"),
    ):
        ours = {name: table.rows[name][measure] for name in names}
        order = _order({name: ours[name].value for name in names})
        wanted = _order({name: PAPER[name][theirs] for name in names})
        inside = [n for n in names if ours[n].low <= PAPER[n][theirs] <= ours[n].high]
        agrees = "as in the paper" if order == wanted else f"in the paper {wanted}"
        sentences.append(
            f"{heading}: {order}, {agrees}; our interval holds the paper's number for "
            f"{', '.join(inside) or 'none'}"
        )
    return sentences


def _order(values: Mapping[str, float]) -> str:
    """Names by falling value, such as "a = b > c"."""
    ranked = sorted(values, key=lambda name: -values[name])
    text = ranked[0]
    for before, name in itertools.pairwise(ranked):
        text += (" > " if values[before] > values[name] else " = ") + name
    return text
