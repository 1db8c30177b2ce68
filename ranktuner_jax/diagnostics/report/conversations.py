"""The chosen conversations, small enough for the page and ready to be coloured in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ranktuner_jax.diagnostics.report.audited import label
from ranktuner_jax.diagnostics.report.phrasing import counted, number, percent

__all__ = ["encode"]

# Bytes of all conversations together, which keeps the page under 3 MB; longer ones are cut.
_BUDGET = 1_400_000

# What is shown of a token, by the names of conversations.jsonl and of the page.
_COLUMNS = {
    "position": "position",
    "prob": "p",
    "rank": "R",
    "nll": "nll",
    "entropy": "H",
    "max_prob": "p max",
    "expected_rank": "E[R]",
    "expected_rank_bound": "s(H)",
    "relative_rank": "I",
    "relative_scale": "S",
    "relative_scale_exact": "S exact",
}


def encode(
    conversations: Sequence[Mapping[str, Any]],
    methods: Sequence[str],
    means: Sequence[float],
    budget: int = _BUDGET,
) -> dict[str, Any]:
    """The conversations as the page's script reads them.

    A token without supervision is its text; a supervised one is a list of its text, the columns,
    the weights in the order of the methods, and the likeliest alternatives. Conversations are cut
    at the same number of tokens, the largest at which all of them fit into the budget.

    Args:
      conversations: The lines of conversations.jsonl.
      methods: The methods, in the order of the weights.
      means: Each method's mean weight over the whole audit.
      budget: Bytes of JSON.
    """
    tokens = [[_token(token, methods) for token in one["tokens"]] for one in conversations]
    sizes = [[len(json.dumps(token)) for token in one] for one in tokens]
    longest = max(map(len, tokens), default=0)
    while sum(sum(one[:longest]) for one in sizes) > budget:
        longest = int(0.97 * longest)
    shown = []
    for one, all_tokens in zip(conversations, tokens, strict=True):
        supervised = [token for token in one["tokens"] if token["supervised"]]
        note = (
            f"{one['reason'].strip().rstrip('.')}. {counted(len(supervised), 'supervised token')}"
        )
        if supervised:
            mean = sum(token["nll"] for token in supervised) / len(supervised)
            first = sum(token["rank"] == 1 for token in supervised) / len(supervised)
            note += f", mean nll {number(mean)}, {percent(first)} of them the first choice"
        if len(all_tokens) > longest:
            note += f"; the first {longest:,} of {len(all_tokens):,} tokens are shown"
        shown.append(
            {
                "title": f"conversation {one['conversation']} of {one['source']}",
                "note": note[:1].upper() + note[1:] + ".",
                "tokens": all_tokens[:longest],
            }
        )
    return {
        "columns": list(_COLUMNS.values()),
        "methods": [label(method) for method in methods],
        "means": [_short(mean) for mean in means],
        "conversations": shown,
    }


def _token(token: Mapping[str, Any], methods: Sequence[str]) -> str | list[Any]:
    if not token["supervised"]:
        return str(token["token"])
    return [
        token["token"],
        *(_short(token[name]) for name in _COLUMNS),
        [_short(token["weights"][method]) for method in methods],
        [[text, _short(prob)] for text, prob in token["alternatives"]],
    ]


def _short(value: float) -> float:
    """Four digits; whole numbers stay whole."""
    return value if isinstance(value, int) else float(f"{value:.4g}")
