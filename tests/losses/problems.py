"""Small problems for the losses, and how results are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np

from ranktuner_jax import losses
from tests import oracles
from tests.tolerances import F32, LOSS_GRADIENT, Tolerance

# Of NumPy or JAX: the losses take either.
Array: TypeAlias = Any
# The name of a method, and its arguments.
Method: TypeAlias = tuple[str, dict[str, Any]]
Params: TypeAlias = dict[str, Array]
Loss: TypeAlias = Callable[..., losses.LossOutput]
# A LossOutput, and the gradients of its total.
Result: TypeAlias = tuple[losses.LossOutput, Any]

# Every method and option: the name, and the arguments that differ from the defaults.
METHODS: list[Method] = [
    ("ranktuner", {}),
    ("ranktuner", {"clip": 1.2}),
    ("ranktuner", {"base": "one"}),
    ("ranktuner", {"base": "one", "clip": 1.5}),
    ("ranktuner", {"scale": "exact"}),
    ("ranktuner", {"base": "one", "scale": "exact"}),
    ("ranktuner", {"base": "one", "scale": "exact", "clip": 1.1}),
    ("sft", {}),
    ("dft", {}),
    ("eaft", {}),
    ("eaft", {"gate": "power", "alpha": 0.5}),
    ("eaft", {"gate": "sigmoid"}),
    ("talr", {}),
    ("talr", {"min_weight": 0.3}),
    ("profit", {}),
    ("profit", {"threshold": 0.3}),
    ("deft", {}),
    ("idft", {}),
    ("idft", {"beta": 0.5}),
    ("entropy", {}),
]
# One of each class, and RankTuner on both scales.
CLASSES: list[Method] = [
    ("ranktuner", {}),
    ("ranktuner", {"base": "one", "scale": "exact", "clip": 1.1}),
    *((name, {}) for name in ("sft", "dft", "eaft", "talr", "profit", "deft", "idft", "entropy")),
]


def method_id(method: Method) -> str:
    name, options = method
    return "-".join([name, *(f"{key}={value}" for key, value in options.items())])


def make_weighting(method: Method) -> losses.Weighting:
    name, options = method
    return losses.WEIGHTINGS[name](**options)


@dataclasses.dataclass(frozen=True)
class Problem:
    hidden: Array
    unembed: Array
    labels: Array
    mask: Array

    @property
    def logits(self) -> Array:
        """Exact in float32, in whatever order they are summed: the entries lie on a grid."""
        return self.hidden.astype(np.float32) @ self.unembed.astype(np.float32).T

    @property
    def inputs(self) -> tuple[Array, ...]:
        return self.hidden, self.unembed, self.labels, self.mask


def make_problem(*shape: int, features: int = 16, vocab: int = 53, seed: int = 0) -> Problem:
    """Logits of an untrained to a confident model, labels of all ranks, half supervised.

    The unembedding is N(0, 1/D): nll starts near log V. Entries are multiples of 1/8 and
    1/32, which makes logits exact in float32 and the factors exact in bfloat16: two correct
    programs agree on every rank, ties included.
    """
    rng = np.random.default_rng(seed)
    temper = np.geomspace(0.5, 8.0, int(np.prod(shape))).reshape(*shape, 1)
    hidden = rng.normal(size=(*shape, features)) * rng.permuted(temper)
    unembed = rng.normal(size=(vocab, features)) / np.sqrt(features)
    hidden = np.round(hidden * 8).clip(-255, 255) / 8
    unembed = np.round(unembed * 32) / 32
    unembed[vocab // 2] = unembed[1]  # tied for every token
    order = np.argsort(-(hidden @ unembed.T), axis=-1)
    rank = np.minimum(rng.geometric(0.5, size=(*shape, 1)) - 1, vocab - 1)
    labels = np.take_along_axis(order, rank, axis=-1)[..., 0]
    labels = np.where(rng.random(shape) < 0.3, rng.integers(0, vocab, shape), labels)
    mask = rng.random(shape) < 0.6
    mask.flat[0] = True
    problem = Problem(
        hidden.astype(np.float32),
        unembed.astype(np.float32),
        labels.astype(np.int32),
        mask,
    )
    _check_away_from_two_bits(problem)
    return problem


def _check_away_from_two_bits(problem: Problem) -> None:
    """Near two bits correct programs may take different branches; other tests cover that."""
    logits = problem.logits[problem.mask].astype(np.float64)
    bits = np.array([oracles.shannon(oracles.softmax(z)) for z in logits]) / np.log(2)
    assert np.abs(bits - 2).min() > 1e-3, "choose another seed"


def oracle(
    problem: Problem, method: Method = ("ranktuner", {}), **options: Any
) -> tuple[oracles.Loss, np.ndarray, np.ndarray]:
    """The oracle's sums and its gradients by hidden and unembed."""
    loss = oracles.weighted_nll(problem.logits, problem.labels, problem.mask, *method, **options)
    features = problem.hidden.shape[-1]
    d_hidden = loss.d_logits @ problem.unembed.astype(np.float64)
    flat = loss.d_logits.reshape(-1, loss.d_logits.shape[-1])
    d_unembed = flat.T @ problem.hidden.astype(np.float64).reshape(-1, features)
    return loss, d_hidden, d_unembed


def compiled(function: Callable[..., Any], *arguments: Any) -> tuple[str, int]:
    """The program that XLA makes of a function, as text, and the bytes of its temporaries."""
    program = jax.jit(function).lower(*arguments).compile()
    text, memory = program.as_text(), program.memory_analysis()
    assert text is not None
    assert memory is not None
    return text, memory.temp_size_in_bytes


def assert_same_sums(
    actual: losses.LossOutput,
    expected: losses.LossOutput | oracles.Loss,
    tolerance: Tolerance = F32,
) -> None:
    np.testing.assert_allclose(actual.total, expected.total, **tolerance, err_msg="total")
    np.testing.assert_array_equal(actual.denom, expected.denom)
    assert set(actual.metrics) == set(expected.metrics)
    for name, value in expected.metrics.items():
        if name == "weight_histogram" and isinstance(expected, oracles.Loss):
            _assert_histogram_of(np.asarray(actual.metrics[name]), expected.weights[expected.mask])
            continue
        np.testing.assert_allclose(actual.metrics[name], value, **tolerance, err_msg=name)


def _assert_histogram_of(histogram: np.ndarray, weights: np.ndarray) -> None:
    """Weights of 1 and of 0.01 lie on an edge: rounding may move them to the bin below."""
    low, high = (
        np.bincount([oracles.histogram_bin(w * f) for w in weights], minlength=64).cumsum()
        for f in (1 - 1e-5, 1 + 1e-5)
    )
    assert np.all(high <= histogram.cumsum())
    assert np.all(histogram.cumsum() <= low)


def assert_same_gradients(actual: Any, expected: Any, tolerance: Tolerance = LOSS_GRADIENT) -> None:
    """Each array relative to its largest entry: small entries are sums that cancel."""
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        largest = np.max(np.abs(e), initial=0.0)
        assert largest > 0, "a gradient of zero compares with nothing"
        np.testing.assert_allclose(a / largest, e / largest, **tolerance, equal_nan=False)
