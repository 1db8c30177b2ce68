"""Attention for devices that are not there: interpreted, replaced, or compiled ahead of time."""

import functools
import importlib.util
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from ranktuner_jax.models.attention import TokenPositions, attend
from tests.tolerances import F32

# Queries, keys and values, and which tokens they are of.
Problem = tuple[jax.Array, jax.Array, jax.Array, TokenPositions]

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
    family="FAMILY", vocab_size=512, hidden_size=256, intermediate_size=512, num_layers=4,
    num_heads=4, num_kv_heads=2, OPTIONS)
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


OPTIONS = {
    "mistral": "head_dim=128, windows=(None, None, 64, 64)",
    # Heads of 256, and local layers with a rotary embedding of their own.
    "gemma3_text": "head_dim=256, windows=(512, 512, None, 512), post_norm=True, qk_norm=True, "
    "ropes=tuple(models.RopeConfig(rope_theta=t) for t in (1e4, 1e4, 1e6, 1e4))",
}


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiling for TPU needs libtpu (684 MB): pip install libtpu",
)
@pytest.mark.parametrize(
    ("family", "length", "runs"),
    [("mistral", 256, True), ("mistral", 200, False), ("gemma3_text", 1024, True)],
)
def test_auto_attention_is_splash_on_tpu(family: str, length: int, runs: bool) -> None:
    program = PROGRAM.replace("FAMILY", family).replace("LENGTH", str(length))
    program = program.replace("OPTIONS", OPTIONS[family])
    # Nothing here holds a TPU, so that several processes may load libtpu at once.
    settings = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | settings
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=pathlib.Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels, calls = done.stdout.strip().rsplit(" ", 1)
    if runs:
        # The forward pass, and the backward pass of both operands, for each of two windows.
        assert int(calls) >= 6, done.stdout
        assert "splash_mha_fwd" in kernels
    else:
        assert (kernels, calls) == ("[]", "0")


@pytest.fixture
def problem(rng: np.random.Generator) -> Problem:
    """Queries, keys and values of two packed rows; two queries share each key."""
    q, k, v = (rng.normal(size=(2, 256, heads, 64)).astype(np.float32) for heads in (4, 2, 2))
    segments = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], [70, 50, 100, 36], axis=1)
    starts = np.concatenate([np.ones((2, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    index = np.arange(256)[None]
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    tokens = TokenPositions(jnp.asarray(positions, jnp.int32), jnp.asarray(segments, jnp.int32))
    return jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), tokens


def run(problem: Problem, implementation: str, window: int | None) -> np.ndarray:
    q, k, v, tokens = problem

    def attention(choice: jax.Array | None, windows: tuple[int | None, ...]) -> jax.Array:
        return attend(
            *(q, k, v, tokens, tokens),
            windows=windows,
            choice=choice,
            scale=0.2,
            implementation=implementation,
        )

    alone = attention(None, (window,))
    among = jax.jit(attention, static_argnums=1)(jnp.array(1), (7, window, 11))
    np.testing.assert_allclose(among, alone, **F32)
    return np.asarray(alone)


def expected_of(problem: Problem, window: int | None) -> np.ndarray:
    """Attention from its definition, in float64, a query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in problem[:3])
    positions, segments = map(np.asarray, problem[3])
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(q.shape[:3]):
        distance = positions[b, t] - positions[b]
        seen = (segments[b] == segments[b, t]) & (distance >= 0)
        if window is not None:
            seen &= distance < window
        scores = 0.2 * k[b, seen, h // 2] @ q[b, t, h]
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights @ v[b, seen, h // 2] / weights.sum()
    return out


@pytest.mark.parametrize("window", [None, 20])
def test_xla_attention_is_the_definition(problem: Problem, window: int | None) -> None:
    np.testing.assert_allclose(run(problem, "xla", window), expected_of(problem, window), **F32)


@pytest.mark.parametrize("window", [None, 20])
def test_splash_attention_computes_what_xla_does(
    problem: Problem, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreted = functools.partial(splash_attention_kernel.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", interpreted)
    expected = run(problem, "xla", window)
    np.testing.assert_allclose(run(problem, "splash", window), expected, **F32)


@pytest.mark.parametrize("window", [None, 20])
def test_cudnn_attention_is_asked_for_what_xla_does(
    problem: Problem, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = jax.nn.dot_product_attention

    def stand_in(*args: Any, implementation: str, **kwargs: Any) -> jax.Array:
        assert implementation == "cudnn"
        return real(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    expected = run(problem, "xla", window)
    np.testing.assert_allclose(run(problem, "cudnn", window), expected, **F32)
