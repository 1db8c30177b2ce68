"""The README's example runs as it stands, and the commands it names exist."""

import pathlib
import re

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


class Model(nn.Module):
    """Somebody's own model, the least of its kind: hidden states and an output layer apart."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        self.param("unembed", nn.initializers.normal(0.3), (13, 8))
        return nn.tanh(nn.Dense(8)(nn.Embed(13, 8)(tokens)))


def test_the_example_trains_somebodys_own_model() -> None:
    [example] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    model = Model()
    tokens = jax.random.randint(jax.random.key(0), (2, 7), 0, 13)
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "mask": jnp.ones((2, 6), bool)}
    params = model.init(jax.random.key(1), batch["tokens"])["params"]
    state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(0.1))
    names = {"jax": jax, "model": model, "batch": batch, "state": state}
    for _ in range(20):
        exec(example, names)  # `state` goes on from step to step.
        first = names.setdefault("first", names["metrics"])
    assert names["metrics"]["nll"] < 0.9 * first["nll"]


def test_every_link_and_command_leads_somewhere() -> None:
    paths = re.findall(r"\]\((?!http)([^)]+)\)", README) + re.findall(r"\./(launch/\S+)", README)
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), path
