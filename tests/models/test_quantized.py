"""Frozen matrices of 4 and 8 bits: their codes, how they are read, and what they compute."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import statistics
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ranktuner_jax import evals, models
from ranktuner_jax.errors import UserError
from ranktuner_jax.models.partition import PROJECTIONS, TARGETS
from ranktuner_jax.models.quantized import BLOCK, NF4, quantize
from tests.tolerances import HF_LOGITS, LOSS_GRADIENT

# Of several blocks in every direction, so that they can be divided over a mesh.
SHAPE = models.DecoderConfig(
    vocab_size=32,
    hidden_size=2 * BLOCK,
    intermediate_size=4 * BLOCK,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=BLOCK,
    initializer_range=0.1,
)
TOKENS = jnp.arange(1, 25).reshape(2, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("base") / "model"
    models.save_pretrained(models.Decoder(SHAPE, rngs=nnx.Rngs(0)), path)
    return path


def logits(model: models.Decoder) -> np.ndarray:
    return np.asarray(jax.jit(lambda tokens: model.logits(model(tokens)))(TOKENS))


def dequantized(model: models.Decoder, folder: pathlib.Path, **options: Any) -> models.Decoder:
    """A plain model whose projections are the numbers that a quantised one's stand for."""
    plain = models.load_pretrained(folder, **options)
    for name in PROJECTIONS:
        codes, scales = map(np.asarray, jax.tree.leaves(getattr(model.layers, name).get_value()))
        if codes.dtype == np.uint8:
            codes = np.array(NF4)[np.stack([codes % 16, codes // 16], axis=-1)]
        blocks = codes.reshape(-1, BLOCK) * scales.astype(np.float64).reshape(-1, 1)
        matrix = getattr(plain.layers, name)
        matrix.set_value(jnp.asarray(blocks.reshape(matrix.shape), jnp.float32))
    return plain


def test_nf4_is_what_its_definition_says() -> None:
    # Eight quantiles below zero and nine above, from 1/32 and 1/30 of the mass, halved.
    normal, edge = statistics.NormalDist(), 1 - (1 / 32 + 1 / 30) / 2
    above = [normal.inv_cdf(p) for p in np.linspace(edge, 0.5, 9)[:-1]]
    below = [-normal.inv_cdf(p) for p in np.linspace(edge, 0.5, 8)[:-1]]
    expected = np.array(sorted([*above, 0.0, *below])) / max(above)
    # Published as computed in float32.
    np.testing.assert_allclose(NF4, expected, rtol=0, atol=3e-7)


@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.092), ("int8", 0.006)])
def test_numbers_become_the_nearest_codes_of_their_block(kind: str, error: float) -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((40, 6, 3 * BLOCK)).astype(np.float32)
    matrix *= 10.0 ** rng.integers(-3, 3, (40, 6, 1))
    matrix[0, 0] = 0
    ours = np.asarray(quantize(jnp.asarray(matrix), kind).dequantize(jnp.float32), np.float64)
    codes = np.array(NF4) if kind == "nf4" else np.arange(-127, 128) / 127
    blocks, found = matrix.reshape(-1, BLOCK).astype(np.float64), ours.reshape(-1, BLOCK)
    scales = np.abs(blocks).max(axis=1)
    best = np.min([np.abs(blocks - code * scales[:, None]) for code in codes], axis=0)
    assert (np.abs(found - blocks) - best <= 1e-6 * scales[:, None]).all()
    np.testing.assert_allclose(np.abs(found).max(axis=1), scales, rtol=1e-6)
    assert not ours[0, 0].any()
    whole = np.linalg.norm(ours - matrix, axis=-1)[1:] / np.linalg.norm(matrix, axis=-1)[1:]
    assert whole.mean() == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_model_is_quantised_while_it_is_read_and_divided_over_a_mesh(
    kind: str, folder: pathlib.Path
) -> None:
    model = models.load_pretrained(folder, quantized=kind)
    exact = logits(models.load_pretrained(folder))
    expected = logits(dequantized(model, folder))
    np.testing.assert_allclose(logits(model), expected, **HF_LOGITS)
    assert np.abs(expected - exact).max() > 1e-2
    after = models.load_pretrained(folder)
    models.quantize_layers(after, kind)
    auto = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=auto)
    divided = models.load_pretrained(folder, mesh=mesh, quantized=kind)
    for other in (after, divided):
        for ours, theirs in zip(*map(jax.tree.leaves, map(nnx.state, (model, other))), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    plain = models.load_pretrained(folder, mesh=mesh)
    for name in ("q", "o", "down"):
        matrix = getattr(divided.layers, name).get_value()
        spec = getattr(plain.layers, name).get_value().sharding.spec
        assert matrix.codes.sharding.spec == matrix.scales.sharding.spec == spec
    np.testing.assert_allclose(logits(divided), expected, **HF_LOGITS)


def test_reading_never_holds_a_whole_stack_of_matrices(tmp_path: pathlib.Path) -> None:
    deep = dataclasses.replace(SHAPE, num_layers=24, intermediate_size=1024)
    models.save_pretrained(models.Decoder(deep, rngs=nnx.Rngs(0)), tmp_path / "deep")
    models.load_pretrained(tmp_path / "deep", quantized="nf4")  # Compiles.
    tracemalloc.start()
    model = models.load_pretrained(tmp_path / "deep", quantized="nf4")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    layers: Any = model.layers
    up = layers.up.get_value()
    stack = 4 * math.prod(up.shape)
    # What NumPy holds: the quantised parts of a stack, twice, one matrix in float32, as it is read,
    # and as bytes; and Python.
    parts = 2 * (up.codes.nbytes + up.scales.nbytes)
    assert peak < parts + 3 * stack / deep.num_layers + 1.5e6 < 0.7 * stack


def whole_stacks(jaxpr: Any) -> Iterator[str]:
    """The types of all floating arrays that hold a matrix of every layer, or as many numbers."""
    sizes = {
        SHAPE.num_layers * math.prod(shape)
        for shape in (
            (2 * BLOCK, 2 * BLOCK),  # q and o
            (BLOCK, 2 * BLOCK),  # k and v
            (4 * BLOCK, 2 * BLOCK),  # gate, up and down
        )
    }
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            array = variable.aval
            if jnp.issubdtype(array.dtype, jnp.floating) and math.prod(array.shape) in sizes:
                yield str(array)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from whole_stacks(inner)


def trained(model: models.Decoder) -> tuple[Callable[..., nnx.State], nnx.State, nnx.State]:
    """The gradient of a loss in the adapters that the model gets, and its two arguments."""
    lora = models.Lora(rank=3, alpha=6.0, targets=TARGETS)
    models.add_adapters(model, lora, rngs=nnx.Rngs(1))
    for key, name in enumerate(lora.targets):
        b = getattr(model.layers if name in PROJECTIONS else model, f"{name}_lora_b")
        b.set_value(0.1 * jax.random.normal(jax.random.key(key), b.shape))
    graph, _ = nnx.split(model)
    params, base = nnx.state(model, nnx.Param, ...)

    def loss(params: nnx.State, base: nnx.State) -> jax.Array:
        model = nnx.merge(graph, params, base)
        return jnp.mean(jax.nn.logsumexp(model.logits(model(TOKENS[:, :5])), axis=-1))

    return jax.grad(loss), params, base


def test_gradients_are_those_above_the_dequantised_matrices(folder: pathlib.Path) -> None:
    model = models.load_pretrained(folder, quantized="nf4")
    gradients = []
    for one in (dequantized(model, folder), model):
        gradient, *arguments = trained(one)
        gradients.append(jax.tree.leaves(jax.jit(gradient)(*arguments)))
    for expected, ours in zip(*gradients, strict=True):
        largest = np.abs(expected).max()
        assert largest > 0
        np.testing.assert_allclose(ours / largest, expected / largest, **LOSS_GRADIENT)


@pytest.mark.parametrize("remat", models.REMAT_POLICIES)
def test_no_program_holds_the_dequantised_matrices_of_all_layers(
    remat: str, folder: pathlib.Path
) -> None:
    model = models.load_pretrained(folder, quantized="nf4", remat=remat)
    gradient, *arguments = trained(model)
    assert not list(whole_stacks(jax.make_jaxpr(gradient)(*arguments).jaxpr))


def test_the_sampler_writes_what_the_rounded_model_writes(folder: pathlib.Path) -> None:
    def written(model: models.Decoder) -> list[list[int]]:
        found = evals.generate(model, [[3, 4, 5], [7, 8]], max_new_tokens=6, stop_ids=[])
        return [list(completion.tokens) for completion in found]

    model = models.load_pretrained(folder, quantized="nf4")
    assert written(model) == written(dequantized(model, folder))


def test_what_cannot_be_quantised_or_merged_is_refused(folder: pathlib.Path) -> None:
    narrow = models.DecoderConfig(vocab_size=9, hidden_size=96, num_layers=1)
    model = nnx.eval_shape(lambda: models.Decoder(narrow, rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match=r"base=int8: expected .* multiples of 64, got q with 96"):
        models.quantize_layers(model, "int8")
    model = models.load_pretrained(folder, quantized="int8")
    models.add_adapters(model, models.Lora(rank=2, alpha=4.0), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="model must not be quantised: load it with a param_dt"):
        models.merge_adapters(model)
