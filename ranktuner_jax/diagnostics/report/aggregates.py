"""What the report shows of an audit, counted batch by batch: memory grows with the vocabulary."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import stats as scipy_stats

from ranktuner_jax import losses
from ranktuner_jax.diagnostics.report.audited import Audit

__all__ = [
    "Aggregates",
    "Extreme",
    "aggregate",
    "context",
    "histogram",
    "in_noise_region",
    "plane",
    "quadrant",
]

Floats: TypeAlias = npt.NDArray[np.floating[Any]]
Ints: TypeAlias = npt.NDArray[np.int64]

# Below and above 2 bits s(H) has different branches; p = ½ is where the label is surely first.
QUADRANT_PROB, QUADRANT_ENTROPY = 0.5, 2 * math.log(2)
QUADRANTS = (
    "known: p ≥ ½, H < 2 bits",
    "conflict: p < ½, H < 2 bits",
    "open: p < ½, H ≥ 2 bits",
    "leading: p ≥ ½, H ≥ 2 bits",
)

# The upper half of a float32 that is not negative: sorted as the numbers are, 256 a factor of 2.
_KEYS = (0x7F800000 >> 15) + 1  # The last one is infinity.

PROB_EDGES = np.linspace(0, 1, 41)
LOG_PROB_EDGES = np.linspace(-8, 0, 49)  # log10 p; the first bin holds smaller ones, too.
ENTROPY_STEP = 0.25  # nats
POSITION_EDGES = np.concatenate([[0], 2 ** np.arange(5, 21)])  # Doubling, from 32.
SAMPLE_ROWS = 50_000
EXTREMES = 10
CONTEXT = 8  # Rows before and after an extreme token that are shown with it.

_STATISTICS = (
    *("conversation", "position", "source", "token_id", "token", "nll", "prob", "rank"),
    *("entropy", "expected_rank", "expected_rank_bound", "relative_rank"),
)


def float_keys(values: npt.NDArray[Any]) -> Ints:
    """Integers that sort as the numbers, to a relative 1/256; these are ≥ 0.

    Example:
      >>> bool(np.all(np.diff(float_keys(np.array([0.0, 1e-9, 0.5, 1.0, 250.0]))) > 0))
      True
    """
    positive = np.maximum(values, 0).astype(np.float32)
    return (positive.view(np.uint32) >> 15).astype(np.int64)


def key_values() -> Floats:
    """The smallest number of each key."""
    return (np.arange(_KEYS, dtype=np.uint32) << 15).view(np.float32).astype(np.float64)


def in_noise_region(rank: npt.NDArray[Any], relative_rank: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """True where |I − 1| < 0.05 and R > 1: the label ranks low, as was to be expected."""
    return (np.abs(relative_rank - 1.0) < losses.NOISE_WIDTH) & (rank > 1)


def quadrant(prob: npt.NDArray[Any], entropy: npt.NDArray[Any]) -> Ints:
    """The index in QUADRANTS of each token."""
    high = entropy >= QUADRANT_ENTROPY
    return np.where(prob >= QUADRANT_PROB, np.where(high, 3, 0), np.where(high, 2, 1))


@dataclasses.dataclass(frozen=True)
class Extreme:
    """One of a method's heaviest or lightest tokens; `before` and `after` are its context."""

    conversation: int
    position: int
    before: str
    token: str
    after: str
    weight: float
    prob: float
    rank: int
    entropy: float


