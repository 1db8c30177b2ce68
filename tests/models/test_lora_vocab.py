"""Adapters of embeddings and head: in a training step, on a mesh, in scores, from PEFT's files."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from ranktuner_jax import data, losses, models
from ranktuner_jax.diagnostics.scoring import TokenScorer
from ranktuner_jax.errors import UserError
from ranktuner_jax.evals.evaluation import score_rows
from ranktuner_jax.train import MeshConfig, init_state, make_mesh, make_train_step, place_batch
from tests.tolerances import F32, LOSS_GRADIENT, SAME_RUN_LOSS

SHAPE = models.DecoderConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=4,
    tie_embeddings=False,
    initializer_range=0.2,
)
LORA = models.Lora(rank=4, alpha=6.0, targets=("embed_tokens", "lm_head"))
NAMES = ("embed", "head")
_RNG = np.random.default_rng(0)
_TOKENS = _RNG.integers(61, size=(8, 17))
BATCH = data.Batch.of(
    {"tokens": _TOKENS[:, :-1], "labels": _TOKENS[:, 1:], "mask": _RNG.random((8, 16)) < 0.7}
)


def adapted(mesh: jax.sharding.Mesh | None = None, lora: models.Lora = LORA) -> models.Decoder:
    """A model with adapters that change it, the same on every mesh."""
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    shape = dataclasses.replace(SHAPE, vocab_multiple=tensor)
    model = models.Decoder(shape, rngs=nnx.Rngs(0), mesh=mesh)
    # Drawn without the rows that pad the vocabulary.
    for seed, name in enumerate(NAMES):
        matrix = getattr(model, name)
        plain = 0.2 * jax.random.normal(jax.random.key(seed), (61, 32))
        matrix.set_value(jnp.pad(plain, ((0, matrix.shape[0] - 61), (0, 0))))
    models.add_adapters(model, lora, rngs=nnx.Rngs(1))
    for seed, name in enumerate(NAMES):
        b = getattr(model, f"{name}_lora_b")
        plain = 0.1 * jax.random.normal(jax.random.key(seed), (61, lora.rank))
        b.set_value(jnp.pad(plain, ((0, b.shape[0] - 61), (0, 0))))
    return model


def step(model: models.Decoder, mesh: jax.sharding.Mesh) -> tuple[float, dict[str, np.ndarray]]:
    """The loss of a training step, and its gradient: what descent at a rate of 1 subtracts."""
    state = init_state(model, optax.sgd(1.0), mesh)

    def by_name(params: Any) -> dict[str, np.ndarray]:
        return {str(path[-1]): np.array(leaf[...]) for path, leaf in nnx.to_flat_state(params)}

    before = by_name(state.params)
    take = make_train_step(state, mesh, weighting=losses.RankTuner("one"))
    state, metrics = take(state, place_batch(mesh, BATCH, 1))
    after = by_name(state.params)
    return float(metrics["loss"]), {name: before[name] - after[name] for name in after}


def grid(sizes: MeshConfig) -> jax.sharding.Mesh:
    return make_mesh(sizes, jax.devices()[: math.prod(dataclasses.astuple(sizes))])


def test_gradients_are_those_of_the_whole_matrices_pulled_back_on_any_mesh() -> None:
    model = adapted()
    factors = {name: np.asarray(x, np.float64) for name, x in models.adapter_factors(model).items()}
    models.merge_adapters(model)
    one = grid(MeshConfig(data=1))
    whole_loss, whole = step(model, one)
    for sizes in (MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2)):
        mesh = grid(sizes)
        loss, grads = step(adapted(mesh), mesh)
        np.testing.assert_allclose(loss, whole_loss, **SAME_RUN_LOSS)
        assert grads.keys() == factors.keys()  # Nothing else moves.
        for name in NAMES:
            a, b = factors[f"{name}_lora_a"], factors[f"{name}_lora_b"]
            for part, expected in (("a", b.T @ whole[name]), ("b", whole[name] @ a.T)):
                ours = grads[f"{name}_lora_{part}"]
                largest = LORA.scale * np.abs(expected).max()
                assert largest > 1e-3
                np.testing.assert_allclose(ours[61:], 0)
                np.testing.assert_allclose(
                    ours[:61] / largest,
                    LORA.scale * expected / largest,
                    **LOSS_GRADIENT,
                    err_msg=f"{name} {part} {sizes}",
                )


def test_a_training_step_leaves_out_inputs_of_the_heads_adapter() -> None:
    mesh = grid(MeshConfig(data=1))
    model = adapted(mesh, dataclasses.replace(LORA, dropout=0.5))
    batch = jax.tree.map(jnp.asarray, BATCH)

    @jax.jit
    def loss(dropout: jax.Array | None) -> jax.Array:
        operands = model.unembedding(model(batch.tokens), dropout)
        weighting = losses.RankTuner("one")
        inputs = (*operands, batch.labels, batch.mask)
        return losses.fused_weighted_nll(*inputs, weighting=weighting).mean()

    whole = float(loss(None))
    dropped = float(loss(models.dropout_keys(model, 0, batch.row_index)))
    assert abs(dropped - whole) > 1e-3
    np.testing.assert_allclose(step(model, mesh)[0], dropped, **SAME_RUN_LOSS)


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=2, tensor=2)], ids=str)
def test_evaluations_and_audits_score_with_the_adapter_of_the_head(mesh: MeshConfig | None) -> None:
    lora = dataclasses.replace(LORA, rank=3)  # The mesh divides 32 columns, and not 35.
    model = adapted(None if mesh is None else grid(mesh), lora)
    merged = adapted(lora=lora)
    models.merge_adapters(merged)
    logits = jax.jit(lambda tokens: merged.logits(merged(tokens)))(BATCH.tokens)
    nll = -jnp.take_along_axis(
        jax.nn.log_softmax(logits), jnp.asarray(BATCH.labels)[..., None], axis=-1
    )[..., 0]
    expected = np.where(BATCH.mask, nll, 0)
    batch = jax.tree.map(jnp.asarray, BATCH)
    np.testing.assert_allclose(score_rows(*nnx.split(model), batch).total, expected.sum(), **F32)
    np.testing.assert_allclose(TokenScorer(model, fields=())(batch).nll, expected, **F32)


def test_the_matrices_that_peft_saves_with_their_adapters_must_be_the_models(
    tmp_path: pathlib.Path,
) -> None:
    def base(**options: Any) -> models.Decoder:
        return models.load_pretrained(tmp_path / "base", **options)

    models.save_pretrained(models.Decoder(SHAPE, rngs=nnx.Rngs(0)), tmp_path / "base")
    model = base()
    models.add_adapters(model, LORA, rngs=nnx.Rngs(1))
    models.save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    factors, matrices = load_file(file), load_file(tmp_path / "base" / "model.safetensors")
    copies = {
        f"base_model.model.{module}.base_layer.weight": matrices[f"{module}.weight"]
        for module in ("model.embed_tokens", "lm_head")
    }
    save_file(factors | copies, file)
    models.load_adapter(base(), tmp_path / "adapter")
    models.load_adapter(base(param_dtype=jnp.bfloat16), tmp_path / "adapter")
    name = "base_model.model.lm_head.base_layer.weight"
    copies[name] = copies[name] + 1
    save_file(factors | copies, file)
    with pytest.raises(UserError, match=r"lm_head.base_layer.weight \(expected the model's values"):
        models.load_adapter(base(), tmp_path / "adapter")
