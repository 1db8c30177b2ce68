"""Steps compiled for TPUs that are not there; needs libtpu (the extra `tpu`)."""

import importlib.util
import json
import math
import pathlib

import jax
import pytest

from ranktuner_jax import models
from ranktuner_jax.models.partition import param_axes
from ranktuner_jax.plan import make_plan
from ranktuner_jax.train import load_config

pytestmark = [
    pytest.mark.drill,  # 300 MB to install, and minutes to compile.
    pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu"),
]


def test_fsdp_sends_what_it_has_to(folder: pathlib.Path) -> None:
    shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape |= {"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 4096}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 8}
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    keys = [
        f"--config.model={folder}",
        *("--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.mesh.tensor=2"),
        *("--config.train.batch_size=16", "--config.data.row_length=512"),
        *("--config.train.accumulation=2", "--config.train.compute_dtype=bfloat16"),
        "--config.train.remat=full",
    ]
    # Attention's kernel has no exact products of bfloat16, which the other tests ask for.
    with jax.default_matmul_precision("default"):
        plan = make_plan(load_config("smollm2_chain_sum", keys), "v5e:2x4")
    parameters = sum(
        math.prod(axes.values())
        for axes in param_axes(models.read_config(folder)).values()
        if len(axes) > 1
    )
    # Of half of the parameters, in two micro-batches: gathered twice in bfloat16, reduced once in
    # float32.
    ideal = 3 / 4 * parameters / 2 * 2 * (2 + 2 + 4)
    sent = sum(one.num_bytes for one in plan.collectives if one.axes == ("fsdp",))
    assert sent <= 1.2 * ideal
    assert "reduce-scatter" in {one.kind for one in plan.collectives}
