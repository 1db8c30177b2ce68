"""LoRA: a frozen decoder, with a trained change of low rank beside each of its matrices."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from ranktuner_jax.errors import UserError
from ranktuner_jax.models import partition
from ranktuner_jax.models.config import DecoderConfig
from ranktuner_jax.models.families import FAMILIES
from ranktuner_jax.models.quantized import BLOCK, Quantized, quantize

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray

    from ranktuner_jax.models.decoder import Decoder

__all__ = [
    "Frozen",
    "Lora",
    "adapter_factors",
    "adapter_shapes",
    "add_adapters",
    "drop_inputs",
    "dropout_keys",
    "merge_adapters",
    "quantize_layers",
    "set_adapters",
]


class Frozen(nnx.Variable):
    """A parameter that is not trained: not an `nnx.Param`, so that no filter for those finds it."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which matrices have adapters, and of what size.

    A projection with an adapter computes `W x + scale * B (A x)`, the head among them; a token's
    embedding is its row of `E + scale * B A`. Following PEFT, A starts uniform within ±1/√inputs,
    that of the embeddings normal, and B at zero, so that training starts at the frozen model.

    Embeddings and head have adapters of their own even where they share one matrix, as in PEFT.

    Attributes:
      rank: Rows of A and columns of B.
      alpha: `scale` is `alpha / rank`.
      rslora: Whether it is `alpha / sqrt(rank)` instead (rank-stabilised LoRA).
      targets: Names of matrices: q, k, v, o, gate, up, down, which all have an adapter by
        default, embed and head; or those of Hugging Face's modules, such as q_proj or lm_head.
      dropout: Share of A's inputs that a step of training leaves out.

    Raises:
      UserError: If the rank or alpha is not positive, dropout is not below 1, or there is no such
        matrix.

    Example:
      >>> Lora(rank=16, alpha=32.0, targets=("v_proj", "q")).targets
      ('q', 'v')
      >>> Lora(rank=16, alpha=32.0, rslora=True).scale
      8.0
    """

    rank: int
    alpha: float
    rslora: bool = False
    targets: tuple[str, ...] = partition.PROJECTIONS
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            if getattr(self, name) <= 0:
                raise UserError(f"lora.{name}: expected more than 0, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout: expected at least 0 and below 1, got {self.dropout}")
        ours = {
            name: own
            for own in partition.TARGETS
            for name in (own, *(family.tensors[own].split(".")[-2] for family in FAMILIES.values()))
        }
        if unknown := [name for name in self.targets if name not in ours]:
            raise UserError(
                f"lora.targets: expected all, or names among {', '.join(partition.TARGETS)}, "
                f"got {', '.join(map(repr, unknown))}"
            )
        named = {ours[name] for name in self.targets}
        if not named:
            raise UserError("lora.targets: expected at least one matrix, got none")
        in_order = tuple(name for name in partition.TARGETS if name in named)
        object.__setattr__(self, "targets", in_order)

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def dropout_keys(
    model: Decoder, step: Int[Array, ""] | int, row_index: Int[Array, " B"]
) -> PRNGKeyArray | None:
    """The keys `[L + 1, B]` of a batch's dropout, the last for the head; None if it has none.

    They depend on the step and on each row's number alone: a resumed run, another mesh and other
    micro-batches leave out the same inputs.
    """
    if model.layers.lora is None or not model.layers.lora.dropout:
        return None
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    numbers = jnp.arange(model.config.num_layers + 1)
    layers = fold(jax.random.fold_in(jax.random.key(0), step), numbers)
    return jax.vmap(fold, (0, None))(layers, row_index)


def drop_inputs(
    x: Float[Array, "B T I"], rate: float, keys: PRNGKeyArray, name: str
) -> Float[Array, "B T I"]:
    """`x` with a share of its entries at zero and the rest enlarged to make up for them.

    Args:
      x: Activations.
      rate: The share.
      keys: `[B]`, those of a layer.
      name: The matrix, since each in a layer leaves out other inputs.

    Example:
      >>> keys = jax.random.split(jax.random.key(0), 2)
      >>> sorted(set(drop_inputs(jnp.ones((2, 3, 8)), 0.5, keys, "q").ravel().tolist()))
      [0.0, 2.0]
    """
    number = partition.TARGETS.index(name)

    def kept(key: PRNGKeyArray) -> Bool[Array, "T I"]:
        return jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, x.shape[1:])

    return jnp.where(jax.vmap(kept)(keys), x / (1 - rate), 0)


def adapter_shapes(config: DecoderConfig, lora: Lora) -> dict[str, tuple[int, ...]]:
    """The shape of each factor, A `[L, rank, *inputs]` and B `[L, *outputs, rank]`.

    Those of embeddings and head, `[V, D]` each, have no axis of layers.

    Example:
      >>> adapter_shapes(DecoderConfig(), Lora(rank=4, alpha=8.0, targets=("q",)))
      {'q_lora_a': (30, 4, 576), 'q_lora_b': (30, 9, 64, 4)}
    """
    # A head that is the embeddings' matrix has an adapter of its own.
    axes = partition.param_axes(dataclasses.replace(config, tie_embeddings=False))
    return {
        name: tuple(
            {**axes[target], "rank": lora.rank}[axis] for axis in partition.ADAPTER_AXES[name]
        )
        for target in lora.targets
        for name in (f"{target}_lora_a", f"{target}_lora_b")
    }


def add_adapters(
    model: Decoder, lora: Lora, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32
) -> None:
    """Freezes a decoder in place and adds new adapters, which alone are trained.

    Args:
      model: The decoder; its parameters become `Frozen`.
      lora: The adapters.
      rngs: Source of the initial values of A.
      dtype: Type of the adapters.

    Raises:
      ValueError: If it has adapters already.

    Example:
      >>> from ranktuner_jax import models
      >>> config = models.DecoderConfig(vocab_size=11, num_layers=1)
      >>> model = models.Decoder(config, rngs=nnx.Rngs(0))
      >>> add_adapters(model, Lora(rank=4, alpha=8.0, targets=("q",)), rngs=nnx.Rngs(1))
      >>> sorted(nnx.state(model, nnx.Param)["layers"])
      ['q_lora_a', 'q_lora_b']
    """
    shapes = adapter_shapes(model.config, lora)

    def initial(key: PRNGKeyArray) -> dict[str, Float[Array, "..."]]:
        keys = jax.random.split(key, len(shapes))
        return {
            name: _initial(name, shape, key, dtype)
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    key = rngs.params()
    shardings = None
    if model.mesh is not None:
        shardings = partition.param_shardings(jax.eval_shape(initial, key), model.mesh)
    set_adapters(model, lora, jax.jit(initial, out_shardings=shardings)(key))


def _initial(
    name: str, shape: tuple[int, ...], key: PRNGKeyArray, dtype: DTypeLike
) -> Float[Array, "..."]:
    if name.endswith("_b"):
        return jnp.zeros(shape, dtype)
    if name == "embed_lora_a":
        return jax.random.normal(key, shape, dtype)
    first_input = partition.ADAPTER_AXES[name].index("rank") + 1
    limit = math.prod(shape[first_input:]) ** -0.5
    return jax.random.uniform(key, shape, dtype, -limit, limit)


def set_adapters(model: Decoder, lora: Lora, factors: Mapping[str, Array]) -> None:
    """Like `add_adapters`, with given values, named and shaped as by `adapter_shapes`."""
    if model.layers.lora is not None:
        raise ValueError(f"model must not have adapters yet: got {model.layers.lora}.")
    for module, name in _parameters(model, nnx.Param):
        setattr(module, name, Frozen(getattr(module, name).get_value()))
    model.layers.lora = lora
    for name, value in factors.items():
        setattr(_owner(model, name), name, nnx.Param(value))


def adapter_factors(model: Decoder) -> dict[str, Array]:
    """The factors of a decoder's adapters, named and shaped as by `adapter_shapes`.

    Example:
      >>> from ranktuner_jax import models
      >>> config = models.DecoderConfig(vocab_size=11, num_layers=1)
      >>> model = models.Decoder(config, rngs=nnx.Rngs(0))
      >>> add_adapters(model, Lora(rank=4, alpha=8.0, targets=("lm_head",)), rngs=nnx.Rngs(1))
      >>> {name: factor.shape for name, factor in adapter_factors(model).items()}
      {'head_lora_a': (4, 576), 'head_lora_b': (11, 4)}
    """
    lora = model.layers.lora
    names = () if lora is None else adapter_shapes(model.config, lora)
    return {name: getattr(_owner(model, name), name).get_value() for name in names}


def quantize_layers(model: Decoder, kind: str) -> None:
    """Quantises the projections of a decoder in place, which freezes them.

    `load_pretrained` does it while it reads them.

    Args:
      model: The decoder.
      kind: One of `quantized.TYPES`.

    Raises:
      UserError: If the inputs of a projection cannot be divided into blocks.

    Example:
      >>> from ranktuner_jax import models
      >>> config = models.DecoderConfig(vocab_size=11, num_layers=1)
      >>> model = models.Decoder(config, rngs=nnx.Rngs(0))
      >>> quantize_layers(model, "nf4")
      >>> model.layers.up.get_value().codes.shape  # Two to a byte.
      (1, 1536, 288)
    """
    for name in partition.PROJECTIONS:
        matrix = getattr(model.layers, name).get_value()
        if matrix.shape[-1] % BLOCK:
            raise UserError(
                f"lora.base={kind}: expected matrices whose inputs come in multiples of {BLOCK}, "
                f"got {name} with {matrix.shape[-1]}; use bfloat16"
            )
        setattr(model.layers, name, Frozen(quantize(matrix, kind)))


def merge_adapters(model: Decoder) -> None:
    """Adds each adapter's product to its matrix, in place; what remains is a plain decoder.

    The sum is taken in float32 and rounded to the matrix's type. Embeddings and head that were one
    matrix become two if either has an adapter, each of which changes its own use alone.

    Args:
      model: A decoder with adapters; the matrices that have one are donated.

    Raises:
      ValueError: If it has none, or its matrices are quantised.

    Example: see `save_adapter`.
    """
    layers = model.layers
    if layers.lora is None:
        raise ValueError("model must have adapters: got none.")
    targets = layers.lora.targets
    if any(isinstance(getattr(layers, n).get_value(), Quantized) for n in partition.PROJECTIONS):
        raise ValueError(
            "model must not be quantised: load it with a param_dtype, then load_adapter."
        )
    if model.config.tie_embeddings and {"embed", "head"} & {*targets}:
        model.config = dataclasses.replace(model.config, tie_embeddings=False)
        model.head = nnx.Param(jnp.copy(model.embed.get_value()))
    for name in targets:
        owner = _owner(model, name)
        factors = [getattr(owner, f"{name}_lora_{factor}").get_value() for factor in "ba"]
        merged = _merged(getattr(owner, name).get_value(), *factors, scale=layers.lora.scale)
        setattr(owner, name, Frozen(merged))
        for factor in "ab":
            delattr(owner, f"{name}_lora_{factor}")
    layers.lora = None
    for module, name in _parameters(model, Frozen):
        setattr(module, name, nnx.Param(getattr(module, name).get_value()))


@functools.partial(jax.jit, static_argnames="scale", donate_argnums=0)
def _merged(kernel: Array, b: Array, a: Array, *, scale: float) -> Array:
    # Over the rank, layer by layer: [L, *outputs, rank] and [L, rank, *inputs]; the matrices of
    # embeddings and head are not stacked.
    stack = tuple(range(b.ndim + a.ndim - 2 - kernel.ndim))
    dims = (((b.ndim - 1,), (len(stack),)), (stack, stack))
    b, a = b.astype(jnp.float32), a.astype(jnp.float32)
    change = jax.lax.dot_general(b, a, dims, precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + scale * change).astype(kernel.dtype)


def _owner(model: Decoder, name: str) -> nnx.Module:
    """The module that holds a matrix or a factor: the stacked layers, or the decoder itself."""
    axes = (partition.PARAM_AXES | partition.ADAPTER_AXES)[name]
    return model.layers if "layers" in axes else model


def _parameters(model: Decoder, kind: type[nnx.Variable]) -> Iterator[tuple[nnx.Module, str]]:
    """Each module and the name of each of its variables of a kind."""
    for module in (model, model.layers):
        for name, value in list(vars(module).items()):
            if isinstance(value, kind):
                yield module, name
