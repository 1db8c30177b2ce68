"""The losses in float64 NumPy, one token at a time, transcribed from the papers.

Nothing here is imported from the package. Logits come in as the program under test saw
them (ranks compare float32 logits), and everything after that is computed in float64.

References:
  RankTuner arXiv:2602.01745, DFT 2508.05629, EAFT 2601.02151, TALR 2509.20758,
  ProFit 2601.09195, DEFT 2602.11424, IDFT 2602.12222.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np


@dataclasses.dataclass
class Token:
    """The statistics of one supervised position."""

    probs: np.ndarray
    nll: float
    prob: float
    rank: int
    entropy: float
    max_prob: float
    expected_rank: float
    topk_entropy: float
    collision: float
    vocab_size: int


@dataclasses.dataclass
class Loss:
    """Sums over the supervised tokens, and the gradient of `total` by the logits."""

    total: float
    denom: float
    metrics: dict[str, Any]
    weights: np.ndarray
    mask: np.ndarray
    d_logits: np.ndarray


def softmax(logits: np.ndarray) -> np.ndarray:
    mass = np.exp(logits - np.max(logits))
    return mass / np.sum(mass)


def shannon(probs: np.ndarray) -> float:
    """Entropy in nats; an impossible outcome counts 0."""
    possible = probs[probs > 0]
    return float(-np.sum(possible * np.log(possible)))


def token(logits: np.ndarray, label: int) -> Token:
    logits = np.asarray(logits, np.float64)
    probs = softmax(logits)
    peak = np.max(logits)
    nll = float(np.log(np.sum(np.exp(logits - peak))) + peak - logits[label])
    falling = np.sort(probs)[::-1]
    return Token(
        probs=probs,
        nll=nll,
        prob=math.exp(-nll),
        rank=int(np.sum(logits >= logits[label])),
        entropy=shannon(probs),
        max_prob=float(np.max(probs)),
        expected_rank=float(np.sum(np.arange(1, len(falling) + 1) * falling)),
        topk_entropy=shannon(softmax(np.sort(logits)[::-1][:20])),
        collision=float(np.sum(probs**2)),
        vocab_size=len(logits),
    )


def expected_rank_bound(t: Token) -> float:
    """s(H)."""
    bits = t.entropy / math.log(2)
    return 0.25 * 2**bits + 1 if bits >= 2 else 1 + (1 - t.max_prob)


def f(x: float) -> float:
    return 1 / math.log2(x + 1)


def indicator(rank: float, expected_rank: float) -> float:
    """The Relative Rank Indicator I."""
    return 2 ** (f(rank) - f(expected_rank))


def relative_scale(t: Token, scale: str = "bound") -> float:
    """The Relative Scale S, before any clip."""
    if scale == "exact":
        return 1 / indicator(t.rank, t.expected_rank)
    bound = expected_rank_bound(t)
    xi = max(bound, t.rank)
    k = 1 / math.log2(xi + 1) ** 2
    return max(t.prob * bound, 1e-6) ** -k


def weight(t: Token, method: str, options: dict[str, Any], tau: float | None = None) -> float:
    o = options
    if method == "ranktuner":
        s = relative_scale(t, o.get("scale", "bound"))
        if o.get("clip") is not None:
            s = min(s, o["clip"])
        return s * (t.prob if o.get("base", "prob") == "prob" else 1)
    if method == "sft":
        return 1
    if method == "dft":
        return t.prob
    if method == "eaft":
        u = t.topk_entropy / 3.0
        gate = o.get("gate", "linear")
        if gate == "sigmoid":
            return 1 / (1 + math.exp(-30 * (u - 0.17)))
        return u ** o["alpha"] if gate == "power" else u
    if method == "talr":
        assert tau is not None
        return max(t.prob ** (1 / tau), o.get("min_weight", 0.01))
    if method == "profit":
        return 1 if t.prob >= o.get("threshold", 0.1) else 0
    if method == "deft":
        return t.prob**t.collision
    if method == "idft":
        gamma = math.exp(-(math.log(t.prob) + t.entropy) / o.get("beta", 1.0))
        return t.prob ** min(max(gamma, 0.1), 2.0)
    if method == "entropy":
        return t.entropy / math.log(t.vocab_size)
    raise KeyError(method)


def talr_tau(tokens: dict[int, Token], sequence: np.ndarray) -> float:
    """The median over sequences of the mean nll of their supervised tokens."""
    by_sequence: dict[int, list[float]] = {}
    for n, t in tokens.items():
        by_sequence.setdefault(int(sequence[n]), []).append(t.nll)
    means = [sum(nlls) / len(nlls) for nlls in by_sequence.values()]
    return max(float(np.median(means)), 1e-6) if means else 1e-6


def weighted_nll(
    logits: np.ndarray,
    labels: np.ndarray,
    mask: np.ndarray,
    method: str = "ranktuner",
    options: dict[str, Any] | None = None,
    *,
    token_weights: np.ndarray | None = None,
    sequence_ids: np.ndarray | None = None,
    ramp: float = 1.0,
) -> Loss:
    """The loss of logits [..., V]; each row of the last axis of labels is a sequence."""
    options = options or {}
    logits = np.asarray(logits, np.float64)
    shape, vocab_size = logits.shape, logits.shape[-1]
    if sequence_ids is None:
        rows = np.arange(math.prod(labels.shape[:-1])).reshape(*labels.shape[:-1], 1)
        sequence_ids = np.broadcast_to(rows, labels.shape)
    logits = logits.reshape(-1, vocab_size)
    labels, mask = np.ravel(labels), np.ravel(mask).astype(bool)
    supervised = [n for n in range(len(labels)) if mask[n]]
    tokens = {n: token(logits[n], labels[n]) for n in supervised}
    tau = talr_tau(tokens, np.ravel(sequence_ids)) if method == "talr" else None

    exact = method == "ranktuner" and options.get("scale") == "exact"
    noise_key = "noise_region" if exact else "noise_region_bound"
    metrics: dict[str, Any] = dict.fromkeys(
        ("nll", "correct", "rank", "entropy", "weight", "weight_sq", "clipped", noise_key), 0.0
    )
    metrics["weight_histogram"] = np.zeros(64)
    weights = np.zeros(len(labels))
    d_logits = np.zeros_like(logits)
    total = 0.0
    for n in supervised:
        t = tokens[n]
        w = (1 - ramp) + ramp * weight(t, method, options, tau)
        if token_weights is not None:
            w *= np.ravel(token_weights)[n]
        weights[n] = w
        total += w * t.nll
        onehot = np.arange(vocab_size) == labels[n]
        d_logits[n] = w * (t.probs - onehot)

        metrics["nll"] += t.nll
        metrics["correct"] += t.rank == 1
        metrics["rank"] += t.rank
        metrics["entropy"] += t.entropy
        metrics["weight"] += w
        metrics["weight_sq"] += w**2
        if method == "ranktuner" and options.get("clip") is not None:
            s = relative_scale(t, options.get("scale", "bound"))
            metrics["clipped"] += s > options["clip"]
        expected = t.expected_rank if exact else expected_rank_bound(t)
        metrics[noise_key] += t.rank > 1 and abs(indicator(t.rank, expected) - 1) < 0.05
        metrics["weight_histogram"][histogram_bin(w)] += 1
    return Loss(total, float(len(supervised)), metrics, weights, mask, d_logits.reshape(shape))


def histogram_bin(w: float) -> int:
    """8 bins a decade from 1e-5; the first and the last take what lies outside."""
    if w <= 0:
        return 0
    return min(max(math.floor((math.log10(w) + 5) * 8), 0), 63)