@dataclasses.dataclass
class Aggregates:
    """Sums and counts over the tokens of an audit; the first axis of `[M, …]` is the methods.

    Attributes:
      methods: Their names.
      tokens: Tokens counted: those whose nll is finite.
      left_out: Tokens whose nll is not finite.
      sums: Over tokens, of nll and entropy (nats), top (rank 1), near (R > 1 within a factor of 2
        of 1/p), above (over 1/p), below (E[R] under s(H)).
      plane, plane_noise: Tokens by p and H, and those in the Noise Region.
      rank_plane: Tokens by log10 p and log10 R.
      expected_plane: Tokens by H and log10 E[R].
      bound: Per bin of H: tokens, Σ s(H).
      ratio: Tokens by the key of E[R]/s(H).
      weight, weight_sq, mass: [M] Σ w, Σ w², Σ w·nll.
      weight_keys: [M, K] tokens by the key of their weight.
      by_nll, by_entropy: [K] tokens, and `_mass` [M, K] Σ w·nll.
      by_position, by_position_mass: The same by POSITION_EDGES; by_source by name.
      regions: [5] tokens in the QUADRANTS and the Noise Region; `_weight` and `_mass` [M, 5].
      type_count, type_nll, type_weight: By token id: tokens, Σ nll, [M, V] Σ w.
      type_text: A text of each token id.
      sample: [n, M] weights of every `stride`-th token.
      heaviest, lightest: Per method, the most extreme first; of equal weights, the larger nll.
    """

    methods: tuple[str, ...]
    vocab_size: int
    stride: int
    tokens: int = 0
    left_out: int = 0

    def __post_init__(self) -> None:
        M, K = len(self.methods), _KEYS
        entropy_bins = math.ceil(math.log(self.vocab_size) / ENTROPY_STEP) + 1
        self.entropy_edges = ENTROPY_STEP * np.arange(entropy_bins + 1)
        decades = math.ceil(math.log10(self.vocab_size))
        self.rank_edges = np.linspace(0, decades, 6 * decades + 1)
        self.sums = dict.fromkeys(("nll", "entropy", "top", "near", "above", "below"), 0.0)
        self.plane = np.zeros((len(PROB_EDGES) - 1, entropy_bins))
        self.plane_noise = np.zeros_like(self.plane)
        self.rank_plane = np.zeros((len(LOG_PROB_EDGES) - 1, 6 * decades))
        self.expected_plane = np.zeros((entropy_bins, 6 * decades))
        self.bound = np.zeros((2, entropy_bins))
        self.ratio = np.zeros(K)
        self.weight, self.weight_sq, self.mass = np.zeros(M), np.zeros(M), np.zeros(M)
        self.weight_keys = np.zeros((M, K))
        self.by_nll, self.by_nll_mass = np.zeros(K), np.zeros((M, K))
        self.by_entropy, self.by_entropy_mass = np.zeros(K), np.zeros((M, K))
        positions = len(POSITION_EDGES)
        self.by_position = np.zeros(positions)
        self.by_position_mass = np.zeros((M, positions))
        self.by_source: dict[str, float] = {}
        self.by_source_mass: dict[str, Floats] = {}
        self.regions = np.zeros(5)
        self.regions_weight, self.regions_mass = np.zeros((M, 5)), np.zeros((M, 5))
        self.type_count, self.type_nll = np.zeros(self.vocab_size), np.zeros(self.vocab_size)
        self.type_weight = np.zeros((M, self.vocab_size))
        self.type_text: dict[int, str] = {}
        self._samples: list[Floats] = []
        self._seen = 0
        # Per method and end: (key, row number, token), the least extreme first.
        self._extremes: list[list[list[tuple[int, int, Extreme]]]] = [[[], []] for _ in range(M)]

    def add(self, batch: pa.RecordBatch) -> None:
        """Counts a batch of tokens.parquet."""
        first, self._seen = self._seen, self._seen + batch.num_rows
        good = np.isfinite(batch.column("nll").to_numpy())
        self.left_out += int(np.sum(~good))
        if not good.all():
            batch = batch.filter(pa.array(good))
        if not batch.num_rows:
            return
        column = {
            name: batch.column(name).to_numpy().astype(np.float64)
            for name in batch.schema.names
            if name not in ("source", "token", "token_id")
        }
        weights = np.stack([column[f"weight/{method}"] for method in self.methods])
        self.tokens += batch.num_rows
        self._add_statistics(column)
        nll_key, entropy_key = float_keys(column["nll"]), float_keys(column["entropy"])
        position = np.searchsorted(POSITION_EDGES, column["position"], side="right") - 1
        region = quadrant(column["prob"], column["entropy"])
        noise = in_noise_region(column["rank"], column["relative_rank"])
        token_id = batch.column("token_id").to_numpy().astype(np.int64)
        sources = batch.column("source").cast(pa.string()).dictionary_encode()
        source = sources.indices.to_numpy().astype(np.int64)
        names = sources.dictionary.to_pylist()
        everywhere = np.ones(batch.num_rows)

        def masses(key: Ints, size: int) -> Floats:
            return np.stack([_binned(key, size, w * column["nll"]) for w in weights])

        self.weight += weights.sum(1)
        self.weight_sq += (weights**2).sum(1)
        self.mass += weights @ column["nll"]
        self.weight_keys += np.stack([_binned(float_keys(w), _KEYS, everywhere) for w in weights])
        self.by_nll += _binned(nll_key, _KEYS, everywhere)
        self.by_nll_mass += masses(nll_key, _KEYS)
        self.by_entropy += _binned(entropy_key, _KEYS, everywhere)
        self.by_entropy_mass += masses(entropy_key, _KEYS)
        self.by_position += _binned(position, len(POSITION_EDGES), everywhere)
        self.by_position_mass += masses(position, len(POSITION_EDGES))
        source_mass = masses(source, len(names))
        for index, name in enumerate(names):
            here = float(np.sum(source == index))
            self.by_source[name] = self.by_source.get(name, 0.0) + here
            self.by_source_mass[name] = (
                self.by_source_mass.get(name, np.zeros(len(weights))) + source_mass[:, index]
            )
        inside = np.concatenate([np.arange(4)[:, None] == region, noise[None]]).astype(np.float64)
        self.regions += inside.sum(1)
        self.regions_weight += weights @ inside.T
        self.regions_mass += (weights * column["nll"]) @ inside.T
        self.type_count += _binned(token_id, self.vocab_size, everywhere)
        self.type_nll += _binned(token_id, self.vocab_size, column["nll"])
        self.type_weight += np.stack([_binned(token_id, self.vocab_size, w) for w in weights])
        for index in np.unique(token_id, return_index=True)[1]:
            self.type_text.setdefault(int(token_id[index]), str(batch.column("token")[index]))
        rows = first + np.flatnonzero(good)
        self._samples.append(weights[:, rows % self.stride == 0].T)
        self._add_extremes(batch, column, weights, rows)

    def _add_statistics(self, column: Mapping[str, Floats]) -> None:
        prob, rank, entropy = column["prob"], column["rank"], column["entropy"]
        expected, bound = column["expected_rank"], column["expected_rank_bound"]
        noise = in_noise_region(rank, column["relative_rank"])
        envelope = rank * prob
        self.sums["nll"] += column["nll"].sum()
        self.sums["entropy"] += entropy.sum()
        self.sums["top"] += np.sum(rank == 1)
        self.sums["near"] += np.sum((rank > 1) & (envelope >= 0.5))
        self.sums["above"] += np.sum(envelope > 1.001)  # float32 rounds p.
        self.sums["below"] += np.sum(expected < 0.995 * bound)  # E[R] is within 0.35 %.
        self.ratio += _binned(float_keys(expected / bound), _KEYS, np.ones_like(bound))
        with np.errstate(divide="ignore"):
            log_prob = np.maximum(np.log10(prob), LOG_PROB_EDGES[0])
        self.plane += plane(prob, PROB_EDGES, entropy, self.entropy_edges)
        self.plane_noise += plane(prob[noise], PROB_EDGES, entropy[noise], self.entropy_edges)
        self.rank_plane += plane(log_prob, LOG_PROB_EDGES, np.log10(rank), self.rank_edges)
        log_expected = np.log10(np.maximum(expected, 1))
        self.expected_plane += plane(entropy, self.entropy_edges, log_expected, self.rank_edges)
        entropy_bin = _bins(entropy, self.entropy_edges)
        size = len(self.entropy_edges) - 1
        self.bound += np.stack(
            [_binned(entropy_bin, size, x) for x in (np.ones_like(bound), bound)]
        )

    def _add_extremes(
        self, batch: pa.RecordBatch, column: Mapping[str, Floats], weights: Floats, rows: Ints
    ) -> None:
        # One integer orders by weight, then by nll: the bits of a float32 ≥ 0 sort as it does.
        bits = np.maximum(weights, 0).astype(np.float32).view(np.uint32).astype(np.int64)
        nll_bits = column["nll"].astype(np.float32).view(np.uint32).astype(np.int64)
        count = min(EXTREMES, batch.num_rows)
        for method, own in enumerate(bits):
            for end, sign in enumerate((1, -1)):
                key = (sign * own << 32) + nll_bits
                kept = self._extremes[method][end]
                for index in np.argpartition(-key, count - 1)[:count]:
                    if len(kept) == EXTREMES and key[index] <= kept[0][0]:
                        continue
                    token = _extreme(batch, column, int(index), float(weights[method, index]))
                    entry = (int(key[index]), -int(rows[index]), token)
                    push = heapq.heappushpop if len(kept) == EXTREMES else heapq.heappush
                    push(kept, entry)

    def _ends(self, method: str, end: int) -> list[Extreme]:
        kept = self._extremes[self.methods.index(method)][end]
        return [token for _, _, token in sorted(kept, reverse=True)]

    def heaviest(self, method: str) -> list[Extreme]:
        """The tokens of the largest weight; of equal weights, the larger nll."""
        return self._ends(method, 0)

    def lightest(self, method: str) -> list[Extreme]:
        """The tokens of the smallest weight; of equal weights, the larger nll."""
        return self._ends(method, 1)

    def effective_share(self) -> Floats:
        """[M] (Σw)²/(n·Σw²): 1 for equal weights, 0 where all are 0."""
        power = self.tokens * self.weight_sq
        return self.weight**2 / np.where(power == 0, 1.0, power)

    def quantile(self, method: str, q: float) -> float:
        """A quantile of a method's weights, to a relative 1/256."""
        return key_quantile(self.weight_keys[self.methods.index(method)], q)

    def deciles(self, by: str) -> Floats:
        """[M, 10] the share of the weighted nll by tenth of the tokens, from the lowest p or H."""
        count = getattr(self, f"by_{'nll' if by == 'p' else by}")
        mass = getattr(self, f"by_{'nll' if by == 'p' else by}_mass")
        shares = tenths(count, mass)
        return shares[:, ::-1] if by == "p" else shares

    def decile_edges(self, by: str) -> list[float]:
        """The 11 values of p or H (nats) between which the tenths lie."""
        quantiles = np.arange(11) / 10
        if by == "p":
            return [math.exp(-key_quantile(self.by_nll, 1 - q)) for q in quantiles]
        return [key_quantile(self.by_entropy, q) for q in quantiles]

    def correlation(self) -> tuple[list[str], Floats, int]:
        """Spearman's rank correlation of the methods whose weights differ at all.

        Returns:
          Their names, the matrix, and the number of tokens that it was computed on.
        """
        sample = np.concatenate(self._samples) if self._samples else np.zeros((0, 0))
        varied = [m for m in range(sample.shape[1]) if len(sample) > 1 and np.ptp(sample[:, m]) > 0]
        ranks = np.stack([scipy_stats.rankdata(sample[:, m]) for m in varied] or [np.arange(2.0)])
        names = [self.methods[m] for m in varied]
        return names, np.atleast_2d(np.corrcoef(ranks))[: len(names), : len(names)], len(sample)


