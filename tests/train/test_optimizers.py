"""Each optimizer against optax, against NumPy, and on meshes of eight devices."""

from __future__ import annotations

import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh

from ranktuner_jax import models
from ranktuner_jax.errors import UserError
from ranktuner_jax.train import (
    OPTIMIZERS,
    MeshConfig,
    OptimizerConfig,
    init_state,
    load_config,
    make_mesh,
    make_optimizer,
)

Params = dict[str, Any]

STEPS = 3
RATE, DECAY = 1e-2, 0.1
# Hugging Face's rows of each matrix of a layer: the product of this many axes after the layer.
OUTPUT_AXES = {"q": 2, "k": 2, "o": 1, "gate": 1, "down": 1}
SHAPES: Params = {
    "embed": (160, 128),
    "final_norm": (128,),
    "layers": {
        "attention_norm": (2, 128),
        "q": (2, 3, 8, 128),
        "k": (2, 1, 8, 128),
        "q_bias": (2, 3, 8),
        "o": (2, 128, 3, 8),
        "gate": (2, 144, 128),
        "down": (2, 128, 144),
    },
}
LAYERS: dict[str, tuple[int, ...]] = SHAPES["layers"]
DECAYED = {
    "embed": True,
    "final_norm": False,
    "layers": {name: name not in ("attention_norm", "q_bias") for name in LAYERS},
}
# Three updates on another mesh: the error of what they change, divided by its largest entry. adamw
# and lion work element by element, adafactor sums squares in another order (2e-7 measured). muon
# raises the rounding of directions without a gradient by up to 3.4445⁵ = 485 (3e-5 measured).
SAME_UPDATE = {"adamw": 1e-6, "lion": 1e-6, "adafactor": 2e-6, "muon": 2e-4}


def make_config(name: str, **changes: Any) -> OptimizerConfig:
    """A config whose rate is constant."""
    settings: dict[str, Any] = {"schedule": "constant", "warmup_ratio": 0.0, "learning_rate": RATE}
    return OptimizerConfig(name, **(settings | {"weight_decay": DECAY} | changes))


def is_shape(value: Any) -> bool:
    return isinstance(value, tuple)


def random_tree(seed: int, dtype: str = "float32") -> Params:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype), SHAPES, is_leaf=is_shape
    )


def train(tx: optax.GradientTransformation, params: Params) -> Params:
    """A few updates with made-up gradients."""
    state = tx.init(params)
    for step in range(STEPS):
        updates, state = tx.update(random_tree(step + 1), state, params)
        params = optax.apply_updates(params, updates)
    return params


def optax_muon(**options: Any) -> optax.GradientTransformation:
    """optax's Muon with its dimension numbers written by hand; None leaves a parameter to Adam."""

    def dims(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Any:
        return optax.contrib.MuonDimensionNumbers(inputs, outputs)

    layers = {
        "attention_norm": None,
        "q": dims((3,), (1, 2)),
        "k": dims((3,), (1, 2)),
        "q_bias": None,
        "o": dims((2, 3), (1,)),
        "gate": dims((2,), (1,)),
        "down": dims((2,), (1,)),
    }
    numbers = {"embed": None, "final_norm": None, "layers": layers}
    return optax.contrib.muon(RATE, muon_weight_dimension_numbers=numbers, **options)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("adamw", {}, optax.adamw(RATE, 0.9, 0.95, weight_decay=DECAY, mask=DECAYED)),
        (
            "adamw",
            {"eps": 0.1, "nesterov": True},
            optax.nadamw(RATE, 0.9, 0.95, eps=0.1, weight_decay=DECAY, mask=DECAYED),
        ),
        ("lion", {}, optax.lion(RATE, 0.9, 0.95, weight_decay=DECAY, mask=DECAYED)),
        (
            "adafactor",
            {},
            optax.adafactor(
                RATE,
                multiply_by_parameter_scale=False,
                weight_decay_rate=RATE * DECAY,
                weight_decay_mask=DECAYED,
            ),
        ),
        (
            "adafactor",
            {
                "min_dim_size_to_factor": 144,
                "decay_rate": 0.5,
                "clipping_threshold": 0.0,
                "momentum": 0.8,
                "multiply_by_parameter_scale": True,
            },
            optax.adafactor(
                RATE,
                min_dim_size_to_factor=144,
                decay_rate=0.5,
                clipping_threshold=None,
                momentum=0.8,
                weight_decay_rate=RATE * DECAY,
                weight_decay_mask=DECAYED,
            ),
        ),
    ],
    ids=["adamw", "adamw with options", "lion", "adafactor", "adafactor with options"],
)
def test_the_updates_are_those_of_optax(
    name: str, options: dict[str, Any], expected: optax.GradientTransformation
) -> None:
    ours = train(make_optimizer(make_config(name, options=options), STEPS), random_tree(0))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7),
        ours,
        train(expected, random_tree(0)),
    )


