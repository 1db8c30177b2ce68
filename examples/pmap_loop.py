"""RankTuner in a `pmap` loop, with the two changed lines marked.

Each device differentiates its local sum; gradients and sums are added over the devices and divided
once. (With a mean per device, tokens on devices with fewer supervised tokens would weigh more.)

python examples/pmap_loop.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ranktuner_jax.losses import RankTuner, weighted_nll  # changed: the import


def init(key):
    """Parameters of a model that predicts each byte from the one before it."""
    embed, head = jax.random.split(key)
    return {
        "embed": 0.1 * jax.random.normal(embed, (256, 32)),
        "head": 0.1 * jax.random.normal(head, (32, 256)),
    }


def make_train_step(tx):
    """Builds a step on all devices; the state is replicated, the batch is not."""

    @functools.partial(jax.pmap, axis_name="batch")
    def train_step(params, opt_state, tokens, labels, mask):
        def loss_fn(params):
            logits = jnp.tanh(params["embed"][tokens]) @ params["head"]
            # was: nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            #      return jnp.sum(nll * mask), jnp.sum(mask)
            out = weighted_nll(logits, labels, mask, weighting=RankTuner("one"))  # changed: loss
            return out.total, out.denom

        (total, denom), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        total, denom, grads = jax.lax.psum((total, denom, grads), "batch")
        grads = jax.tree.map(lambda g: g / denom, grads)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, total / denom

    return train_step


def main(steps: int = 60) -> list[float]:
    """Trains on one sentence per device; returns the loss of each step."""
    devices = jax.local_device_count()
    text = np.frombuffer(b"rank and expected rank, side by side. " * 8, np.uint8)
    rows = np.stack([np.roll(text, i) for i in range(devices)])[:, None].astype(np.int32)
    tokens, labels = rows[..., :-1], rows[..., 1:]
    # The number of supervised tokens differs between devices.
    starts = 10 * np.arange(1, devices + 1)[:, None, None]
    mask = np.broadcast_to(np.arange(tokens.shape[-1]) >= starts, tokens.shape)
    tx = optax.adam(1e-2)
    params = init(jax.random.key(0))
    replicate = functools.partial(jax.tree.map, lambda x: np.stack([x] * devices))
    params, opt_state = replicate(params), replicate(tx.init(params))
    train_step = make_train_step(tx)
    history = []
    for _ in range(steps):
        params, opt_state, loss = train_step(params, opt_state, tokens, labels, mask)
        history.append(float(loss[0]))
    return history


if __name__ == "__main__":
    curve = main()
    print(f"loss {curve[0]:.3f} -> {curve[-1]:.3f}")
