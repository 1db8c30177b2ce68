"""The decoder: segments, windows, cache, recomputation and meshes agree with the plain call."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from ranktuner_jax import models
from ranktuner_jax.errors import UserError
from ranktuner_jax.models import partition
from ranktuner_jax.models.attention import choose_implementation
from ranktuner_jax.models.linear import linear
from tests.tolerances import BF16, F32

CONFIG = models.DecoderConfig(
    family="qwen3",
    vocab_size=37,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    qk_norm=True,
    windows=(None, 3),
    initializer_range=0.2,
    tie_embeddings=False,
)
AUTO = AxisType.Auto
# Loss and gradients, and the bytes of temporary memory that they took.
Differentiated = tuple[tuple[jax.Array, nnx.State], int]
TOKENS = np.random.default_rng(0).integers(0, 37, (2, 10)).astype(np.int32)


def make_mesh(*shape: int) -> Mesh:
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AUTO,) * 3)


@pytest.fixture(scope="module")
def model() -> models.Decoder:
    return models.Decoder(CONFIG, rngs=nnx.Rngs(0))


@nnx.jit
def call(model: models.Decoder, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


def loss(params: nnx.State, graph: nnx.GraphDef, tokens: np.ndarray) -> jax.Array:
    model = nnx.merge(graph, params)
    logits = model.logits(model(tokens))
    return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 1])


def test_conversations_of_a_row_do_not_see_each_other(model: models.Decoder) -> None:
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 2], [1, 1, 2, 2, 2, 2, 2, 3, 0, 0]])
    packed = np.asarray(call(model, TOKENS, segment_ids=segments.astype(np.int32)))
    for row, start, stop in [(0, 0, 4), (0, 4, 10), (1, 0, 2), (1, 2, 7), (1, 7, 8)]:
        # Alone in its row, at the front; what comes after cannot reach it.
        alone = np.asarray(call(model, np.roll(TOKENS, -start, axis=1)))[row]
        np.testing.assert_allclose(packed[row, start:stop], alone[: stop - start], **F32)
    assert np.isfinite(packed).all()


def test_positions_count_each_segment_from_zero(model: models.Decoder) -> None:
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 2]] * 2, np.int32)
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]] * 2, np.int32)
    np.testing.assert_array_equal(
        call(model, TOKENS, segment_ids=segments), call(model, TOKENS, positions, segments)
    )


def test_a_token_changes_nothing_before_it_nor_beyond_its_windows() -> None:
    windowed = models.Decoder(dataclasses.replace(CONFIG, windows=(3, 3)), rngs=nnx.Rngs(0))
    changed = TOKENS.copy()
    changed[:, 2] = (changed[:, 2] + 1) % 37
    before, after = (np.asarray(call(windowed, tokens)) for tokens in (TOKENS, changed))
    difference = np.abs(before - after).max((0, 2))
    # Two layers of two tokens back each reach positions 2 to 6.
    assert (difference > 0).tolist() == [2 <= i <= 6 for i in range(10)]


def test_the_program_does_not_grow_with_depth() -> None:
    def size(layers: int) -> int:
        pattern = [*[3] * 5, None] * layers
        ropes = [models.RopeConfig(rope_theta=20.0 if window else 500.0) for window in pattern]
        config = dataclasses.replace(
            CONFIG, num_layers=layers, windows=tuple(pattern[:layers]), ropes=tuple(ropes[:layers])
        )
        graph, params = nnx.split(nnx.eval_shape(lambda: models.Decoder(config, rngs=nnx.Rngs(0))))
        step = jax.jit(jax.grad(loss), static_argnums=1)
        return step.lower(params, graph, TOKENS).as_text().count("\n")

    assert size(62) == size(8)


@pytest.mark.parametrize("side", ["left", "right"])
def test_decoding_with_a_cache_matches_the_whole_row(model: models.Decoder, side: str) -> None:
    # Prompts of 4 and 2 tokens, padded to 5; the rest comes one by one.
    whole = np.asarray(call(model, TOKENS))
    prompt, segments = np.zeros((2, 5), np.int32), np.zeros((2, 5), np.int32)
    lengths = (4, 2)
    for row, length in enumerate(lengths):
        at = slice(5 - length, 5) if side == "left" else slice(0, length)
        prompt[row, at], segments[row, at] = TOKENS[row, :length], 1
    traces = 0

    @jax.jit
    def step(tokens: jax.Array, segment_ids: jax.Array, cache: models.Cache) -> Any:
        nonlocal traces
        traces += 1
        return model(tokens, segment_ids=segment_ids, cache=cache)

    hidden, cache = step(prompt, segments, model.init_cache(2, 12))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(hidden[row][segments[row] == 1], whole[row, :length], **F32)
        assert cache.positions[row, :5][segments[row] == 1].tolist() == list(range(length))
    one = np.ones((2, 1), np.int32)
    for i in range(6):
        token = np.array([[TOKENS[0, 4 + i]], [TOKENS[1, 2 + i]]])
        hidden, cache = step(token, one, cache)
        np.testing.assert_allclose(hidden[0, 0], whole[0, 4 + i], **F32)
        np.testing.assert_allclose(hidden[1, 0], whole[1, 2 + i], **F32)
    assert traces == 2  # prompt and token
    assert int(cache.index) == 11


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prefill_is_a_call_with_an_empty_cache(dtype: str) -> None:
    windowed = dataclasses.replace(CONFIG, windows=(3, None))
    model = models.Decoder(windowed, rngs=nnx.Rngs(0), dtype=dtype)
    segments = np.ones((2, 5), np.int32)
    segments[1, :3] = 0
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0).astype(np.int32)
    inputs = (TOKENS[:, :5], positions, segments)
    hidden, cache = call(model, *inputs, cache=model.init_cache(2, 5))
    read, filled = nnx.jit(lambda model, *inputs: model.prefill(*inputs))(model, *inputs)
    tolerance = F32 if dtype == "float32" else {"atol": 0.05}
    real = segments == 1
    np.testing.assert_allclose(
        *(np.asarray(x, np.float32)[real] for x in (read, hidden)), **tolerance
    )
    for name, axis in (("keys", 3), ("values", 2)):
        for one, other in zip(getattr(filled, name), getattr(cache, name), strict=True):
            # On CPUs, whatever the dtype of the arithmetic.
            assert one.dtype == other.dtype == jnp.float32
            pair = (np.moveaxis(np.asarray(x, np.float32), axis, 1)[real] for x in (one, other))
            np.testing.assert_allclose(*pair, **tolerance)
    assert (np.asarray(filled.positions) == np.asarray(cache.positions)).all()
    assert int(filled.index) == int(cache.index) == 5


@pytest.fixture(scope="module")
def plain() -> Differentiated:
    """On one device, everything stored."""
    return differentiate(models.Decoder(CONFIG, rngs=nnx.Rngs(0)))


def differentiate(model: models.Decoder) -> Differentiated:
    graph, params = nnx.split(model, nnx.Param)
    tokens: np.ndarray | jax.Array = np.concatenate([TOKENS] * 4)
    options: dict[str, Any] = {}
    if (mesh := model.mesh) is not None:
        shardings = models.param_shardings(params, mesh)
        params = jax.device_put(params, shardings)
        rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        tokens = jax.device_put(tokens, rows)
        options["out_shardings"] = (NamedSharding(mesh, PartitionSpec()), shardings)
    step = jax.jit(jax.value_and_grad(loss), static_argnums=1, **options)
    compiled = step.lower(params, graph, tokens).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return compiled(params, tokens), memory.temp_size_in_bytes


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputation_leaves_loss_and_gradients_as_they_are(
    remat: str, plain: Differentiated
) -> None:
    got, memory = differentiate(models.Decoder(CONFIG, rngs=nnx.Rngs(0), remat=remat))
    expected, most = plain
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **F32), got, expected)
    if remat == "full":  # At this size, what `dots` stores is most of it.
        assert memory < most


def test_recomputation_repeats_the_matrix_products_that_it_says() -> None:
    def products(remat: str) -> int:
        graph, params = nnx.split(models.Decoder(CONFIG, rngs=nnx.Rngs(0), remat=remat), nnx.Param)
        step = jax.jit(jax.grad(loss), static_argnums=1)
        return step.lower(params, graph, TOKENS).as_text().count("stablehlo.dot_general")

    none, dots, full = map(products, ("none", "dots", "full"))
    # Attention's two; and all projections but the last one, whose outputs no gradient needs.
    assert (dots - none, full - none) == (2, 2 + 6)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_loss_and_gradients_do_not_depend_on_the_mesh(
    shape: tuple[int, int, int], plain: Differentiated
) -> None:
    model = models.Decoder(CONFIG, rngs=nnx.Rngs(0), mesh=make_mesh(*shape))
    got, _ = differentiate(model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **F32), got, plain[0])


def test_shardings_follow_the_table_in_parameters_and_optimizer_state() -> None:
    mesh = make_mesh(2, 2, 2)
    config = dataclasses.replace(CONFIG, vocab_multiple=2)

    def create() -> TrainState:
        params = nnx.state(models.Decoder(config, rngs=nnx.Rngs(0)), nnx.Param)
        return TrainState.create(apply_fn=loss, params=params, tx=optax.adamw(1e-3))

    shardings = models.param_shardings(jax.eval_shape(create), mesh)
    adam = shardings.opt_state[0]
    for tree in (shardings.params, adam.mu, adam.nu):
        assert tree["embed"].get_value().spec == PartitionSpec("tensor", "fsdp")
        assert tree["layers"]["q"].get_value().spec == PartitionSpec(None, "tensor", None, "fsdp")
        assert tree["layers"]["k"].get_value().spec == PartitionSpec(None, "tensor", None, "fsdp")
        assert tree["layers"]["down"].get_value().spec == PartitionSpec(None, "fsdp", "tensor")
        assert tree["final_norm"].get_value().spec == PartitionSpec(None)
    assert adam.count.spec == PartitionSpec()
    state = jax.jit(create, out_shardings=shardings)()
    assert state.params["layers"]["q"][...].sharding == shardings.params["layers"]["q"].get_value()


def test_axes_that_do_not_divide_stay_whole() -> None:
    mesh = make_mesh(1, 1, 8)
    assert partition.spec(mesh, ("layers", "heads", "head_dim"), (3, 9, 64)) == PartitionSpec(
        None, None, None
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("mesh", "vocab_multiple", "expected"),
    [
        (None, 1, (None, None)),
        ({"data": 2, "fsdp": 4}, 1, (None, "fsdp")),
        ({"fsdp": 2, "tensor": 4}, 4, ("tensor", "fsdp")),
        ({"tensor": 8}, 8, ("tensor", None)),
        ({"fsdp": 2, "tensor": 4}, 1, (None, "fsdp")),  # 4 does not divide 37 rows.
        ({"fsdp": 2, "tensor": 4}, 3, (None, "fsdp")),  # Nor 39.
    ],
)
def test_unembed_spec_is_where_the_unembedding_lies(
    mesh: dict[str, int] | None,
    vocab_multiple: int,
    expected: tuple[str | None, ...],
    tied: bool,
) -> None:
    devices = None
    if mesh is not None:
        devices = jax.make_mesh(tuple(mesh.values()), tuple(mesh), axis_types=(AUTO,) * len(mesh))
    config = dataclasses.replace(CONFIG, vocab_multiple=vocab_multiple, tie_embeddings=tied)
    model = models.Decoder(config, rngs=nnx.Rngs(0), mesh=devices)
    assert model.unembed_spec == PartitionSpec(*expected)
    if devices is not None:
        shardings = models.param_shardings(nnx.state(model, nnx.Param), devices)
        assert shardings["embed" if tied else "head"].get_value().spec == model.unembed_spec
        placed = jax.device_put(model.unembed, NamedSharding(devices, model.unembed_spec))
        np.testing.assert_array_equal(placed, model.unembed)


def test_padded_rows_are_zero_and_outside_the_logits() -> None:
    config = dataclasses.replace(CONFIG, vocab_multiple=8)
    model = models.Decoder(config, rngs=nnx.Rngs(0))
    assert model.unembed.shape == (40, 32)
    assert model.vocab_size == 37
    assert not np.asarray(model.unembed[37:]).any()
    assert model.logits(model(jnp.asarray(TOKENS))).shape == (2, 10, 37)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_linear_has_the_gradients_of_a_plain_product(
    dtype: DTypeLike, rng: np.random.Generator
) -> None:
    x = rng.normal(size=(2, 5, 3)).astype(np.float32)
    kernel = rng.normal(size=(4, 3)).astype(np.float32)
    g = rng.normal(size=(2, 5, 4)).astype(np.float32)
    y, transpose = jax.vjp(linear, jnp.asarray(x, dtype), jnp.asarray(kernel))
    dx, dkernel = transpose(jnp.asarray(g, dtype))
    assert (y.dtype, dx.dtype, dkernel.dtype) == (dtype, dtype, jnp.float32)
    tolerance = F32 if dtype == jnp.float32 else BF16 | {"atol": 5e-2}
    np.testing.assert_allclose(y.astype(jnp.float32), x @ kernel.T, **tolerance)
    np.testing.assert_allclose(dx.astype(jnp.float32), g @ kernel, **tolerance)
    np.testing.assert_allclose(dkernel, np.einsum("btf,btd->fd", g, x), **tolerance)
    # Rounded neither on its way to the parameter nor, on any device, in its sums.
    assert (dkernel != dkernel.astype(jnp.bfloat16)).any()
    text = str(jax.make_jaxpr(lambda *a: jax.vjp(linear, *a)[1](y))(jnp.asarray(x, dtype), kernel))
    assert text.count("dot_general[") == text.count("preferred_element_type=float32") == 3


def test_norms_are_rounded_once() -> None:
    config = dataclasses.replace(CONFIG, num_layers=0, windows=())  # The final norm alone.
    model = models.Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    x = np.asarray(model.embed[...].astype(jnp.bfloat16), np.float32)[TOKENS]
    exact = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_eps)
    same = np.asarray(model(jnp.asarray(TOKENS))) == exact.astype(jnp.bfloat16)
    assert same.mean() > 0.99


@pytest.mark.parametrize("check_vma", [True, False])
def test_linear_differentiates_inside_shard_map(check_vma: bool, rng: np.random.Generator) -> None:
    x = rng.normal(size=(8, 2, 3)).astype(np.float32)
    kernel = rng.normal(size=(4, 3)).astype(np.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AUTO,))

    def gradient(kernel: jax.Array, x: jax.Array) -> jax.Array:
        dkernel = jax.grad(lambda k: jnp.sum(linear(x, k) ** 2))(kernel)
        # With check_vma, the transpose of replication has summed already.
        return dkernel if check_vma else jax.lax.psum(dkernel, "data")

    specs = (PartitionSpec(), PartitionSpec("data"))
    got = jax.jit(
        jax.shard_map(
            gradient, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=check_vma
        )
    )(kernel, x)
    expected = jax.grad(lambda k: jnp.sum((x @ k.T) ** 2))(kernel)
    np.testing.assert_allclose(got, expected, **F32)


def test_attention_is_chosen_by_device_length_and_type() -> None:
    def choose(requested: str, length: int = 256) -> str:
        dtype = jnp.dtype(jnp.bfloat16)
        return choose_implementation(requested, length=length, dtype=dtype, mesh=None)

    assert choose("auto") == "xla"
    assert choose("splash") == "splash"
    assert choose("cudnn") == "cudnn"
    with pytest.raises(ValueError, match=r"attention must be one of .* got 'flash'"):
        choose("flash")
    with pytest.raises(ValueError, match="multiple of 128 tokens, got 100"):
        choose("splash", length=100)


def test_options_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match=r"remat must be one of .* got 'some'"):
        models.Decoder(CONFIG, rngs=nnx.Rngs(0), remat="some")
    with pytest.raises(ValueError, match="mesh must have Auto axes"):
        models.Decoder(CONFIG, rngs=nnx.Rngs(0), mesh=jax.make_mesh((8,), ("data",)))
    with pytest.raises(UserError, match="architecture 'gpt2' is not supported; supported: llama"):
        models.DecoderConfig(family="gpt2")
    with pytest.raises(UserError, match="multiple of num_kv_heads, got 4 and 3"):
        models.DecoderConfig(num_heads=4, num_kv_heads=3)
    with pytest.raises(UserError, match="windows must name one for each of 30 layers, got 1"):
        models.DecoderConfig(windows=(4,))
    with pytest.raises(UserError, match="ropes must name one for each of 30 layers, got 2"):
        models.DecoderConfig(ropes=(None, None))
