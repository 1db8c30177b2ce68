"""RankTuner in Levanter's `Trainer`, on a small Llama of random weights.

python examples/trainers/levanter_sft.py
"""

import haliax as hax
import jax
import numpy as np
import optax
from levanter import tracker
from levanter.models.llama import LlamaConfig
from levanter.models.lm_model import LmExample
from levanter.trainer import Trainer, TrainerConfig

from ranktuner_jax.adapters.levanter import next_token_loss
from ranktuner_jax.losses import RankTuner


class Curve(tracker.NoopTracker):
    """Keeps the plain NLL; Levanter's other trackers have all metrics, as train/ranktuner/..."""

    def __init__(self):
        self.nll = []

    def log(self, metrics, *, step, commit=None):
        """What Levanter calls in each step, several times."""
        if "train/ranktuner/nll" in metrics:
            self.nll.append(float(metrics["train/ranktuner/nll"]))


def main(steps: int = 30) -> list[float]:
    """Trains on one sentence; returns the plain NLL of each step."""
    text = np.frombuffer(b"rank and expected rank, side by side. " * 16, np.uint8)
    rows, position = hax.Axis("batch", 8), hax.Axis("position", 76)
    tokens = hax.named(text.reshape(8, 76).astype(np.int32), (rows, position))
    completion = np.repeat(np.arange(1, 77)[None] >= 10, 8, axis=0).astype(np.float32)
    batch = LmExample(tokens, hax.named(completion, (rows, position)))
    small = LlamaConfig(76, 64, 128, num_layers=2, num_heads=4, num_kv_heads=2)
    model = small.build(hax.Axis("vocab", 256), key=jax.random.key(0))
    # Leaves no files behind; what Levanter logs goes to the tracker below.
    options = {"tracker": tracker.NoopConfig(), "load_checkpoint": False}
    options |= {"log_jaxprs": False, "log_xla_hlo": False}
    config = TrainerConfig(id="example", train_batch_size=8, num_train_steps=steps, **options)
    loss_fn = next_token_loss(config, RankTuner("one"))
    curve = Curve()
    with (
        tracker.current_tracker(curve),
        Trainer(config, optax.adam(1e-2), loss_fn, add_default_hooks=False) as trainer,
    ):
        trainer.train(trainer.initial_state(jax.random.key(1), model=model), [batch] * steps)
    return curve.nll


if __name__ == "__main__":
    nll = main()
    print(f"nll {nll[0]:.3f} -> {nll[-1]:.3f}")
