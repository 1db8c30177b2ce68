"""Which conversations of an audit are shown whole, and what is said of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ranktuner_jax.data import Rows
from ranktuner_jax.diagnostics.columns import WEIGHT
from ranktuner_jax.diagnostics.layout import batches, owners, pack
from ranktuner_jax.diagnostics.scoring import TokenScorer
from ranktuner_jax.diagnostics.texts import TokenTexts

__all__ = ["RULE", "Alternatives", "Chosen", "choose", "describe_conversation", "find_alternatives"]

_EXTREMES, _SPREAD = 5, 10
_SHOWN, _BEFORE = 400, 100  # Tokens of a conversation, and those before the supervised ones.
_DIGITS = 5
_FIGURES = (
    *("nll", "prob", "rank", "entropy", "max_prob", "expected_rank", "expected_rank_bound"),
    *("relative_rank", "relative_scale", "relative_scale_exact"),
)

RULE = (
    f"Of the half of the conversations with the most supervised tokens, the {_EXTREMES} whose mean "
    f"relative scale S is highest and the {_EXTREMES} where it is lowest; of all others, "
    f"{_SPREAD} spread evenly from the lowest to the highest mean nll. Of a long one, "
    f"{_SHOWN} tokens are shown, at most {_BEFORE} of them before the first supervised one."
)

Alternatives = dict[tuple[int, int], list[tuple[int, float]]]
"""(conversation, position) -> the likeliest token ids with their probabilities."""


class Chosen(NamedTuple):
    """A conversation that is shown, and why.

    Attributes:
      conversation: Its number.
      reason: The part of the rule that chose it.
    """

    conversation: int
    reason: str


def choose(counts: np.ndarray, nll: np.ndarray, scale: np.ndarray) -> list[Chosen]:
    """Chooses conversations by `RULE`; fewer than 20 are all chosen.

    Args:
      counts: The supervised tokens of each conversation.
      nll: Their mean nll; not read where there are none.
      scale: Their mean relative scale.

    Returns:
      The chosen ones, in the order of the rule.

    Example:
      >>> scale = np.linspace(0.8, 1.2, 100)
      >>> chosen = choose(np.full(100, 9), nll=np.linspace(0.0, 2.0, 100), scale=scale)
      >>> [one.conversation for one in chosen][:8], chosen[0].reason
      ([99, 98, 97, 96, 95, 0, 1, 2], 'mean relative scale 1.200, number 1 from the top')
    """
    scored = np.flatnonzero(counts)
    extreme = scored[counts[scored] >= np.median(counts[scored])]
    rising = extreme[np.argsort(scale[extreme], kind="stable")]
    lowest = rising[: min(_EXTREMES, len(rising) // 2)]
    highest = rising[::-1][: min(_EXTREMES, len(rising) - len(lowest))]
    others = np.setdiff1d(scored, [*lowest, *highest])
    by_nll = others[np.argsort(nll[others], kind="stable")]
    picks = np.unique(
        np.linspace(0, len(by_nll) - 1, min(_SPREAD, len(by_nll))).round().astype(int)
    )
    return [
        *(
            Chosen(int(c), f"mean relative scale {scale[c]:.3f}, number {n} from the {end}")
            for end, numbers in (("top", highest), ("bottom", lowest))
            for n, c in enumerate(numbers, 1)
        ),
        *(
            Chosen(int(c), f"mean nll {nll[c]:.3f}, rank {pick + 1:,} of {len(by_nll):,} others")
            for pick, c in zip(picks, by_nll[picks], strict=True)
        ),
    ]


def find_alternatives(
    scorer: TokenScorer,
    rows: Rows,
    chosen: Sequence[Chosen],
    *,
    batch_size: int,
    packing: bool = True,
    count: int = 5,
) -> Alternatives:
    """The likeliest tokens at each supervised position of some conversations.

    With several processes all must call, with the same conversations, and all get the result.
    """
    numbers = [one.conversation for one in chosen]
    groups = pack(numbers, rows.lengths, rows.row_length, packing=packing)
    found: Alternatives = {}
    for here, batch in batches(rows, groups, batch_size):
        ids, probs = map(np.asarray, scorer.likeliest(batch, count))
        conversation, position = owners(here, batch)
        for at in zip(*np.nonzero(batch.mask), strict=True):
            likeliest = list(zip(ids[at].tolist(), probs[at].tolist(), strict=True))
            found[int(conversation[at]), int(position[at])] = likeliest
    return found


def describe_conversation(
    one: Chosen, rows: Rows, scored: pa.Table, found: Alternatives, texts: TokenTexts
) -> dict[str, Any]:
    """The line of `conversations.jsonl` of a conversation.

    Args:
      one: The conversation.
      rows: The data.
      scored: All columns of its supervised tokens.
      found: The likeliest tokens at its positions.
      texts: Gives the tokens' texts.
    """
    tokens = rows.conversation(one.conversation).tokens.tolist()
    figures = {int(row["position"]): row for row in scored.to_pylist()}
    start = max(0, min(min(figures) - _BEFORE, len(tokens) - _SHOWN))
    return {
        "conversation": one.conversation,
        "source": scored["source"][0].as_py(),
        "reason": one.reason,
        "tokens": [
            {
                "position": position,
                "token": texts[token],
                "token_id": token,
                "supervised": position in figures,
                **_figures(figures.get(position)),
                **_likeliest(found.get((one.conversation, position)), texts),
            }
            for position, token in list(enumerate(tokens))[start : start + _SHOWN]
        ],
    }


def _figures(row: Mapping[str, Any] | None) -> dict[str, Any]:
    if row is None:
        return {}
    weights = dict(_rounded(row, WEIGHT))
    return {name: _round(row[name]) for name in _FIGURES} | {"weights": weights}


def _rounded(row: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if name.startswith(prefix):
            yield name.removeprefix(prefix), _round(value)


def _likeliest(
    found: Sequence[tuple[int, float]] | None, texts: TokenTexts
) -> dict[str, list[list[Any]]]:
    if found is None:
        return {}
    return {"alternatives": [[texts[token], _round(prob)] for token, prob in found]}


def _round(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.{_DIGITS}g}")
