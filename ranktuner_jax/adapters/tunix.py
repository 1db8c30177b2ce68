"""RankTuner in Tunix's `PeftTrainer`; the dense loss.

Tunix 0.1.7 has no way to get hidden states from a model, so the model computes all logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

from ranktuner_jax import losses


class RankTunerTrainer(PeftTrainer):
    """A `PeftTrainer` that trains on the weighted loss.

    Tunix's training `loss` is the weighted one, and its training `perplexity` is the exp of that.
    The plain NLL and what the weights do are logged beside them, as `ranktuner/nll`,
    `ranktuner/perplexity`, `ranktuner/weight/mean` and the rest of `losses.summarize`. Evaluation
    stays as Tunix has it: plain NLL, and its perplexity.

    `with_gen_model_input_fn` is used as usual: the loss takes `input_tokens`, `input_mask`,
    `positions` and `attention_mask`, and `images` where a model has them. A position is supervised
    where `input_mask` is not 0 at the token after it.

    Args:
      model: Any Tunix model; with LoRA, only its LoRA parameters are trained.
      optimizer: An optax optimizer. Without accumulation inside it.
      training_config: Without `gradient_accumulation_steps`: Tunix 0.1.7 takes the mean of the
        micro-batches' means, in which a token of a short micro-batch counts for more.
      weighting: The method.
      options: Whatever else `PeftTrainer` takes.

    Raises:
      ValueError: If `gradient_accumulation_steps` is above 1.
    """

    def __init__(
        self,
        model: nnx.Module,
        optimizer: optax.GradientTransformation,
        training_config: TrainingConfig,
        *,
        weighting: losses.Weighting = losses.RankTuner(),  # noqa: B008 (frozen)
        **options: Any,
    ):
        steps = training_config.gradient_accumulation_steps
        if steps not in (None, 1):
            raise ValueError(
                "Tunix averages the means of micro-batches, which weights tokens unequally: "
                f"got gradient_accumulation_steps={steps}; set it to None and use longer batches."
            )
        super().__init__(model, optimizer, training_config, **options)
        plain: Callable[..., jax.Array] = self.loss_fn  # Tunix's own.

        def loss_fn(
            model: nnx.Module,
            input_tokens: jax.Array,
            input_mask: jax.Array,
            positions: jax.Array,
            attention_mask: jax.Array,
            images: jax.Array | None = None,
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            more = {} if images is None else {"images": images}
            logits, _ = model(input_tokens, positions, None, attention_mask, **more)
            output = losses.weighted_nll(
                logits[:, :-1], input_tokens[:, 1:], input_mask[:, 1:] != 0, weighting=weighting
            )
            return output.mean(), losses.summarize(output)

        self.with_loss_fn(loss_fn, has_aux=True)
        self.eval_loss_fn: Callable[..., Any] = lambda *args, **inputs: (plain(*args, **inputs), {})

    def _post_process_train_step(self, aux: dict[str, jax.Array]) -> None:
        """Adds the metrics to those that Tunix logs for this step."""
        self._buffered_train_metrics.additional_metrics.update(
            {f"ranktuner/{name}": ([value], np.mean) for name, value in aux.items()}
        )
