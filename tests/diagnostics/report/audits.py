"""Folders as an audit leaves them, from random logits and the statistics of the losses."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ranktuner_jax import losses
from ranktuner_jax.losses.ranktuner import expected_rank_bound

HOSTILE = "</script><script>alert(1)</script>"
PIECES = (
    *(" the", " of", "\n", " 1", " 2", "frac", "{", "}", "\\", " so", " we", " find", "\tx"),
    *(HOSTILE, "<img src=x onerror=alert(2)>", '"', "'", "&amp;", "\u2028", "é", "\ufffd", "日本"),
)
METHODS: dict[str, losses.Weighting] = {
    **{name: make() for name, make in losses.WEIGHTINGS.items() if name != "ranktuner"},
    "ranktuner": losses.RankTuner(),
    "ranktuner_one": losses.RankTuner(base="one"),
    "ranktuner_exact": losses.RankTuner(scale="exact"),
    "ranktuner_one_exact": losses.RankTuner(base="one", scale="exact"),
}
STATISTICS = (
    *("nll", "prob", "rank", "entropy", "max_prob", "expected_rank", "expected_rank_bound"),
    *("topk_entropy", "collision", "relative_rank", "relative_scale", "relative_scale_exact"),
)


def write_audit(
    folder: pathlib.Path,
    *,
    seed: int = 0,
    conversations: int = 24,
    length: int = 40,
    vocab: int = 97,
    sources: tuple[str, ...] = ("gsm8k", f"mine{HOSTILE}"),
    logits_of: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Writes a folder and returns its columns; `logits_of(logits, labels)` changes the model."""
    rng = np.random.default_rng(seed)
    texts = [PIECES[i % len(PIECES)] if i < 60 else f" w{i}" for i in range(vocab)]
    count = conversations * length
    labels = rng.integers(0, vocab, count).astype(np.int32)
    logits = rng.normal(size=(count, vocab)) * rng.choice([0.3, 1.0, 3.0], (count, 1))
    logits[np.arange(count), labels] += rng.choice([0.0, 3.0, 9.0], count)
    if logits_of is not None:
        logits = logits_of(logits, labels)
    stats = losses.token_stats(
        jnp.asarray(logits, jnp.float32),
        jnp.asarray(labels),
        ("expected_rank", "topk_entropy", "collision"),
    )
    columns: dict[str, np.ndarray] = {
        "conversation": np.repeat(np.arange(conversations), length).astype(np.int64),
        "position": np.tile(np.arange(5, 5 + length), conversations).astype(np.int32),
        "token_id": labels,
        "expected_rank_bound": np.asarray(expected_rank_bound(stats)),
        "relative_rank": np.asarray(losses.relative_rank(stats)),
        "relative_scale": np.asarray(losses.RankTuner(base="one")(stats)),
        "relative_scale_exact": np.asarray(losses.RankTuner(base="one", scale="exact")(stats)),
        "prob": np.asarray(stats.prob),
    }
    for name in (
        "nll",
        "rank",
        "entropy",
        "max_prob",
        "expected_rank",
        "topk_entropy",
        "collision",
    ):
        columns[name] = np.asarray(getattr(stats, name))
    tau = jnp.median(jnp.mean(stats.nll.reshape(conversations, length), axis=1))
    for name, method in METHODS.items():
        batch_stat = tau if method.uses_batch_statistic else None
        columns[f"weight/{name}"] = np.asarray(method(stats, batch_stat))
    source = [sources[int(c) % len(sources)] for c in columns["conversation"]]
    table = pa.table(
        {
            "conversation": columns["conversation"],
            "position": columns["position"],
            "source": pa.array(source).dictionary_encode(),
            "token_id": labels,
            "token": [texts[i] for i in labels],
            **{name: columns[name] for name in STATISTICS},
            **{f"weight/{name}": columns[f"weight/{name}"] for name in METHODS},
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "tokens.parquet", row_group_size=300)
    about = {
        "version": 1,
        "model": "tiny<b>",
        "source": "rows.jsonl",
        "split": "train",
        "row_length": 128,
        "vocab_size": vocab,
        "conversations": conversations,
        "tokens": count,
        "talr_tau": float(tau),
        "methods": list(METHODS),
        "config": {},
        "chosen": "Four of the highest mean nll, the rest at random",
        "seconds": 2.0,
        "tokens_per_second": count / 2,
    }
    (folder / "audit.json").write_text(json.dumps(about))
    best = np.argsort(-logits, axis=1)[:, :5]
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    lines = []
    for c in range(min(20, conversations)):
        tokens: list[dict[str, Any]] = [
            {"position": i, "token": f" ask{i}", "token_id": 0, "supervised": False}
            for i in range(4)
        ]
        tokens.append({"position": 4, "token": HOSTILE, "token_id": 1, "supervised": False})
        for row in range(c * length, (c + 1) * length):
            numbers = {
                name: columns[name][row].item()
                for name in STATISTICS
                if name not in ("topk_entropy", "collision")
            }
            tokens.append(
                {
                    "position": int(columns["position"][row]),
                    "token": texts[labels[row]],
                    "token_id": int(labels[row]),
                    "supervised": True,
                    **numbers,
                    "weights": {m: columns[f"weight/{m}"][row].item() for m in METHODS},
                    "alternatives": [[texts[v], float(probs[row, v])] for v in best[row]],
                }
            )
        source_name = sources[c % len(sources)]
        lines.append(
            {
                "conversation": c,
                "source": source_name,
                "reason": "drawn at random",
                "tokens": tokens,
            }
        )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "conversations.jsonl").write_text(text)
    return columns | {"source": np.array(source)}


def cut_audit(source: pathlib.Path, target: pathlib.Path, rows: int) -> None:
    """Copies an audit with the first rows, and what of its first conversation they cover."""
    target.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pq.read_table(source / "tokens.parquet").slice(0, rows), target / "tokens.parquet"
    )
    about = json.loads((source / "audit.json").read_text())
    about |= {"tokens": rows, "conversations": 1}
    (target / "audit.json").write_text(json.dumps(about))
    first = json.loads((source / "conversations.jsonl").read_text().split("\n")[0])
    asked = sum(not token["supervised"] for token in first["tokens"])
    first["tokens"] = first["tokens"][: asked + rows]
    (target / "conversations.jsonl").write_text(json.dumps(first) + "\n")
