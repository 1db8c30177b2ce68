"""The benchmark of the losses runs, and refuses wrong flags."""

import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import pytest

from ranktuner_jax import cli
from ranktuner_jax.bench import loss
from ranktuner_jax.errors import UserError


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


def test_a_program_without_clock_cycles_is_a_user_error() -> None:
    with pytest.raises(UserError, match="--compile-for: expected a program in which XLA notes"):
        list(loss._compiled_records(jax.devices()[0], [(64, 8, 300)], None))


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


@pytest.mark.drill
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu (pip install 'jax[tpu]')"
)
def test_a_small_width_costs_a_tpu_little_more_than_dense_cross_entropy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["bench", "loss", "--compile-for=v5e:2x2", "--shape=8192,1024,151936", "--json"]
    assert cli.main(command) == 0
    figures = {one["case"]: one["figures"] for one in json.loads(capsys.readouterr().out)}
    # It is 1.7 with chunks of 512 tokens whose logits both products of the gradient read.
    assert figures["fused RankTuner"]["÷ dense CE, time"] < 1.12
    # Loops count as often as they run: a v5e does 131072 FLOPs in a cycle, so it takes at least
    flops = 3 * 2 * 8192 * 1024 * 151936
    assert figures["fused RankTuner"]["million cycles"] > flops / 131072 / 1e6