def aggregate(audit: Audit) -> Aggregates:
    """Reads tokens.parquet once, batch by batch."""
    columns = [*_STATISTICS, *(f"weight/{method}" for method in audit.methods)]
    stride = max(1, math.ceil(audit.rows / SAMPLE_ROWS))
    sums = Aggregates(audit.methods, int(audit.about["vocab_size"]), stride)
    for batch in audit.batches(columns):
        sums.add(batch)
    return sums


def key_quantile(count: Floats, q: float) -> float:
    """The value at a quantile of a histogram over keys; 0 if it is empty."""
    below = np.cumsum(count)
    if below[-1] == 0:
        return 0.0
    # At least one token, so that q = 0 is the smallest value that occurs.
    index = np.searchsorted(below, max(q * below[-1], 0.5))
    return float(key_values()[min(int(index), _KEYS - 1)])


def tenths(count: Floats, mass: Floats) -> Floats:
    """[M, 10] shares of `mass` [M, K] in the tenths of `count` [K].

    Tokens of one key that a border splits share their mass evenly.

    Example:
      >>> tenths(np.array([5.0, 5.0]), np.array([[0.0, 1.0]])).round(2).tolist()
      [[0.0, 0.0, 0.0, 0.0, 0.0, 0.2, 0.2, 0.2, 0.2, 0.2]]
    """
    used = count > 0
    below = np.concatenate([[0], np.cumsum(count[used])])
    borders = np.linspace(0, below[-1], 11)
    sums = [np.interp(borders, below, np.concatenate([[0], np.cumsum(m[used])])) for m in mass]
    parts = np.diff(np.stack(sums))
    total = parts.sum(1, keepdims=True)
    return parts / np.where(total == 0, 1.0, total)


