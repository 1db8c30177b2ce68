"""The decoder: every family of `models/families` as one Flax NNX module."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, Mesh, PartitionSpec

from ranktuner_jax.models import attention, partition, rope
from ranktuner_jax.models.attention import TokenPositions
from ranktuner_jax.models.cache import Cache
from ranktuner_jax.models.config import DecoderConfig
from ranktuner_jax.models.layers import Layers, init_param, rms_norm
from ranktuner_jax.models.linear import linear
from ranktuner_jax.models.lora import Lora, drop_inputs

if TYPE_CHECKING:
    from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

__all__ = ["REMAT_POLICIES", "Decoder"]

_T = TypeVar("_T")

# What the forward pass stores of a layer; the backward pass computes the rest again.
REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,  # everything
    "dots": jax.checkpoint_policies.save_only_these_names("projection"),
    "full": jax.checkpoint_policies.nothing_saveable,  # the layer's input only
}


class _Adapter(NamedTuple):
    """That of embeddings or head: its options, and its factors."""

    lora: Lora
    a: Float[Array, "r D"]
    b: Float[Array, "V r"]


class _Choice(NamedTuple):
    """Which of the decoder's windows and rotary tables a layer has; `None` if there is but one."""

    window: Array | None
    rope: Array | None


def _distinct(values: Sequence[_T]) -> tuple[tuple[_T, ...], Array | None]:
    """The distinct values, and the index among them of each; no index if they are all equal."""
    distinct = tuple(dict.fromkeys(values))
    if len(distinct) == 1:
        return distinct, None
    return distinct, jnp.array([distinct.index(value) for value in values], jnp.int32)


