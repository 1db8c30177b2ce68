"""RankTuner as a loss and a metric of Kauldron; the fused loss.

`kd.train.Trainer` captures the intermediates of a model, so hidden states and the output layer are
found by their path, and the logits are never held.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Optional

import flax
import jax
import jax.numpy as jnp
from kauldron import kontext
from kauldron import losses as kd_losses
from kauldron import metrics as kd_metrics

from ranktuner_jax import losses


@dataclasses.dataclass(frozen=True, eq=True, kw_only=True)
class _Inputs:
    """Where the loss finds its inputs.

    Attributes:
      hidden: Path of the hidden states after the final norm, `[..., D]`; e.g.
        `"interms.norm.__call__[0]"` for the output of the module `norm`.
      unembed: Path of the output layer; e.g. `"params.embed.embedding"` or `"params.head.kernel"`.
      labels: Path of the target ids, already shifted, `[..., 1]`, as other losses of Kauldron have
        them.
      mask: Path of what is supervised, `[..., 1]`; None: everything. A value between 0 and 1 is a
        static factor of the token's weight.
      unembed_is_kernel: Whether `unembed` is `[D, V]`, the kernel of a Dense layer, and not the
        `[V, D]` of an embedding.
      weighting: The method.
    """

    hidden: kontext.Key = kontext.REQUIRED
    unembed: kontext.Key = kontext.REQUIRED
    labels: kontext.Key = kontext.REQUIRED
    mask: Optional[kontext.Key] = None  # noqa: UP045 (Kauldron reads the annotation)
    unembed_is_kernel: bool = False
    weighting: losses.Weighting = losses.RankTuner()  # noqa: RUF009 (frozen)

    def output(
        self, hidden: jax.Array, unembed: jax.Array, labels: jax.Array, mask: jax.Array | None
    ) -> losses.LossOutput:
        """The sums over the supervised tokens."""
        weights = None if mask is None else jnp.broadcast_to(mask, labels.shape)[..., 0]
        return losses.fused_weighted_nll(
            hidden,
            unembed.T if self.unembed_is_kernel else unembed,
            labels[..., 0],
            None if weights is None else weights != 0,
            weighting=self.weighting,
            token_weights=None if weights is None else weights.astype(jnp.float32),
        )


@dataclasses.dataclass(frozen=True, eq=True, kw_only=True)
class RankTunerLoss(_Inputs, kd_losses.Loss):
    """The weighted loss, for `train_losses`.

    Takes `weight`, `step` and `normalize_by` like Kauldron's own losses. Its state is a sum and a
    count, which Kauldron merges before it divides.
    """

    def get_state(
        self,
        *,
        hidden: jax.Array,
        unembed: jax.Array,
        labels: jax.Array,
        mask: jax.Array | None = None,
        step: int | None = None,
    ) -> kd_losses.Loss.State:
        """The sum of the losses, and the count that Kauldron divides it by."""
        output = self.output(hidden, unembed, labels, mask)
        # Of a mask alone: Kauldron's own count.
        counted = jnp.zeros(labels.shape)
        count = self.State.from_values(counted, mask, normalize_by=self.normalize_by).count
        return self.State(value=self.get_weight(step) * output.total, count=count)

    def get_state_from_context(self, context: Any) -> kd_losses.Loss.State:
        """The same, with the inputs found by their paths."""
        return self.get_state(**kontext.resolve_from_keyed_obj(context, self))

    def get_values(self, **inputs: Any) -> jax.Array:
        """Refused: a fused loss has no value per token."""
        raise NotImplementedError("The fused loss has no values per token: call get_state.")


@dataclasses.dataclass(frozen=True, eq=True, kw_only=True)
class RankTunerMetrics(_Inputs, kd_metrics.Metric):
    """The plain NLL and what the weights do, for `train_metrics` and the metrics of evaluators.

    Gives all of `losses.summarize`: `nll`, `perplexity`, `weight/mean` and so on, over all batches
    that were merged. It projects the hidden states once more, in steps whose metrics are logged.
    """

    @flax.struct.dataclass
    class State(kd_metrics.AutoState):
        """Sums over the supervised tokens."""

        sums: losses.LossOutput = kd_metrics.sum_field()

        def compute(self) -> dict[str, jax.Array]:
            """Means, shares and quantiles by name."""
            return losses.summarize(self.sums)

    def get_state(
        self,
        *,
        hidden: jax.Array,
        unembed: jax.Array,
        labels: jax.Array,
        mask: jax.Array | None = None,
    ) -> RankTunerMetrics.State:
        """The sums of a batch."""
        return self.State(sums=self.output(hidden, unembed, labels, mask))
