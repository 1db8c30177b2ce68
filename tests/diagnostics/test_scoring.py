"""Statistics and weights of tokens equal the float64 oracle's, on one device and on eight."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from ranktuner_jax import losses, models
from ranktuner_jax.data import Batch
from ranktuner_jax.diagnostics import TokenScorer, audit_methods, method_weights
from ranktuner_jax.diagnostics.scoring import ALL_FIELDS
from ranktuner_jax.errors import UserError
from tests import oracles
from tests.losses.problems import Method, make_problem
from tests.tolerances import EXACT_SCALE, EXPECTED_RANK, F32

CONFIG = models.DecoderConfig(
    vocab_size=53,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    vocab_multiple=4,
)
# The names that an audit gives to methods, and what the oracle calls them.
NAMES: dict[str, Method] = {
    **{name: (name, {}) for name in ("sft", "dft", "eaft", "talr", "profit", "deft", "idft")},
    "entropy": ("entropy", {}),
    "ranktuner": ("ranktuner", {}),
    "ranktuner_one": ("ranktuner", {"base": "one"}),
    "ranktuner_exact": ("ranktuner", {"scale": "exact"}),
    "ranktuner_one_exact": ("ranktuner", {"base": "one", "scale": "exact"}),
}


def make_batch(rng: np.random.Generator) -> Batch[np.ndarray]:
    """Eight rows of two conversations each, the first row without a supervised token."""
    tokens = rng.integers(0, CONFIG.vocab_size, (8, 12))
    mask = rng.random((8, 12)) < 0.6
    mask[0] = False
    segments = np.broadcast_to(np.where(np.arange(12) < 5, 1, 2), (8, 12))
    positions = np.broadcast_to(np.r_[0:5, 0:7], (8, 12))
    labels = np.roll(tokens, -1, 1)
    names = ("tokens", "labels", "mask", "segment_ids", "positions")
    return Batch.of(dict(zip(names, (tokens, labels, mask, segments, positions), strict=True)))


def make_model(mesh: jax.sharding.Mesh | None = None) -> models.Decoder:
    model = models.Decoder(CONFIG, rngs=nnx.Rngs(0), mesh=mesh)
    model.embed[...] *= 15  # Predictions from flat to confident; the inputs are normalised.
    if mesh is not None:
        state = nnx.state(model)
        shardings = models.partition.param_shardings(nnx.to_pure_dict(state), mesh)
        nnx.replace_by_pure_dict(state, jax.device_put(nnx.to_pure_dict(state), shardings))
        nnx.update(model, state)
    return model


def logits_of(model: models.Decoder, batch: Batch[np.ndarray]) -> np.ndarray:
    given = (jnp.asarray(x) for x in (batch.tokens, batch.positions, batch.segment_ids))
    return np.asarray(model.logits(model(*given)))


@pytest.mark.parametrize("shape", [None, (2, 2, 2)], ids=str)
def test_statistics_equal_the_oracles_on_every_mesh(
    shape: tuple[int, ...] | None, rng: np.random.Generator
) -> None:
    batch = make_batch(rng)
    mesh = None
    if shape is not None:
        axes = ("data", "fsdp", "tensor")
        devices = jax.devices()[: int(np.prod(shape))]
        mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * 3, devices=devices)
    stats = jax.device_get(TokenScorer(make_model(mesh))(batch))
    logits = logits_of(make_model(), batch)
    for b, t in zip(*np.nonzero(batch.mask), strict=True):
        token = oracles.token(logits[b, t], int(batch.labels[b, t]))
        for name in ("nll", "rank", "entropy", "max_prob", "topk_entropy", "collision"):
            np.testing.assert_allclose(
                getattr(stats, name)[b, t], getattr(token, name), **F32, err_msg=name
            )
        np.testing.assert_allclose(
            stats.expected_rank[b, t] - 1, token.expected_rank - 1, **EXPECTED_RANK
        )
    assert stats.rank[batch.mask].max() > 20  # The labels are of all ranks.
    assert not stats.nll[~batch.mask].any()


def test_the_likeliest_tokens_are_those_of_the_largest_logits(rng: np.random.Generator) -> None:
    batch, model = make_batch(rng), make_model()
    ids, probs = map(np.asarray, TokenScorer(model).likeliest(batch, 5))
    logits = logits_of(model, batch)
    assert ids.shape == probs.shape == (8, 12, 5)
    for b, t in np.ndindex(8, 12):
        falling = np.argsort(-logits[b, t])[:5]
        np.testing.assert_array_equal(ids[b, t], falling)
        expected = oracles.softmax(logits[b, t].astype(np.float64))[falling]
        np.testing.assert_allclose(probs[b, t], expected, **F32)


PROBLEM = make_problem(40, 5)
TOKENS = [
    oracles.token(logits, label)
    for logits, label in zip(
        PROBLEM.logits.reshape(-1, 53), PROBLEM.labels.ravel().tolist(), strict=True
    )
]


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_every_method_equal_the_oracles(name: str) -> None:
    stats = losses.token_stats(jnp.asarray(PROBLEM.logits), jnp.asarray(PROBLEM.labels), ALL_FIELDS)
    flat = jax.tree.map(jnp.ravel, stats)
    weights = method_weights(flat, audit_methods(), {"talr": 1.25})[name]
    expected = [oracles.weight(token, *NAMES[name], tau=1.25) for token in TOKENS]
    away = np.abs([token.entropy / np.log(2) - 2 for token in TOKENS]) > 1e-3
    assert weights.dtype == np.float32
    np.testing.assert_allclose(
        weights[away], np.array(expected)[away], **(EXACT_SCALE if "exact" in name else F32)
    )


def test_the_methods_are_named_in_a_fixed_order() -> None:
    assert list(audit_methods()) == list(NAMES)


@dataclasses.dataclass(frozen=True)
class Focal(losses.Weighting):
    gamma: float = 2.0

    def weights(self, stats: losses.TokenStats, batch_stat: Any) -> Any:
        return (1 - stats.prob) ** self.gamma


@dataclasses.dataclass(frozen=True)
class Unfinished(losses.Weighting):
    gamma: float


@pytest.fixture
def registry() -> Iterator[dict[str, type[losses.Weighting]]]:
    before = dict(losses.WEIGHTINGS)
    yield losses.WEIGHTINGS
    losses.WEIGHTINGS.clear()
    losses.WEIGHTINGS.update(before)


def test_a_registered_method_and_other_options_of_the_config_come_last(
    registry: dict[str, type[losses.Weighting]],
) -> None:
    registry["focal"] = Focal
    assert list(audit_methods(Focal())) == [*NAMES, "focal"]
    assert list(audit_methods(Focal(3.0))) == [*NAMES, "focal", "config"]
    stats = losses.token_stats(jnp.zeros((1, 4)), jnp.array([3]), ALL_FIELDS)
    weights = method_weights(stats, audit_methods(Focal(3.0)), {"talr": 1.0})
    np.testing.assert_allclose([*weights["focal"], *weights["config"]], [0.75**2, 0.75**3], **F32)


def test_a_registered_method_without_defaults_is_refused(
    registry: dict[str, type[losses.Weighting]],
) -> None:
    registry["unfinished"] = Unfinished
    with pytest.raises(UserError, match=r"'unfinished'.*expected a method whose options have"):
        audit_methods()