@pytest.mark.parametrize(
    "options", [{}, {"beta": 0.8, "ns_steps": 3, "nesterov": False, "consistent_rms": 0.0}], ids=str
)
def test_muon_updates_matrices_as_optax_does_and_the_rest_as_adamw(
    options: dict[str, Any],
) -> None:
    params = random_tree(0)
    ours = train(make_optimizer(make_config("muon", options=options), STEPS), params)
    given = {"consistent_rms": 0.2} | options
    given["consistent_rms"] = given["consistent_rms"] or None
    muon = train(optax_muon(weight_decay=DECAY, **given), params)
    adamw = train(optax.adamw(RATE, 0.9, 0.95, weight_decay=DECAY, mask=DECAYED), params)
    for name in LAYERS:
        expected = muon if name in OUTPUT_AXES else adamw
        np.testing.assert_array_equal(ours["layers"][name], expected["layers"][name], name)
    for name in ("embed", "final_norm"):
        np.testing.assert_array_equal(ours[name], adamw[name], name)


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """The iteration of Muon, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def test_muon_orthogonalises_the_matrix_of_each_layer_as_hugging_face_lays_it_out() -> None:
    params = random_tree(0)
    tx = make_optimizer(make_config("muon"), STEPS)
    state = tx.init(params)
    grads = [random_tree(step + 1) for step in range(STEPS)]
    for grad in grads:
        updates, state = tx.update(grad, state, params)
    for name, cut in OUTPUT_AXES.items():
        for layer in range(2):
            weight = np.asarray(params["layers"][name][layer], np.float64)
            rows = math.prod(weight.shape[:cut])
            matrices = [np.asarray(grad["layers"][name][layer], np.float64) for grad in grads]
            history = [matrix.reshape(rows, -1) for matrix in matrices]
            momentum = np.zeros_like(history[0])
            for matrix in history:
                momentum = 0.95 * momentum + 0.05 * matrix
            nesterov = 0.95 * momentum / (1 - 0.95 ** (STEPS + 1)) + 0.05 * history[-1] / (
                1 - 0.95**STEPS
            )
            scale = 0.2 * math.sqrt(max(nesterov.shape))
            update = scale * newton_schulz(nesterov) + DECAY * weight.reshape(rows, -1)
            np.testing.assert_allclose(
                updates["layers"][name][layer].reshape(rows, -1) / -RATE,
                update,
                rtol=0,
                atol=1e-5 * np.abs(update).max(),
                err_msg=f"{name} of layer {layer}",
            )


# The field of the first moment, and the options that make it exist.
MOMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("mu", {}),
    "lion": ("mu", {}),
    "muon": ("mu", {}),
    "adafactor": ("ema", {"momentum": 0.9}),
}


def moments(state: optax.OptState, field: str) -> list[jax.Array]:
    return jax.tree.leaves([value for _, value in optax.tree.get_all_with_path(state, field)])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("moment_dtype", ["", "float32", "bfloat16"])
def test_the_first_moment_has_and_keeps_the_chosen_dtype(
    name: str, param_dtype: str, moment_dtype: str
) -> None:
    field, options = MOMENTS[name]
    tx = make_optimizer(make_config(name, moment_dtype=moment_dtype, options=options), STEPS)
    params = random_tree(0, param_dtype)
    state = tx.init(params)
    first, second = moments(state, field), moments(state, "nu") + moments(state, "v")
    assert len(first) == len(jax.tree.leaves(params))
    assert {str(leaf.dtype) for leaf in first} == {moment_dtype or param_dtype}
    assert {str(leaf.dtype) for leaf in second} <= {param_dtype}
    after = jax.eval_shape(lambda: tx.update(params, state, params)[1])
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)


def test_a_moment_dtype_without_a_first_moment_is_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer\.moment_dtype: adafactor has a first moment o"):
        OptimizerConfig("adafactor", moment_dtype="bfloat16")
    with pytest.raises(UserError, match=r"optimizer\.moment_dtype: expected one of "):
        OptimizerConfig("adamw", moment_dtype="float16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["name=adamv"], "optimizer.name: expected one of adamw, .*; did you mean adamw"),
        (["name=muon", "options.nssteps=4"], "did you mean optimizer.options.ns_steps"),
        (["name=lion", "options.eps=1"], "unknown key --config.optimizer.options.eps"),
        (["name=muon", "options.ns_steps=x"], "optimizer.options.ns_steps"),
    ],
)
def test_a_wrong_override_is_reported(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config("smollm2_chain_sum", [f"--config.optimizer.{a}" for a in arguments])


def test_an_option_that_the_optimizer_does_not_have_is_refused() -> None:
    with pytest.raises(UserError, match=r"adamw takes eps, nesterov, got 'epss'; did you mean eps"):
        OptimizerConfig(options={"epss": 1e-6})
    with pytest.raises(UserError, match="lion takes no options, got 'eps'"):
        OptimizerConfig("lion", options={"eps": 1e-6})


def test_choosing_another_optimizer_replaces_the_options() -> None:
    config = load_config(
        "smollm2_chain_sum",
        ["--config.optimizer.name=muon", "--config.optimizer.options.ns_steps=4"],
    )
    assert config.optimizer.options == {
        "beta": 0.95,
        "ns_steps": 4,
        "nesterov": True,
        "consistent_rms": 0.2,
    }
    assert load_config("smollm2_chain_sum").optimizer.options == {"eps": 1e-8, "nesterov": False}


def test_a_config_file_can_add_an_optimizer(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMIZERS, "sgd", OPTIMIZERS["adamw"])  # Removes it at the end.
    path = tmp_path / "mine.py"
    path.write_text(
        "import optax\n"
        "from ranktuner_jax import train\n\n"
        "train.OPTIMIZERS['sgd'] = lambda config, schedule, *, momentum=0.5: optax.sgd(\n"
        "    schedule, momentum\n"
        ")\n\n"
        "def get_config():\n"
        "    return {'optimizer': {'name': 'sgd', 'options': {'momentum': 0.0}}}\n"
    )
    assert load_config(str(path)).optimizer.options == {"momentum": 0.0}
    config = load_config(str(path), ["--config.optimizer.options.momentum=0.25"]).optimizer
    assert config.options == {"momentum": 0.25}
    tx = make_optimizer(make_config("sgd", options=config.options), STEPS)
    ours, expected = (train(tx, random_tree(0)) for tx in (tx, optax.sgd(RATE, 0.25)))
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


MODEL = models.DecoderConfig(
    family="qwen2",
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=8,
    num_kv_heads=8,
    head_dim=16,
    qkv_bias=True,
    tie_embeddings=False,
    initializer_range=0.2,
)
MESHES = [{"fsdp": 8}, {"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]


def mesh_of(**sizes: int) -> Mesh:
    config = MeshConfig(**({"data": 1} | sizes))
    return make_mesh(config, jax.devices()[: math.prod(sizes.values())])


def by_name(tree: Any) -> dict[str, jax.Array]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_are_created_sharded_like_their_parameters(name: str) -> None:
    field, options = MOMENTS[name]
    tx = make_optimizer(make_config(name, options=options), STEPS)
    state = init_state(models.Decoder(MODEL, rngs=nnx.Rngs(0)), tx, mesh_of(**MESHES[-1]))
    params = by_name(state.params)
    sharded = [key for key, param in params.items() if not param.sharding.is_fully_replicated]
    assert len(sharded) >= 9  # All matrices.
    found = []
    for key, moment in by_name(state.opt_state).items():
        owner = next((param for param in params if key.endswith(f".{param}")), None)
        if owner is not None and moment.shape == params[owner].shape:
            assert moment.sharding.is_equivalent_to(params[owner].sharding, moment.ndim), key
            found.append(owner)
        else:
            assert moment.sharding.is_fully_replicated, key
    assert set(found) == set(params)
    assert len(moments(state.opt_state, field)) == len(params)


def low_rank(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A gradient as of few tokens: of rank 4 or little more in each layer."""
    if len(shape) < 3:
        return rng.normal(size=shape).astype(np.float32)
    left, right = rng.normal(size=(*shape[:-1], 4)), rng.normal(size=(shape[0], 4, shape[-1]))
    return np.einsum("l...r,lrn->l...n", left, right).astype(np.float32)


@functools.cache
def changes(name: str, **sizes: int) -> dict[str, np.ndarray]:
    """What a few updates with fixed gradients change in the parameters of a tiny decoder."""
    mesh = mesh_of(**sizes)
    tx = make_optimizer(make_config(name, learning_rate=1.0), STEPS)
    state = init_state(models.Decoder(MODEL, rngs=nnx.Rngs(0)), tx, mesh)
    before = {key: np.asarray(param) for key, param in by_name(state.params).items()}
    shardings = models.param_shardings(state, mesh)
    apply = jax.jit(lambda s, g: s.apply_gradients(grads=g), out_shardings=shardings)
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        grads = jax.tree.map(lambda p: low_rank(rng, p.shape), state.params)
        state = apply(state, jax.device_put(grads, shardings.params))
    return {key: np.asarray(param) - before[key] for key, param in by_name(state.params).items()}


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_updates_are_the_same_on_any_mesh(name: str, sizes: dict[str, int]) -> None:
    one, other = changes(name, data=1), changes(name, **sizes)
    errors = {key: np.abs(other[key] - one[key]).max() / np.abs(one[key]).max() for key in one}
    assert max(errors.values()) <= SAME_UPDATE[name], errors
