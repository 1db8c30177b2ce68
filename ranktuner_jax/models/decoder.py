"""The decoder: Llama, Mistral, Qwen2 and Qwen3 as one Flax NNX module."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, PartitionSpec

from ranktuner_jax.models import attention, partition, rope
from ranktuner_jax.models.attention import TokenPositions
from ranktuner_jax.models.config import ACTIVATIONS, DecoderConfig
from ranktuner_jax.models.linear import linear

if TYPE_CHECKING:
    from jaxtyping import Array, DTypeLike, Float, Int

__all__ = ["REMAT_POLICIES", "Cache", "Decoder"]

# What the forward pass stores of a layer; the backward pass computes the rest again.
REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,  # everything
    "dots": jax.checkpoint_policies.save_only_these_names("projection"),
    "full": jax.checkpoint_policies.nothing_saveable,  # the layer's input only
}


class Cache(struct.PyTreeNode):
    """Keys and values of the tokens seen so far; shapes never change.

    Attributes:
      keys: `[L, B, S, K, d]`.
      values: `[L, B, S, K, d]`.
      positions: `[B, S]`, the position of the token in each slot.
      segment_ids: `[B, S]`, its segment; -1 marks a slot that holds nothing yet.
      index: The slot that the next token goes to, the same for every row.
    """

    keys: Float[Array, "L B S K d"]
    values: Float[Array, "L B S K d"]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    index: Int[Array, ""]

    def add_positions(self, new: TokenPositions) -> Cache:
        """The cache with the positions and segments of the next tokens in their slots."""
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
        return self.replace(
            positions=update(self.positions, new.positions, self.index),
            segment_ids=update(self.segment_ids, new.segment_ids, self.index),
        )


def _rms_norm(x: Array, scale: Array, eps: float) -> Array:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
    scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
    return wide.astype(x.dtype) * scale.astype(x.dtype)


class Layers(nnx.Module):
    """The layers' parameters, each `[L, ...]`; called on one layer's slice of them."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        self.config = config
        for name, axes in partition.param_axes(config).items():
            if "layers" in axes:
                setattr(self, name, _init(name, axes, config, rngs, param_dtype))

    def project(self, name: str, x: Float[Array, "B T *inputs"]) -> Float[Array, "B T *outputs"]:
        """One linear map, in the dtype of `x`, with its bias if there is one."""
        kernel = getattr(self, name)[...]
        outputs = kernel.shape[: kernel.ndim - x.ndim + 2]
        flat = (*x.shape[:2], -1)
        y = linear(x.reshape(flat), kernel.reshape(math.prod(outputs), -1))
        y = y.reshape(*x.shape[:2], *outputs)
        if (bias := getattr(self, f"{name}_bias", None)) is not None:
            y = y + bias[...].astype(x.dtype)[None, None]
        return checkpoint_name(y, "projection")

    def norm(self, name: str, x: Array) -> Array:
        """Root-mean-square norm over the last axis, in float32."""
        return _rms_norm(x, getattr(self, name)[...], self.config.norm_eps)

    def heads(
        self, x: Array, tables: tuple[Array, Array]
    ) -> tuple[Float[Array, "B T H d"], Float[Array, "B T K d"], Float[Array, "B T K d"]]:
        """Queries, keys and values, rotated."""
        x = self.norm("attention_norm", x)
        q, k, v = (self.project(name, x) for name in "qkv")
        if self.config.qk_norm:
            q, k = self.norm("q_norm", q), self.norm("k_norm", k)
        return rope.apply_rotary(q, tables), rope.apply_rotary(k, tables), v

    def mlp(self, x: Array, mesh: Mesh | None) -> Array:
        """The gated feed-forward network."""
        x = self.norm("mlp_norm", x)
        gate, up = (self.project(name, x) for name in ("gate", "up"))
        inner = ACTIVATIONS[self.config.activation](gate) * up
        return self.project("down", partition.constrain(inner, mesh, "batch", "time", "mlp"))


def _init(
    name: str, axes: dict[str, int], config: DecoderConfig, rngs: nnx.Rngs, dtype: DTypeLike
) -> nnx.Param:
    shape = tuple(axes.values())
    if name.endswith("norm"):
        return nnx.Param(jnp.ones(shape, dtype))
    if name.endswith("bias"):
        return nnx.Param(jnp.zeros(shape, dtype))
    value = config.initializer_range * jax.random.normal(rngs.params(), shape, dtype)
    if "vocab" in axes:  # Padded rows stay zero: nothing ever reads or trains them.
        rows = jnp.arange(axes["vocab"])[:, None] < config.vocab_size
        value = jnp.where(rows, value, jnp.zeros((), dtype))
    return nnx.Param(value)


