"""The train state: Flax's TrainState over the parameters of an NNX model, created sharded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from flax.training import train_state
from jax.sharding import Mesh

from ranktuner_jax import models

__all__ = ["TrainState", "init_state"]


class TrainState(train_state.TrainState):
    """Flax's TrainState, with a method that returns the model.

    As in Flax, `state.apply_fn(params, tokens)` returns the outputs of the model.

    Attributes:
      graphdef: The model without its parameters.

    Example:
      >>> model = models.Decoder(models.DecoderConfig(num_layers=1), rngs=nnx.Rngs(0))
      >>> state = init_state(model, optax.sgd(0.1), jax.make_mesh((1,), ("data",)))
      >>> state.model().vocab_size == model.vocab_size
      True
    """

    graphdef: nnx.GraphDef[models.Decoder] = struct.field(pytree_node=False)

    def model(self, params: nnx.State | None = None) -> models.Decoder:
        """The model with the parameters of the state, or with those given."""
        return nnx.merge(self.graphdef, self.params if params is None else params)


def init_state(model: models.Decoder, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Places a model's parameters on the mesh and creates the optimizer state there.

    A moment with the shape of its parameter is sharded like it; scalars and the factored moments of
    Adafactor, which are small, are replicated.

    Args:
      model: The model; its arrays are donated, and not copied if they are placed already.
      tx: The optimizer.
      mesh: The mesh.

    Returns:
      The state at step 0.
    """
    graphdef, params = nnx.split(model, nnx.Param)

    def create(params: nnx.State) -> TrainState:
        state = TrainState.create(
            apply_fn=lambda params, *args, **kwargs: nnx.merge(graphdef, params)(*args, **kwargs),
            params=params,
            tx=tx,
            graphdef=graphdef,
        )
        return state.replace(step=jnp.zeros((), jnp.int32))

    params = jax.device_put(params, models.param_shardings(params, mesh))
    shardings = models.param_shardings(jax.eval_shape(create, params), mesh)
    return jax.jit(create, out_shardings=shardings, donate_argnums=0)(params)
