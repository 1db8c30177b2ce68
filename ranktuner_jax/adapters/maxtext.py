"""RankTuner in MaxText's SFT; the fused loss if it tiles the vocabulary, else the dense.

MaxText gives hidden states where `num_vocab_tiling` is above 1, which is how it saves the memory of
the logits itself. Otherwise its model computes all logits.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from maxtext.trainers.post_train.sft.train_sft import MaxTextPeftTrainer

from ranktuner_jax import losses


def use_ranktuner(
    trainer: MaxTextPeftTrainer,
    config: Any,
    weighting: losses.Weighting = losses.RankTuner(),  # noqa: B008 (frozen)
) -> MaxTextPeftTrainer:
    """Lets a trainer train on the weighted loss, between `setup_trainer_state` and `train_model`.

    The training `loss` is the weighted one, and the training `perplexity` the exp of that. The
    plain NLL and what the weights do are logged beside them, as `ranktuner/nll`,
    `ranktuner/perplexity`, `ranktuner/weight/mean` and the rest of `losses.summarize`. Evaluation
    stays as MaxText has it: plain NLL, and its perplexity. A position is supervised where
    `targets_segmentation` is not 0, and each segment of a packed row is a sequence of its own.

    Args:
      trainer: From `train_sft.setup_trainer_state(config)`, or given `use_maxtext_loss_function`.
      config: MaxText's config. Without `gradient_accumulation_steps`: MaxText adds up the
        micro-batches' means, in which a token of a short micro-batch counts for more. Without
        losses that only MaxText's own loss function adds: of prediction several tokens ahead, of
        experts, of indexers, of block diffusion, and z-loss.
      weighting: The method.

    Returns:
      The trainer.

    Raises:
      ValueError: If the config has one of these.
    """
    allowed = {
        "gradient_accumulation_steps": 1,
        "mtp_num_layers": 0,
        "num_experts": 1,
        "use_indexer": False,
        "training_objective": "causal_lm",
        "z_loss_multiplier": 0.0,
    }
    for name, value in allowed.items():
        given = getattr(config, name, value)
        if given != value:
            raise ValueError(
                f"RankTuner replaces MaxText's loss function, which does more with {name}={given}; "
                f"set {name}={value}."
            )

    def loss_fn(
        model: nnx.Module,
        inputs: jax.Array,
        inputs_position: jax.Array,
        inputs_segmentation: jax.Array,
        targets: jax.Array,
        targets_position: jax.Array,
        targets_segmentation: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        del targets_position
        logits = model(
            decoder_input_tokens=inputs,
            decoder_positions=inputs_position,
            decoder_segment_ids=inputs_segmentation,
            enable_dropout=config.enable_dropout,
            decoder_target_tokens=targets,
            decoder_target_mask=targets_segmentation,
        )
        intermediates = nnx.pop(model, nnx.Intermediate).to_pure_dict()
        rows, length = targets.shape
        tokens: dict[str, Any] = {
            "labels": targets,
            "mask": targets_segmentation != 0,
            "sequence_ids": targets_segmentation + (length + 1) * jnp.arange(rows)[:, None],
            "weighting": weighting,
        }
        if config.num_vocab_tiling > 1:
            head = _output_head(model, intermediates["decoder"]["hidden_states"][0], config)
            output = losses.fused_weighted_nll(**head, **tokens)
        else:
            output = losses.weighted_nll(logits, **tokens)
        return output.mean(), losses.summarize(output)

    def log(aux: dict[str, jax.Array]) -> None:
        trainer._buffered_train_metrics.additional_metrics.update(
            {f"ranktuner/{name}": ([value], np.mean) for name, value in aux.items()}
        )

    plain = trainer.eval_loss_fn
    trainer.with_loss_fn(loss_fn, has_aux=True)
    trainer.eval_loss_fn = plain
    trainer._post_process_train_step = log  # Tunix's hook for what a loss returns beside its value.
    return trainer


def _output_head(model: Any, hidden: jax.Array, config: Any) -> dict[str, Any]:
    """The arguments of the fused loss that stand for MaxText's `apply_output_head`."""
    decoder = model.decoder
    hidden = decoder.decoder_norm(hidden)
    hidden = decoder.dropout(hidden, deterministic=not config.enable_dropout)
    if config.logits_dot_in_fp32:
        hidden = hidden.astype(jnp.float32)
    if not config.logits_via_embedding:
        return {"hidden": hidden, "unembed": decoder.logits_dense.kernel[...].T}
    if config.normalize_embedding_logits:
        hidden = hidden / hidden.shape[-1] ** 0.5
    return {
        "hidden": hidden,
        # To bfloat16, whatever the config's dtype: MaxText's `attend_on_embedding` does so, too.
        "unembed": model.token_embedder.embedding[...].astype(jnp.bfloat16),
        "logit_cap": config.final_logits_soft_cap or None,
    }
