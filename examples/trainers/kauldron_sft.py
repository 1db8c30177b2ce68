"""RankTuner in Kauldron's trainer: one of its losses, and one of its metrics.

python examples/trainers/kauldron_sft.py
"""

import flax.linen as nn
import numpy as np
import optax
from kauldron import kd, kontext

from ranktuner_jax.adapters.kauldron import RankTunerLoss, RankTunerMetrics
from ranktuner_jax.losses import RankTuner

INPUTS = {  # where the context of Kauldron has what the loss needs
    "hidden": "interms.norm.__call__[0]",
    "unembed": "params.embed.embedding",
    "labels": "batch.labels",
    "mask": "batch.mask",
    "weighting": RankTuner("one"),
}
TEXT = np.frombuffer(b"rank and expected rank, side by side. " * 16, np.uint8).astype(np.int32)
ROWS = TEXT.reshape(8, 76, 1)
MASK = np.ones((8, 75, 1), bool) & (np.arange(1, 76) >= 10)[:, None]  # False: a prompt


class Model(nn.Module):
    """Predicts each byte from the one before it; hidden states only, since nobody needs logits."""

    tokens: kontext.Key = "batch.tokens"

    @nn.compact
    def __call__(self, tokens):
        """Hidden states [B, T, D]."""
        x = nn.Embed(256, 64, name="embed")(tokens)
        return nn.LayerNorm(name="norm")(x + nn.Dense(64)(nn.relu(nn.Dense(128)(x))))


def main(steps: int = 30) -> list[float]:
    """Trains; returns the plain NLL of each step."""
    batch = {"tokens": ROWS[:, :-1, 0], "labels": ROWS[:, 1:], "mask": MASK}
    trainer = kd.train.Trainer(
        train_ds=kd.data.InMemoryPipeline(loader=lambda: batch, batch_size=8),
        model=Model(),
        optimizer=optax.adam(1e-2),
        train_losses={"ranktuner": RankTunerLoss(**INPUTS)},
        train_metrics={"ranktuner": RankTunerMetrics(**INPUTS)},
    )
    # What trainer.train() does, which writes all metrics to its workdir.
    state, curve = trainer.init_state(), []
    for _ in range(steps):
        state, aux = trainer.trainstep.step(state, batch, return_losses=True, return_metrics=True)
        curve.append(float(aux.compute().metric_values["metrics/ranktuner/nll"]))
    return curve


if __name__ == "__main__":
    curve = main()
    print(f"nll {curve[0]:.3f} -> {curve[-1]:.3f}")
