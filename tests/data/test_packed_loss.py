"""Packed and padded rows give the same loss: neither attention nor labels cross a boundary."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ranktuner_jax import losses, models
from ranktuner_jax.data import Batch, DataConfig, load_rows
from tests.tolerances import PACKED_GRADIENT, PACKED_LOSS


@pytest.fixture(scope="module")
def decoder(tokenizer: Any) -> models.Decoder:
    config = models.DecoderConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        initializer_range=0.25,
    )
    return models.Decoder(config, rngs=nnx.Rngs(0))


def test_packed_and_padded_rows_give_the_same_loss_and_gradients(
    decoder: models.Decoder, tokenizer: Any, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            f'{{"prompt": "What is {i} + {i * i}?", "completion": "It is {i + i * i}.",'
            f' "weight": {1 + i % 3}}}\n'
            for i in range(12)
        )
    )
    packed = load_rows(DataConfig(str(path), row_length=192), tokenizer)
    padded = load_rows(DataConfig(str(path), row_length=192, packing=False), tokenizer)
    assert len(packed) < len(padded) / 2
    graph, params = nnx.split(decoder)

    @jax.jit  # traced once: rows of padding give the packed batch the shape of the other
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params: Any, batch: Batch) -> Any:
        model = nnx.merge(graph, params)
        out = losses.fused_weighted_nll(
            model(batch.tokens, batch.positions, batch.segment_ids),
            model.unembed,
            batch.labels,
            batch.mask,
            weighting=losses.RankTuner(base="one"),
            token_weights=batch.token_weights,
        )
        return out.total, out

    filler = [-1] * (len(padded) - len(packed))
    (_, out), gradients = loss(params, packed.take([*range(len(packed)), *filler]))
    (_, expected), expected_gradients = loss(params, padded.take(range(len(padded))))
    assert out.denom == expected.denom == packed.summary.supervised
    np.testing.assert_allclose(out.mean(), expected.mean(), **PACKED_LOSS)
    for got, wanted in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        scale = jnp.abs(wanted).max()
        np.testing.assert_allclose(got / scale, wanted / scale, **PACKED_GRADIENT)
