"""Every family against transformers: frozen logits for everyone, live ones with torch."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from ranktuner_jax import models
from tests.models import tiny
from tests.tolerances import HF_LOGITS

GOLDEN = pathlib.Path(__file__).parent / "golden"


def _logits(model: models.Decoder) -> np.ndarray:
    return np.asarray(nnx.jit(lambda m, t: m.logits(m(t)))(model, tiny.TOKENS))


@pytest.mark.parametrize("case", tiny.CASES)
def test_logits_match_the_frozen_ones_of_transformers(case: str, tmp_path: pathlib.Path) -> None:
    tiny.write_checkpoint(case, tmp_path)
    golden = np.load(GOLDEN / f"{case}.npz")["logits"]
    assert golden.std() > 0.1  # and tells positions apart:
    assert np.ptp(golden.argmax(-1)) > 0
    np.testing.assert_allclose(_logits(models.load_pretrained(tmp_path)), golden, **HF_LOGITS)


@pytest.mark.parametrize("case", tiny.CASES)
def test_saving_and_loading_gives_the_same_folder(case: str, tmp_path: pathlib.Path) -> None:
    config = tiny.write_checkpoint(case, tmp_path)
    model = models.load_pretrained(tmp_path)
    models.save_pretrained(model, tmp_path / "saved", max_shard_bytes=6000)
    again = models.load_pretrained(tmp_path / "saved")
    assert again.config == config
    written: dict[str, np.ndarray] = {}
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        assert sum(x.nbytes for x in load_file(file).values()) <= 6000
        written |= load_file(file)
    original = load_file(tmp_path / "model.safetensors")
    assert written.keys() == original.keys()
    for name, value in original.items():
        np.testing.assert_array_equal(written[name], value)


@pytest.mark.parity
@pytest.mark.parametrize("case", tiny.CASES)
def test_transformers_agrees_in_both_directions(case: str, tmp_path: pathlib.Path) -> None:
    from tests.models.make_golden import torch_logits

    config = tiny.write_checkpoint(case, tmp_path)
    theirs = torch_logits(tmp_path)
    np.testing.assert_allclose(_logits(models.load_pretrained(tmp_path)), theirs, **HF_LOGITS)
    # A model of ours, which transformers has not seen.
    ours = models.Decoder(config, rngs=nnx.Rngs(3))
    for i, (_, parameter) in enumerate(nnx.to_flat_state(nnx.state(ours, nnx.Param))):
        noise = jax.random.normal(jax.random.key(i), parameter.shape)
        parameter.set_value(parameter.get_value() + 0.2 * noise)
    models.save_pretrained(ours, tmp_path / "ours", max_shard_bytes=6000)
    np.testing.assert_allclose(torch_logits(tmp_path / "ours"), _logits(ours), **HF_LOGITS)


@pytest.mark.parametrize("case", ["llama3", "qwen2"])
def test_bfloat16_stays_near_float32(case: str, tmp_path: pathlib.Path) -> None:
    tiny.write_checkpoint(case, tmp_path)
    model = models.load_pretrained(tmp_path, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    hidden = model(tiny.TOKENS)
    assert hidden.dtype == jnp.bfloat16
    assert model.logits(hidden).dtype == jnp.float32
    golden = np.load(GOLDEN / f"{case}.npz")["logits"]
    error = np.abs(np.asarray(model.logits(hidden)) - golden)
    # Three layers of roundings of 2^-9, logits of size 1.
    assert error.mean() < 0.02
    assert error.max() < 0.2