class Decoder(nnx.Module):
    """A decoder-only transformer that returns hidden states; the unembedding is separate.

    Parameters of the layers are stacked, `[L, ...]`, and scanned over, so that
    compile time does not grow with depth.

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
        self.embed = _init("embed", axes["embed"], config, rngs, param_dtype)
        self.layers = Layers(config, rngs=rngs, param_dtype=param_dtype)
        self.final_norm = _init("final_norm", axes["final_norm"], config, rngs, param_dtype)
        if not config.tie_embeddings:
            self.head = _init("head", axes["head"], config, rngs, param_dtype)

    @property
    def vocab_size(self) -> int:
        """Real rows of the vocabulary; `unembed` may have more, which are padding."""
        return self.config.vocab_size

    @property
    def unembed(self) -> Float[Array, "V D"]:
        """The matrix that turns hidden states into logits, padded rows included."""
        return (self.embed if self.config.tie_embeddings else self.head)[...]

    @property
    def unembed_spec(self) -> PartitionSpec:
        """How `unembed` is divided over `mesh`, as `losses.sharded_weighted_nll` takes it."""
        if self.mesh is None:
            return PartitionSpec(None, None)
        # Of a tied model too: "embed" has the same axes.
        return partition.spec(self.mesh, partition.PARAM_AXES["head"], self.unembed.shape)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Logits over the real vocabulary, accumulated and returned in float32."""
        logits = jnp.einsum(
            "...d,vd->...v",
            hidden,
            self.unembed.astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )
        return logits[..., : self.vocab_size]

    def init_cache(self, batch_size: int, max_length: int, dtype: DTypeLike | None = None) -> Cache:
        """An empty cache for `batch_size` rows of up to `max_length` tokens, padding included."""
        c = self.config
        shape = (c.num_layers, batch_size, max_length, c.num_kv_heads, c.head_dim)
        keys, values = (jnp.zeros(shape, dtype or self.dtype) for _ in range(2))
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
    ) -> Any:
        """Hidden states after the final norm.

        Args:
          tokens: Token ids.
          positions: Position of each token in its conversation. By default they count from 0
            in each segment, or continue after the cache's real tokens.
          segment_ids: 0 for padding, 1, 2, ... for the conversations of a row, which
            do not see each other. By default a row is one conversation.
          cache: As `init_cache` or the previous call returned it.

        Returns:
          `hidden [B, T, D]` in the compute dtype, or `(hidden, cache)` if a cache was given.
        """
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = _count_positions(segment_ids, cache)
        new = TokenPositions(positions, segment_ids)
        # Under FSDP gather the matrix: a lookup in divided columns would gather the batch instead.
        embed = partition.constrain(self.embed[...], self.mesh, "vocab", "features")
        # The lookup precedes the cast, so that its gradient, a scatter, has the parameter's dtype.
        x = self._constrain(embed.at[tokens].get(mode="clip").astype(self.dtype))
        tables = rope.rotary_tables(
            self.config.rope, positions, self.config.head_dim, self.config.max_positions
        )
        if cache is None:
            x = self._scan(x, tables, new)
        else:
            x, cache = self._scan_cached(x, tables, new, cache)
        hidden = _rms_norm(x, self.final_norm[...], self.config.norm_eps)
        return hidden if cache is None else (hidden, cache)

    def _constrain(self, x: Array) -> Array:
        return partition.constrain(x, self.mesh, "batch", "time", "features")

    def _scan(self, x: Array, tables: tuple[Array, Array], new: TokenPositions) -> Array:
        kernel = attention.choose_implementation(
            self.attention, length=x.shape[1], dtype=self.dtype, mesh=self.mesh
        )
        graph, params = nnx.split(self.layers)

        def layer(x: Array, params: nnx.State, *, window: int | None) -> tuple[Array, None]:
            block = nnx.merge(graph, params)
            x = self._constrain(x)
            q, k, v = block.heads(x, tables)
            mixed = attention.attend(
                q, k, v, new, new, window=window, implementation=kernel, mesh=self.mesh
            )
            x = x + block.project("o", mixed)
            return x + block.mlp(x, self.mesh), None

        for start, stop, window in self.config.window_runs():
            step: Callable[..., Any] = functools.partial(layer, window=window)
            if (policy := REMAT_POLICIES[self.remat]) is not None:
                step = jax.checkpoint(step, policy=policy, prevent_cse=False)
            whole = stop - start == self.config.num_layers
            run = params if whole else jax.tree.map(lambda p: p[start:stop], params)  # noqa: B023
            x, _ = jax.lax.scan(step, x, run)
        return self._constrain(x)

    def _scan_cached(
        self, x: Array, tables: tuple[Array, Array], new: TokenPositions, cache: Cache
    ) -> tuple[Array, Cache]:
        graph, params = nnx.split(self.layers)
        cache = cache.add_positions(new)
        cached = TokenPositions(cache.positions, cache.segment_ids)

        # Keys and values are in the carry, to which each layer writes the new tokens only.
        def layer(carry: tuple, xs: tuple, *, window: int | None) -> tuple[tuple, None]:
            x, keys, values = carry
            index, params = xs
            block = nnx.merge(graph, params)
            q, k, v = block.heads(x, tables)
            at = (index, 0, cache.index, 0, 0)
            keys = jax.lax.dynamic_update_slice(keys, k[None].astype(keys.dtype), at)
            values = jax.lax.dynamic_update_slice(values, v[None].astype(values.dtype), at)
            mixed = attention.attend(
                q,
                keys[index].astype(q.dtype),
                values[index].astype(q.dtype),
                new,
                cached,
                window=window,
                implementation="xla",
            )
            x = x + block.project("o", mixed)
            return (x + block.mlp(x, self.mesh), keys, values), None

        carry = (x, cache.keys, cache.values)
        for start, stop, window in self.config.window_runs():
            xs = (jnp.arange(start, stop), jax.tree.map(lambda p: p[start:stop], params))  # noqa: B023
            carry, _ = jax.lax.scan(functools.partial(layer, window=window), carry, xs)
        x, keys, values = carry
        return x, cache.replace(keys=keys, values=values, index=cache.index + x.shape[1])


def _count_positions(segment_ids: Int[Array, "B T"], cache: Cache | None) -> Int[Array, "B T"]:
    if cache is not None:
        before = jnp.sum(cache.segment_ids > 0, axis=1, keepdims=True)
        real = jnp.cumsum(segment_ids > 0, axis=1)
        return jnp.maximum(before + real - 1, 0).astype(jnp.int32)
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
