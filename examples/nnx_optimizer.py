"""RankTuner in a Flax NNX loop with `nnx.Optimizer`, with the two changed lines marked.

python examples/nnx_optimizer.py
"""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ranktuner_jax.losses import RankTuner, weighted_nll  # changed: the import


class Model(nnx.Module):
    """Predicts each byte from the two before it."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(256, 32, rngs=rngs)
        self.inner = nnx.Linear(64, 64, rngs=rngs)
        self.head = nnx.Linear(64, 256, rngs=rngs)

    def __call__(self, tokens):
        """Logits of the next byte."""
        x = self.embed(tokens)
        before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        return self.head(nnx.relu(self.inner(jnp.concatenate([x, before], axis=-1))))


@nnx.jit
def train_step(model, optimizer, tokens, labels, mask):
    """One step, in place; returns the loss."""

    def loss_fn(model):
        logits = model(tokens)
        # was: nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        #      return jnp.sum(nll * mask) / jnp.sum(mask)
        out = weighted_nll(logits, labels, mask, weighting=RankTuner("one"))  # changed: the loss
        return out.mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


def main(steps: int = 60) -> list[float]:
    """Trains on one sentence; returns the loss of each step."""
    text = np.frombuffer(b"rank and expected rank, side by side. " * 8, np.uint8)
    tokens, labels = text[None, :-1].astype(np.int32), text[None, 1:].astype(np.int32)
    mask = np.arange(tokens.shape[1])[None] >= 10  # as if the first ten were a prompt
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    return [float(train_step(model, optimizer, tokens, labels, mask)) for _ in range(steps)]


if __name__ == "__main__":
    curve = main()
    print(f"loss {curve[0]:.3f} -> {curve[-1]:.3f}")
