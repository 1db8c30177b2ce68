"""Splash attention, compiled ahead of time for a TPU that is not there."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

# In a process of its own: libtpu reads its settings when jax is imported.
PROGRAM = """
import jax, jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from ranktuner_jax import models

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
import numpy as np
mesh = Mesh(np.array(devices).reshape(1, 2, 2), ("data", "fsdp", "tensor"),
            axis_types=(AxisType.Auto,) * 3)
config = models.DecoderConfig(
    family="mistral", vocab_size=512, hidden_size=256, intermediate_size=512, num_layers=4,
    num_heads=4, num_kv_heads=2, head_dim=128, windows=(None, None, 64, 64))
model = nnx.eval_shape(lambda: models.Decoder(
    config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, remat="full", mesh=mesh, attention="auto"))
graph, params = nnx.split(model, nnx.Param)
params = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    params, models.param_shardings(params, mesh))
rows = jax.ShapeDtypeStruct((4, LENGTH), jnp.int32, sharding=NamedSharding(mesh, P("fsdp")))

def loss(params, tokens, segments):
    model = nnx.merge(graph, params)
    return model.logits(model(tokens, segment_ids=segments)).mean()

text = jax.jit(jax.grad(loss)).lower(params, rows, rows).compile().as_text()
kernels = {name for name in ("splash_mha_fwd", "splash_mha_dkv", "splash_mha_dq") if name in text}
print(sorted(kernels), text.count('custom_call_target="tpu_custom_call"'))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiling for TPU needs libtpu (684 MB): pip install libtpu",
)
@pytest.mark.parametrize(("length", "runs"), [(256, True), (200, False)])
def test_auto_attention_is_splash_on_tpu(length: int, runs: bool) -> None:
    # Nothing here holds a TPU, so that several processes may load libtpu at once.
    settings = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | settings
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("LENGTH", str(length))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=pathlib.Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels, calls = done.stdout.strip().rsplit(" ", 1)
    if runs:
        # The forward pass, and the backward pass of both operands, in each of two runs of
        # layers.
        assert int(calls) >= 6, done.stdout
        assert "splash_mha_fwd" in kernels
    else:
        assert (kernels, calls) == ("[]", "0")
