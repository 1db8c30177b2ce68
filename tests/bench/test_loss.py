"""The benchmark of the losses runs, and refuses wrong flags."""

import re

import jax
import jax.numpy as jnp
import pytest

from ranktuner_jax import cli
from ranktuner_jax.bench import loss


def test_every_loss_has_a_row_with_its_ratio_to_the_floor(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = cli.main(["bench", "loss", "--shape", "64,8,300", "--repeats", "2"])
    out = capsys.readouterr().out
    assert code == 0
    for name in ("three matmuls, unchunked", "dense CE", "fused CE", "optax CE"):
        assert name in out
    row = next(line for line in out.splitlines() if "fused RankTuner, exact" in line)
    assert len(re.findall(r"\d+\.\d+ m?s", row)) == 2, row  # every and half of the positions
    assert "MB" in row


def test_an_invalid_shape_is_a_user_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "loss", "--shape", "64,8"]) == 2
    assert "--shape: expected N,D,V" in capsys.readouterr().err


def test_an_unknown_topology_is_a_user_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "loss", "--compile-for", "abacus:1x1"]) == 2
    assert "--compile-for" in capsys.readouterr().err


def test_the_fused_loss_keeps_gemmas_vocabulary_out_of_memory() -> None:
    size, features, vocab = map(int, loss.SHAPES[-1].split(","))
    assert vocab == 262_144
    inputs = (
        jax.ShapeDtypeStruct((size, features), jnp.float32),
        jax.ShapeDtypeStruct((vocab, features), jnp.float32),
        jax.ShapeDtypeStruct((size,), jnp.int32),
        jax.ShapeDtypeStruct((size,), jnp.bool_),
    )

    def temporary(case: str) -> int:
        function = loss.jax_cases(None)[case]
        memory = jax.jit(function).lower(*inputs).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    logits = 4 * size * vocab
    assert temporary("fused RankTuner") < logits < temporary("dense RankTuner") / 2
