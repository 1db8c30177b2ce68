"""RankTuner among Kauldron's losses and metrics, without its trainer, which needs TensorFlow."""

import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kauldron import losses as kd_losses

from ranktuner_jax import losses
from ranktuner_jax.adapters.kauldron import RankTunerLoss, RankTunerMetrics

PATHS: dict[str, Any] = {
    "hidden": "interms.norm.__call__[0]",
    "unembed": "params.embed",
    "labels": "batch.labels",
    "mask": "batch.mask",
}


@pytest.fixture
def params() -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "hidden": jax.random.normal(keys[0], (4, 15, 8)),
        "embed": jax.random.normal(keys[1], (61, 8)) / 3,
    }


def context(params: dict[str, jax.Array], rows: Any, part: slice = slice(None)) -> Any:
    """What Kauldron's trainer hands to a loss, of a model whose hidden states are parameters."""
    return types.SimpleNamespace(
        params=params,
        interms={"norm": {"__call__": (params["hidden"][part],)}},
        batch={"labels": rows.tokens[part, 1:, None], "mask": rows.mask[part, 1:, None]},
        step=0,
    )


def dense_loss(params: dict[str, jax.Array], rows: Any, weighting: losses.Weighting) -> Any:
    logits = params["hidden"] @ params["embed"].T
    labels, mask = jnp.asarray(rows.tokens[:, 1:]), rows.mask[:, 1:]
    return losses.weighted_nll(logits, labels, mask, weighting=weighting)


def test_kauldrons_losses_take_the_value_and_gradient_of_the_dense_loss(
    params: Any, rows: Any, weighting: losses.Weighting, assert_close: Callable[..., None]
) -> None:
    ours = {"ranktuner": RankTunerLoss(**PATHS, weighting=weighting, weight=0.5)}

    @jax.jit
    @jax.value_and_grad
    def kauldron_loss(params: Any) -> jax.Array:
        return kd_losses.compute_losses(losses=ours, context=context(params, rows))[0]

    @jax.jit
    @jax.value_and_grad
    def expected(params: Any) -> jax.Array:
        return 0.5 * dense_loss(params, rows, weighting).mean()

    assert_close(kauldron_loss(params), expected(params))


def test_the_kernel_of_a_dense_layer_may_be_the_output_layer(
    params: Any, rows: Any, weighting: losses.Weighting, assert_close: Callable[..., None]
) -> None:
    loss = RankTunerLoss(**PATHS, weighting=weighting, unembed_is_kernel=True)
    as_kernel = context({**params, "embed": params["embed"].T}, rows)
    value = jax.jit(lambda: loss(context=as_kernel))()
    assert_close(value, jax.jit(lambda: dense_loss(params, rows, weighting).mean())())


def test_a_fractional_mask_scales_tokens_as_in_kauldrons_own_losses(
    params: Any, rows: Any, assert_close: Callable[..., None]
) -> None:
    rows.mask = rows.mask * np.linspace(0.25, 1, 16, dtype=np.float32)
    for normalize_by in ("mask", "values"):
        plain = RankTunerLoss(**PATHS, weighting=losses.SFT(), normalize_by=normalize_by)
        host = kd_losses.SoftmaxCrossEntropyWithIntLabels(
            logits="logits", labels="labels", mask="mask", normalize_by=normalize_by
        )
        given = {
            "logits": params["hidden"] @ params["embed"].T,
            "labels": jnp.asarray(rows.tokens[:, 1:, None]),
            "mask": jnp.asarray(rows.mask[:, 1:, None]),
            "step": 0,
        }
        ours = jax.jit(lambda plain=plain: plain(context=context(params, rows)))()
        assert_close(ours, host(context=given))


def test_unequal_batches_merge_to_the_numbers_of_one(
    params: Any, rows: Any, weighting: losses.Weighting, assert_close: Callable[..., None]
) -> None:
    parts = [context(params, rows, part) for part in (slice(0, 1), slice(1, 4))]
    expected = jax.jit(lambda: dense_loss(params, rows, weighting))()
    for kind, value in (
        (RankTunerLoss, expected.mean()),
        (RankTunerMetrics, losses.summarize(expected)),
    ):
        state_of = kind(**PATHS, weighting=weighting).get_state_from_context
        first, second = jax.jit(lambda state_of=state_of: [state_of(part) for part in parts])()
        assert_close(first.merge(second).finalize().compute(), value)