class Decoder(nnx.Module):
    """A decoder-only transformer that returns hidden states; the unembedding is separate.

    Parameters of the layers are stacked, `[L, ...]`, and scanned over, so that
    compile time does not grow with depth. Layers may differ in window and rotary
    embedding, which each picks as the scan comes to it.

    With a `cache`, rows may be padded on the left or on the right: padding has
    segment id 0, and attention goes by positions and segments, not by slots. All
    rows write to the same slots. A left-padded prompt's next token follows from the
    last slot's hidden state; a right-padded one's from each row's last real token.
    The caller must make the cache long enough.

    Args:
      config: Shape and options.
      rngs: Source of the initial values.
      dtype: Type of the arithmetic; norms, softmax and rotations are float32 anyway.
      param_dtype: Type of the parameters.
      remat: One of `REMAT_POLICIES`.
      attention: `auto`, `xla`, `splash` or `cudnn`.
      mesh: Where the parameters lie, if they are sharded.

    Example:
      >>> config = DecoderConfig(vocab_size=11, hidden_size=8, intermediate_size=16,
      ...                        num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4)
      >>> model = Decoder(config, rngs=nnx.Rngs(0))
      >>> hidden = model(jnp.array([[1, 2, 3]]))
      >>> hidden.shape, model.logits(hidden).shape
      ((1, 3, 8), (1, 3, 11))
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        remat: str = "none",
        attention: str = "auto",
        mesh: Mesh | None = None,
    ):
        if remat not in REMAT_POLICIES:
            raise ValueError(f"remat must be one of {tuple(REMAT_POLICIES)}, got {remat!r}")
        if mesh is not None and any(kind != AxisType.Auto for kind in mesh.axis_types):
            raise ValueError(
                f"mesh must have Auto axes, got {mesh.axis_types}; "
                "pass axis_types=(jax.sharding.AxisType.Auto,) * n to jax.make_mesh"
            )
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.remat = remat
        self.attention = attention
        self.mesh = mesh
        axes = partition.param_axes(config)
        self.embed = init_param("embed", axes["embed"], config, rngs, param_dtype)
        self.layers = Layers(config, rngs=rngs, param_dtype=param_dtype)
        self.final_norm = init_param("final_norm", axes["final_norm"], config, rngs, param_dtype)
        if not config.tie_embeddings:
            self.head = init_param("head", axes["head"], config, rngs, param_dtype)

    @property
    def vocab_size(self) -> int:
        """Real rows of the vocabulary; `unembed` may have more, which are padding."""
        return self.config.vocab_size

    @property
    def unembed(self) -> Float[Array, "V D"]:
        """The matrix that turns hidden states into logits, padded rows included.

        An adapter of the head adds to them: see `unembedding`.
        """
        return (self.embed if self.config.tie_embeddings else self.head).get_value()

    @property
    def unembed_spec(self) -> PartitionSpec:
        """How `unembedding`'s matrix is divided, as `losses.sharded_weighted_nll` takes it."""
        if self.mesh is None:
            return PartitionSpec(None, None)
        rows, columns = self.unembed.shape
        if (adapter := self._adapter("head")) is not None:
            columns += adapter.lora.rank
        # Of a tied model too: "embed" has the same axes.
        return partition.spec(self.mesh, partition.PARAM_AXES["head"], (rows, columns))

    def unembedding(
        self, hidden: Float[Array, "B T D"], dropout: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "B T I"], Float[Array, "V I"]]:
        """What a loss computes logits from: activations and a matrix, whose product they are.

        They are `hidden` and `unembed`; with an adapter of the head, those beside the adapter's low
        activations and its B, so that I is D plus the rank.

        Args:
          hidden: What a call returned.
          dropout: As in the call.
        """
        activations, matrices = zip(*self._unembeddings(hidden, dropout), strict=True)
        if len(matrices) == 1:
            return hidden, self.unembed
        # Joined, not merged to W + scale * B A: where the products are of 16 bits, small changes
        # would be lost in the rounding of that sum, and A's inputs could not be dropped. Both copy
        # W and have the loss compute the gradient of the whole matrix, at much the same cost.
        dtype = jnp.result_type(*matrices)
        joined = jnp.concatenate([matrix.astype(dtype) for matrix in matrices], axis=1)
        return jnp.concatenate(activations, axis=-1), joined

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Logits over the real vocabulary, accumulated and returned in float32."""
        # Not of `unembedding`, whose joined matrix would be copied at every token that is sampled.
        products = [
            jnp.einsum(
                "...d,vd->...v",
                activations,
                matrix.astype(hidden.dtype),
                preferred_element_type=jnp.float32,
            )
            for activations, matrix in self._unembeddings(hidden)
        ]
        return sum(products[1:], products[0])[..., : self.vocab_size]

    def _unembeddings(
        self, hidden: Array, dropout: PRNGKeyArray | None = None
    ) -> list[tuple[Array, Array]]:
        """Activations and matrices `[V, I]` whose products add up to the logits."""
        pairs = [(hidden, self.unembed)]
        if (adapter := self._adapter("head")) is not None:
            lora, a, b = adapter
            if dropout is not None:
                hidden = drop_inputs(hidden, lora.dropout, dropout[-1], "head")
            pairs.append((linear(hidden, a) * lora.scale, b))
        return pairs

    def _adapter(self, name: str) -> _Adapter | None:
        """The adapter of `embed` or `head`, if it has one."""
        lora = self.layers.lora
        if lora is None or name not in lora.targets:
            return None
        return _Adapter(lora, *(getattr(self, f"{name}_lora_{factor}")[...] for factor in "ab"))

    @property
    def cache_dtype(self) -> jnp.dtype:
        """The dtype of keys and values in a cache.

        On CPUs float32, which holds 16-bit ones exactly: XLA:CPU writes a token into a 16-bit
        array by converting all of it there and back, which takes longer than reading twice as much.
        """
        platform = attention.platform(self.mesh)
        return jnp.dtype(jnp.float32) if platform == "cpu" else self.dtype

    def init_cache(self, batch_size: int, max_length: int, dtype: DTypeLike | None = None) -> Cache:
        """An empty cache for `batch_size` rows of up to `max_length` tokens, padding included."""
        c = self.config
        sizes = {"batch": batch_size, "kv_heads": c.num_kv_heads, "time": max_length}
        sizes["head_dim"] = c.head_dim

        def empty(*axes: str) -> tuple[Array, ...]:
            shape = [sizes[axis] for axis in axes]
            arrays = (jnp.zeros(shape, dtype or self.cache_dtype) for _ in range(c.num_layers))
            return tuple(partition.constrain(array, self.mesh, *axes) for array in arrays)

        keys = empty("batch", "kv_heads", "head_dim", "time")
        values = empty("batch", "kv_heads", "time", "head_dim")
        slots = (batch_size, max_length)
        return Cache(
            keys=keys,
            values=values,
            positions=jnp.zeros(slots, jnp.int32),
            segment_ids=jnp.full(slots, -1, jnp.int32),
            index=jnp.zeros((), jnp.int32),
        )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        cache: Cache | None = None,
        layers: Sequence[nnx.State] | None = None,
        dropout: PRNGKeyArray | None = None,
    ) -> Any:
        """Hidden states after the final norm.

        Args:
          tokens: Token ids.
          positions: Position of each token in its conversation. By default they count from 0
            in each segment, or continue after the cache's real tokens.
          segment_ids: 0 for padding, 1, 2, ... for the conversations of a row, which
            do not see each other. By default a row is one conversation.
          cache: As `init_cache` or the previous call returned it.
          layers: With a cache, what to use in place of `split_layers()`.
          dropout: Keys of the adapters' dropout, in training alone; see `dropout_keys`.

        Returns:
          `hidden [B, T, D]` in the compute dtype, or `(hidden, cache)` if a cache was given.
        """
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = _count_positions(segment_ids, cache)
        new = TokenPositions(positions, segment_ids)
        if cache is None:
            return self._finish(self._scan(tokens, new, dropout=dropout)[0])
        x, cache = self._layers_cached(self._embedded(tokens), new, cache, layers)
        return self._finish(x), cache

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Hidden states as a call without a cache computes them, and a cache of these T tokens.

        A call with an empty cache gives the same; this one compiles one layer, not all, and uses
        the device's attention kernel.
        """
        new = TokenPositions(positions, segment_ids)
        x, (keys, values) = self._scan(tokens, new, keep=True)
        cache = Cache(
            keys=tuple(k.transpose(0, 2, 3, 1) for k in keys),
            values=tuple(v.swapaxes(1, 2) for v in values),
            positions=positions,
            segment_ids=segment_ids,
            index=jnp.asarray(tokens.shape[1], jnp.int32),
        )
        return self._finish(x), cache

    def _embedded(self, tokens: Array) -> Array:
        # Under FSDP gather the matrix: a lookup in divided columns would gather the batch instead.
        embed = partition.constrain(self.embed[...], self.mesh, "vocab", "features")
        # The lookup precedes the cast, so that its gradient, a scatter, has the parameter's dtype.
        x = self._constrain(embed.at[tokens].get(mode="clip").astype(self.dtype))
        if (adapter := self._adapter("embed")) is not None:
            lora, a, b = adapter
            low = b.at[tokens].get(mode="clip").astype(self.dtype)
            x = x + linear(low * lora.scale, a.T)
        if self.config.scale_embeddings:
            x = x * jnp.asarray(self.config.hidden_size**0.5, self.dtype)
        return x

    def _finish(self, x: Array) -> Array:
        return rms_norm(x, self.final_norm[...], self.config)

    def _constrain(self, x: Array) -> Array:
        return partition.constrain(x, self.mesh, "batch", "time", "features")

    def _variants(
        self, new: TokenPositions
    ) -> tuple[_Choice, Callable[..., tuple[Array, Array]], dict[str, Any]]:
        """What layers may differ in: each one's choice, and what it chooses from.

        Returns:
          The choices `[L]`; `tables(choice)`, the rotary tables of the new tokens; and the
          options of attention.
        """
        c = self.config
        ropes, rope_choice = _distinct(c.ropes or (c.rope,))
        windows, window_choice = _distinct(c.windows or (None,))
        rotary = [
            rope.rotary_tables(one, new.positions, c.head_dim, c.max_positions) for one in ropes
        ]
        cosines, sines = (jnp.stack(tables) for tables in zip(*rotary, strict=True))

        def tables(choice: _Choice) -> tuple[Array, Array]:
            if choice.rope is None:
                return rotary[0]
            return cosines[choice.rope], sines[choice.rope]

        options = {"windows": windows, "scale": c.attention_scale}
        return _Choice(window_choice, rope_choice), tables, options

    def _scan(
        self,
        tokens: Array,
        new: TokenPositions,
        *,
        keep: bool = False,
        dropout: PRNGKeyArray | None = None,
    ) -> tuple[Array, Any]:
        """All layers; and, for a cache to keep, each one's keys and values `[L, B, T, K, d]`."""
        kernel = attention.choose_implementation(
            self.attention, length=tokens.shape[1], dtype=self.dtype, mesh=self.mesh
        )
        graph, params = nnx.split(self.layers)
        choices, tables, options = self._variants(new)

        def layer(
            x: Array, xs: tuple[nnx.State, _Choice, PRNGKeyArray | None]
        ) -> tuple[Array, Any]:
            params, choice, keys = xs
            block = nnx.merge(graph, params)
            x = self._constrain(x)
            q, k, v = block.heads(x, tables(choice), keys)
            mixed = attention.attend(
                *(q, k, v, new, new),
                choice=choice.window,
                implementation=kernel,
                mesh=self.mesh,
                **options,
            )
            kept = (k.astype(self.cache_dtype), v.astype(self.cache_dtype)) if keep else None
            return block.add(x, mixed, self.mesh, keys), kept

        step: Callable[..., Any] = layer
        if (policy := REMAT_POLICIES[self.remat]) is not None:
            step = jax.checkpoint(step, policy=policy, prevent_cse=False)
        keys = None if dropout is None else dropout[:-1]
        x, kept = jax.lax.scan(step, self._embedded(tokens), (params, choices, keys))
        return self._constrain(x), kept

    def split_layers(self) -> list[nnx.State]:
        """The parameters of each layer, for calls with a cache: a loop of them slices none."""
        stacked = nnx.state(self.layers)
        return [
            jax.tree.map(operator.itemgetter(index), stacked)
            for index in range(self.config.num_layers)
        ]

    def _layers_cached(
        self, x: Array, new: TokenPositions, cache: Cache, layers: Sequence[nnx.State] | None
    ) -> tuple[Array, Cache]:
        graph, _ = nnx.split(self.layers)
        choices, tables, options = self._variants(new)
        cache = cache.add_positions(new)
        cached = TokenPositions(cache.positions, cache.segment_ids)
        keys, values = list(cache.keys), list(cache.values)
        # Not a scan: its slices would copy each layer's parameters and cache, at every token.
        for i, params in enumerate(layers or self.split_layers()):
            block = nnx.merge(graph, params)
            choice = jax.tree.map(operator.itemgetter(i), choices)
            q, k, v = block.heads(x, tables(choice))
            k, v = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
            update = jax.lax.dynamic_update_slice_in_dim
            keys[i] = update(keys[i], k.astype(keys[i].dtype), cache.index, axis=3)
            values[i] = update(values[i], v.astype(values[i].dtype), cache.index, axis=2)
            mixed = attention.attend_cached(
                *(q, keys[i], values[i], new, cached),
                choice=choice.window,
                mesh=self.mesh,
                **options,
            )
            x = block.add(x, mixed, self.mesh)
        index = cache.index + x.shape[1]
        return x, cache.replace(keys=tuple(keys), values=tuple(values), index=index)


def _count_positions(segment_ids: Int[Array, "B T"], cache: Cache | None) -> Int[Array, "B T"]:
    if cache is not None:
        before = jnp.sum(cache.segment_ids > 0, axis=1, keepdims=True)
        real = jnp.cumsum(segment_ids > 0, axis=1)
        return jnp.maximum(before + real - 1, 0).astype(jnp.int32)
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
