"""Which axis of a parameter or an activation is divided over which axis of the mesh.

The trainer divides the rows of a batch over the mesh axes of "batch" below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ranktuner_jax.models.config import DecoderConfig
from ranktuner_jax.models.quantized import Quantized

__all__ = [
    "ADAPTER_AXES",
    "OUTPUTS",
    "PARAM_AXES",
    "PROJECTIONS",
    "RULES",
    "TARGETS",
    "constrain",
    "param_axes",
    "param_shardings",
    "spec",
]

# Logical axis -> mesh axes. Axes that are not named here are never divided.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}

# Parameter -> logical axes: the layer, the outputs, the inputs, in Hugging Face's order. With
# the inputs last, the gradient of a matrix comes out of its matmul without a transpose.
# `features` is `embed` in vectors, which are too small to be worth dividing.
PARAM_AXES: dict[str, tuple[str, ...]] = {
    "embed": ("vocab", "embed"),
    "attention_norm": ("layers", "features"),
    "attention_post_norm": ("layers", "features"),
    "q": ("layers", "heads", "head_dim", "embed"),
    "k": ("layers", "kv_heads", "head_dim", "embed"),
    "v": ("layers", "kv_heads", "head_dim", "embed"),
    "q_bias": ("layers", "heads", "head_dim"),
    "k_bias": ("layers", "kv_heads", "head_dim"),
    "v_bias": ("layers", "kv_heads", "head_dim"),
    "q_norm": ("layers", "head_dim"),
    "k_norm": ("layers", "head_dim"),
    "q_joint_norm": ("layers", "heads", "head_dim"),
    "k_joint_norm": ("layers", "kv_heads", "head_dim"),
    "o": ("layers", "embed", "heads", "head_dim"),
    "o_bias": ("layers", "features"),
    "mlp_norm": ("layers", "features"),
    "mlp_post_norm": ("layers", "features"),
    "gate": ("layers", "mlp", "embed"),
    "up": ("layers", "mlp", "embed"),
    "gate_bias": ("layers", "mlp"),
    "up_bias": ("layers", "mlp"),
    "down": ("layers", "embed", "mlp"),
    "down_bias": ("layers", "features"),
    "final_norm": ("features",),
    "head": ("vocab", "embed"),
}

# The matrices of a layer; and all matrices, which are what may have an adapter.
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
TARGETS = (*PROJECTIONS, "embed", "head")

# How many of a matrix's axes (without the layer) are outputs; Hugging Face flattens them, and
# the inputs likewise. Whatever is not here is a vector.
OUTPUTS = {"embed": 1, "head": 1, "q": 2, "k": 2, "v": 2, "o": 1, "gate": 1, "up": 1, "down": 1}

# The two factors of a low-rank change of a matrix, likewise: from its inputs to the rank, and
# from the rank to its outputs.
ADAPTER_AXES: dict[str, tuple[str, ...]] = {}
for _name in TARGETS:
    _stack = ("layers",) * (_name in PROJECTIONS)
    _split = len(_stack) + OUTPUTS[_name]
    ADAPTER_AXES[f"{_name}_lora_a"] = (*_stack, "rank", *PARAM_AXES[_name][_split:])
    ADAPTER_AXES[f"{_name}_lora_b"] = (*PARAM_AXES[_name][:_split], "rank")
    OUTPUTS |= {f"{_name}_lora_a": 1, f"{_name}_lora_b": OUTPUTS[_name]}


def param_axes(config: DecoderConfig) -> dict[str, dict[str, int]]:
    """The parameters that `config` has, each with its logical axes and their sizes.

    Example:
      >>> param_axes(DecoderConfig(num_layers=2))["k"]
      {'layers': 2, 'kv_heads': 3, 'head_dim': 64, 'embed': 576}
    """
    sizes = {
        "vocab": config.padded_vocab_size,
        "embed": config.hidden_size,
        "features": config.hidden_size,
        "layers": config.num_layers,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "mlp": config.intermediate_size,
    }
    options = {
        "head": not config.tie_embeddings,
        **dict.fromkeys(("q_bias", "k_bias", "v_bias"), config.qkv_bias),
        "o_bias": config.output_bias,
        **dict.fromkeys(("gate_bias", "up_bias", "down_bias"), config.mlp_bias),
        **dict.fromkeys(("attention_norm", "mlp_norm"), config.pre_norm),
        **dict.fromkeys(("attention_post_norm", "mlp_post_norm"), config.post_norm),
        **dict.fromkeys(("q_norm", "k_norm"), config.qk_norm),
        **dict.fromkeys(("q_joint_norm", "k_joint_norm"), config.qk_norm_joint),
    }
    return {
        name: {axis: sizes[axis] for axis in axes}
        for name, axes in PARAM_AXES.items()
        if options.get(name, True)
    }


def spec(mesh: Mesh, axes: Sequence[str], shape: Sequence[int]) -> PartitionSpec:
    """Where an array with these logical axes lies on `mesh`.

    An axis whose size the mesh axes do not divide stays whole, and so does one
    whose mesh axes are absent from `mesh`.

    Example:
      >>> mesh = jax.make_mesh((1, 1), ("data", "tensor"), devices=jax.devices()[:1])
      >>> tuple(spec(mesh, ("vocab", "embed"), (32, 8)))
      ('tensor', None)
    """

    def divide(axis: str, size: int) -> str | tuple[str, ...] | None:
        names = tuple(name for name in RULES.get(axis, ()) if name in mesh.shape)
        if not names or size % math.prod(mesh.shape[name] for name in names):
            return None
        return names[0] if len(names) == 1 else names

    return PartitionSpec(*map(divide, axes, shape))


def param_shardings(tree: Any, mesh: Mesh) -> Any:
    """A `NamedSharding` for each array of a tree that holds decoder parameters.

    Leaves are recognised by the last name on their path, so that the tree may be
    a `Decoder`'s `nnx.State`, a pure dict of it, an optimizer state, or a whole
    train state, of arrays or of `jax.ShapeDtypeStruct`. Anything that is not a
    parameter (a step counter, a factored moment) is replicated. Quantised matrices are divided
    between blocks.

    Args:
      tree: The tree, e.g. `nnx.state(model, nnx.Param)` or `jax.eval_shape(init)`.
      mesh: A mesh with axes among `data`, `fsdp` and `tensor`.

    Returns:
      The same tree with shardings for leaves.

    Example:
      >>> mesh = jax.make_mesh((1,), ("fsdp",), devices=jax.devices()[:1])
      >>> tree = {"gate": jax.ShapeDtypeStruct((2, 4, 8), "float32"), "count": 0}
      >>> {name: tuple(s.spec) for name, s in param_shardings(tree, mesh).items()}
      {'count': (), 'gate': (None, None, 'fsdp')}
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> Any:
        if isinstance(leaf, Quantized):
            return Quantized(*2 * (sharding(path, leaf.scales),))
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        axes = (PARAM_AXES | ADAPTER_AXES).get(names[-1], ()) if names else ()
        shape = getattr(leaf, "shape", ())
        if len(axes) != len(shape):
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, spec(mesh, axes, shape))

    return jax.tree_util.tree_map_with_path(
        sharding, tree, is_leaf=lambda leaf: isinstance(leaf, Quantized)
    )


def constrain(x: jax.Array, mesh: Mesh | None, *axes: str) -> jax.Array:
    """Constrains the sharding of an activation; without a mesh, returns `x` itself.

    Example:
      >>> constrain(jax.numpy.ones(3), None, "batch").shape
      (3,)
    """
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(mesh, axes, x.shape)))
