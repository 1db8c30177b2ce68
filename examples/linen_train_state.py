"""RankTuner in a plain Flax Linen loop with a TrainState, with the two changed lines marked.

python examples/linen_train_state.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

from ranktuner_jax.losses import RankTuner, weighted_nll  # changed: the import


class Model(nn.Module):
    """Predicts each byte from the two before it."""

    @nn.compact
    def __call__(self, tokens):
        """Logits of the next byte."""
        x = nn.Embed(256, 32)(tokens)
        before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        x = nn.relu(nn.Dense(64)(jnp.concatenate([x, before], axis=-1)))
        return nn.Dense(256)(x)


@jax.jit
def train_step(state, tokens, labels, mask):
    """One step; returns the state and the loss."""

    def loss_fn(params):
        logits = state.apply_fn({"params": params}, tokens)
        # was: nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        #      return jnp.sum(nll * mask) / jnp.sum(mask)
        out = weighted_nll(logits, labels, mask, weighting=RankTuner("one"))  # changed: the loss
        return out.mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def main(steps: int = 60) -> list[float]:
    """Trains on one sentence; returns the loss of each step."""
    text = np.frombuffer(b"rank and expected rank, side by side. " * 8, np.uint8)
    tokens, labels = text[None, :-1].astype(np.int32), text[None, 1:].astype(np.int32)
    mask = np.arange(tokens.shape[1])[None] >= 10  # as if the first ten were a prompt
    model = Model()
    params = model.init(jax.random.key(0), tokens)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-2))
    history = []
    for _ in range(steps):
        state, loss = train_step(state, tokens, labels, mask)
        history.append(float(loss))
    return history


if __name__ == "__main__":
    curve = main()
    print(f"loss {curve[0]:.3f} -> {curve[-1]:.3f}")