def _binned(key: Ints, size: int, values: Floats) -> Floats:
    return np.bincount(key, weights=values, minlength=size).astype(np.float64)


def histogram(values: Floats, edges: Floats) -> Floats:
    """Counts between edges; values outside are in the outermost bins."""
    return np.bincount(_bins(values, edges), minlength=len(edges) - 1).astype(np.float64)


def _bins(values: Floats, edges: Floats) -> Ints:
    index = np.searchsorted(edges, values, side="right") - 1
    return np.clip(index, 0, len(edges) - 2)


def plane(x: Floats, x_edges: Floats, y: Floats, y_edges: Floats) -> Floats:
    """Counts by two values: [X, Y]; those outside the edges are in the outermost bins."""
    shape = (len(x_edges) - 1, len(y_edges) - 1)
    flat = _bins(x, x_edges) * shape[1] + _bins(y, y_edges)
    return np.bincount(flat, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)


def context(batch: pa.RecordBatch, index: int) -> tuple[str, str, str]:
    """A token's text, between the texts of its neighbours of the same conversation."""
    start, stop = max(0, index - CONTEXT), min(batch.num_rows, index + CONTEXT // 2 + 1)
    texts = batch.column("token").slice(start, stop - start).to_pylist()
    conversation = batch.column("conversation").slice(start, stop - start).to_numpy()
    same = conversation == conversation[index - start]
    texts = [text if here else "" for text, here in zip(texts, same, strict=True)]
    middle = index - start
    return "".join(texts[:middle]), texts[middle], "".join(texts[middle + 1 :])


def _extreme(
    batch: pa.RecordBatch, column: Mapping[str, Floats], index: int, weight: float
) -> Extreme:
    before, token, after = context(batch, index)
    return Extreme(
        conversation=int(column["conversation"][index]),
        position=int(column["position"][index]),
        before=before,
        token=token,
        after=after,
        weight=weight,
        prob=float(column["prob"][index]),
        rank=int(column["rank"][index]),
        entropy=float(column["entropy"][index]),
    )
