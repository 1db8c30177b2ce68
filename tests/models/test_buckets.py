"""Models go to an object store as they go to a disk."""

import pathlib

import numpy as np
import pytest
from flax import nnx

from ranktuner_jax import models
from ranktuner_jax.errors import UserError
from tests.buckets import bucket


def test_a_model_is_written_to_a_bucket_and_its_config_comes_last(tmp_path: pathlib.Path) -> None:
    config = models.DecoderConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
    )
    model = models.Decoder(config, rngs=nnx.Rngs(0))
    with bucket(tmp_path) as written:
        models.save_pretrained(model, "gs://bucket/run/model", max_shard_bytes=1000)
        with pytest.raises(UserError, match="gs://bucket/run/model: exists already"):
            models.save_pretrained(model, "gs://bucket/run/model")
    assert len(written) > 3
    assert written[-1] == "config.json"
    loaded = models.load_pretrained(tmp_path / "bucket" / "run" / "model")
    np.testing.assert_array_equal(loaded.unembed, model.unembed)
