"""RankTuner in Levanter's `Trainer`; the fused loss, over Levanter's mesh.

Levanter's models give hidden states and the output layer, so the logits are never held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import haliax as hax
import jax.numpy as jnp
from levanter.metrics import Metric, ReductionType
from levanter.models.lm_model import LmExample, LmHeadModel, split_activations
from levanter.models.loss import next_token_loss_weight
from levanter.trainer import TrainerConfig

from ranktuner_jax import losses


def next_token_loss(
    config: TrainerConfig,
    weighting: losses.Weighting = losses.RankTuner(),  # noqa: B008 (frozen)
    *,
    logit_cap: float | None = None,
) -> Callable[..., tuple[hax.NamedArray, dict[str, Metric]]]:
    """The loss function for `Trainer(config, optimizer, loss_fn)`.

    Levanter's `train/loss` is the weighted loss. The plain NLL and what the weights do are logged
    beside it, as `train/ranktuner/nll`, `train/ranktuner/weight/mean` and the rest of
    `losses.summarize`. Levanter's evaluators call `model.compute_next_token_loss`, so `eval/loss`
    stays the plain one; `Trainer.add_eval_hook` alone takes the loss of training.

    A position is supervised where `example.loss_weight` is not 0, and that weight scales the
    token's. An auxiliary loss of the model (of a router) is added.

    Args:
      config: The trainer's own. It must not split batches: Levanter takes the mean of the
        micro-batches' means, in which a token of a short micro-batch counts for more.
      weighting: The method.
      logit_cap: Soft cap of the logits, as `logit_soft_cap` of Levanter's own loss.

    Returns:
      `f(model, example, *, key=None) -> (loss, metrics)`.

    Raises:
      ValueError: If `config` splits batches into micro-batches.
    """
    per_step = config.train_batch_size
    batch = per_step if isinstance(per_step, int) else max(step.value for step in per_step)
    micro = config.microbatch_size
    if micro is not None and micro < batch:
        raise ValueError(
            "Levanter averages the means of micro-batches, which weights tokens unequally: got "
            f"train_batch_size={batch} in micro-batches of {micro}; set per_device_parallelism=-1."
        )
    loss = losses.sharded_weighted_nll(
        config.device_mesh,
        batch_axes=config.compute_axis_mapping[config.batch_axis_name],
        weighting=weighting,
        logit_cap=logit_cap,
    )

    def loss_fn(
        model: LmHeadModel, example: LmExample, *, key: Any = None
    ) -> tuple[hax.NamedArray, dict[str, Metric]]:
        activations = model.activations(example.tokens, example.attn_mask, key=key)
        hidden, aux_loss = split_activations(activations)
        position = hidden.resolve_axis(model.Pos.name)
        weights = next_token_loss_weight(position, example.loss_weight).array
        output = loss(
            hidden.rearrange((..., position, model.Embed)).array,
            model.get_lm_head().rearrange((model.Vocab, model.Embed)).array,
            hax.roll(example.tokens, -1, position).array,
            weights != 0,
            token_weights=weights.astype(jnp.float32),
        )
        metrics = {
            f"ranktuner/{name}": Metric.from_value(value, ReductionType.MEAN)
            for name, value in losses.summarize(output).items()
        }
        return hax.named(output.mean(), ()) + aux_loss, metrics

    return loss_fn
