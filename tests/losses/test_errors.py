"""Every argument that does not fit is refused, by name."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest

from ranktuner_jax import losses
from ranktuner_jax.losses.weighting import Weighting

HIDDEN, UNEMBED = jnp.zeros((2, 3, 4)), jnp.zeros((5, 4))
LOGITS = jnp.zeros((2, 3, 5))
LABELS = jnp.zeros((2, 3), jnp.int32)
OTHER = jnp.zeros((3, 2))


@pytest.mark.parametrize("fused", [False, True], ids=["dense", "fused"])
@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "must be floating", {"first": "int"}),
        (TypeError, "labels must be integers", {"labels": jnp.zeros((2, 3))}),
        (ValueError, "labels must have the shape of", {"labels": LABELS.T}),
        (ValueError, "mask must have the shape of labels", {"mask": OTHER.astype(bool)}),
        (TypeError, "mask must be boolean or integer", {"mask": jnp.ones((2, 3))}),
        (ValueError, "token_weights must have the shape", {"token_weights": OTHER}),
        (ValueError, "sequence_ids must have the shape", {"sequence_ids": LABELS.T}),
        (ValueError, "vocab_size must be between 1", {"vocab_size": 6}),
        (ValueError, "vocab_size must be between 1", {"vocab_size": 0}),
    ],
)
def test_both_losses_refuse(
    fused: bool, error: type[Exception], message: str, change: dict[str, Any]
) -> None:
    change = dict(change)
    first = (HIDDEN if fused else LOGITS).astype(jnp.int32 if change.pop("first", 0) else float)
    labels = change.pop("labels", LABELS)
    inputs = (first, UNEMBED, labels) if fused else (first, labels)
    loss = losses.fused_weighted_nll if fused else losses.weighted_nll
    with pytest.raises(error, match=message):
        loss(*inputs, **change)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"unembed must be \[V, D\]", {"unembed": UNEMBED.T}),
        (r"unembed must be \[V, D\]", {"unembed": UNEMBED[None]}),
        (r"bias must be \[V\]", {"bias": jnp.zeros(4)}),
        ("chunk_size must be at least 1", {"chunk_size": 0}),
        ("logit_cap must be positive", {"logit_cap": 0.0}),
        ("logit_cap must be positive", {"logit_cap": float("nan")}),
        ("vocab_size must be between 1", {"vocab_size": 6}),
    ],
)
@pytest.mark.parametrize("function", [losses.fused_weighted_nll, losses.fused_token_stats])
def test_fused_refuses(function: Callable[..., Any], message: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        function(**{"hidden": HIDDEN, "unembed": UNEMBED, "labels": LABELS, **change})


def test_unknown_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match="fields must be among"):
        losses.token_stats(LOGITS, LABELS, ["perplexity"])
    with pytest.raises(ValueError, match="fields must be among"):
        losses.fused_token_stats(HIDDEN, UNEMBED, LABELS, fields=["perplexity"])


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (losses.RankTuner, {"base": "two"}, "base must be one of"),
        (losses.RankTuner, {"scale": "two"}, "scale must be one of"),
        (losses.RankTuner, {"clip": 0.0}, "clip must be positive"),
        (losses.EAFT, {"gate": "step"}, "gate must be one of"),
        (losses.EAFT, {"alpha": 2.0}, "alpha is read by gate='power' only"),
        (losses.IDFT, {"beta": 0.0}, "beta must be positive"),
    ],
)
def test_options_of_methods_are_checked(
    method: type[losses.Weighting], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        method(**options)


def test_talr_without_its_statistic_says_so() -> None:
    with pytest.raises(ValueError, match="TALR needs a batch statistic"):
        losses.TALR()(losses.token_stats(LOGITS, LABELS))


def test_a_method_implements_its_weights_and_its_statistic() -> None:
    with pytest.raises(NotImplementedError):
        Weighting()(losses.token_stats(LOGITS, LABELS))
    with pytest.raises(NotImplementedError):
        Weighting().batch_statistic(jnp.zeros(1), jnp.ones(1, bool), None, None)


def test_unknown_normalisation_is_refused() -> None:
    normalize: Any = "rows"
    with pytest.raises(ValueError, match="normalize must be 'tokens' or 'weights'"):
        losses.weighted_nll(LOGITS, LABELS).mean(normalize=normalize)
