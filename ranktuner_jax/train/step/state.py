"""The train state: Flax's TrainState over the parameters of an NNX model, created sharded."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from flax.training import train_state
from jax.sharding import Mesh

from ranktuner_jax import models

__all__ = ["TrainState", "abstract_state", "init_state"]


class TrainState(train_state.TrainState):
    """Flax's TrainState, with a method that returns the model.

    As in Flax, `state.apply_fn(params, tokens)` returns the outputs of the model, where `params`
    are all of its parameters: `nnx.merge_state(state.params, state.base)` of a model with adapters.

    Attributes:
      graphdef: The model without its parameters.
      base: The parameters that are not trained: those below adapters.

    Example:
      >>> model = models.Decoder(models.DecoderConfig(num_layers=1), rngs=nnx.Rngs(0))
      >>> state = init_state(model, optax.sgd(0.1), jax.make_mesh((1,), ("data",)))
      >>> state.model().vocab_size == model.vocab_size
      True
    """

    graphdef: nnx.GraphDef[models.Decoder] = struct.field(pytree_node=False)
    base: nnx.State = struct.field(default_factory=lambda: nnx.State({}))

    def model(self, params: nnx.State | None = None) -> models.Decoder:
        """The model with the trained parameters of the state, or with those given."""
        return nnx.merge(self.graphdef, self.params if params is None else params, self.base)


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
    create, params, base = _parts(model, tx)
    params, base = jax.device_put((params, base), models.param_shardings((params, base), mesh))
    shardings = models.param_shardings(jax.eval_shape(create, params), mesh)
    state: TrainState = jax.jit(create, out_shardings=shardings, donate_argnums=0)(params)
    return state.replace(base=base)


def abstract_state(
    model: models.Decoder, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """What `init_state` returns of a model without arrays: shapes and shardings.

    Args:
      model: As `nnx.eval_shape` returns it.
      tx: The optimizer.
      mesh: The mesh, whose devices need not be attached.

    Example:
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> config = models.DecoderConfig(num_layers=1)
      >>> model = nnx.eval_shape(lambda: models.Decoder(config, rngs=nnx.Rngs(0)))
      >>> abstract_state(model, optax.sgd(0.1), mesh).params["embed"].get_value().shape
      (49152, 576)
    """
    create, params, base = _parts(model, tx)
    state = jax.eval_shape(create, params).replace(base=base)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        models.param_shardings(state, mesh),
    )


def _parts(
    model: models.Decoder, tx: optax.GradientTransformation
) -> tuple[Callable[[nnx.State], TrainState], nnx.State, nnx.State]:
    """What creates the state from the trained parameters, these, and those that stay."""
    graphdef, _ = nnx.split(model)
    params, base = nnx.state(model, nnx.Param, ...)

    def create(params: nnx.State) -> TrainState:
        state = TrainState.create(
            apply_fn=lambda params, *args, **kwargs: nnx.merge(graphdef, params)(*args, **kwargs),
            params=params,
            tx=tx,
            graphdef=graphdef,
        )
        return state.replace(step=jnp.zeros((), jnp.int32))

    return create, params, base
