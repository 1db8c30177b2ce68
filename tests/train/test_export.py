"""The export of a run: how much memory it takes, and that it equals the model of the run."""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from ranktuner_jax import models
from ranktuner_jax.train import (
    Checkpoints,
    MeshConfig,
    Run,
    TrainConfig,
    export,
    init_state,
    make_mesh,
    make_optimizer,
    read_config,
    to_dict,
    train_and_evaluate,
)

# Prints the memory that a process has after its imports, and its peak while it exports. What JAX
# and its compiler take once they have started, some 50 MB, does not grow with the model.
EXPORT = """
import pathlib, sys
import jax
import ranktuner_jax.train.export
from ranktuner_jax import cli

def kilobytes(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])

jax.block_until_ready(jax.numpy.zeros(8) + 1)
before = kilobytes("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")  # The peak so far is forgotten.
assert cli.main(["export", *sys.argv[1:]]) == 0
print(before, kilobytes("VmHWM"))
"""


@pytest.fixture(scope="module")
def large(tiny_model: pathlib.Path) -> Iterator[tuple[pathlib.Path, nnx.State]]:
    """The workdir of a run that 8 devices saved, and its parameters: 0.8 GB, random."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        shape = models.DecoderConfig(
            vocab_size=8192,
            hidden_size=1024,
            intermediate_size=3072,
            num_layers=16,
            num_heads=16,
            num_kv_heads=4,
            head_dim=64,
        )
        # The initial model has no weights: an export must not read them.
        shutil.copytree(tiny_model, folder / "model")
        (folder / "model" / "model.safetensors").unlink()
        shape.to_hf().save_pretrained(folder / "model")
        Run.open(TrainConfig(model=str(folder / "model")), workdir=folder).claim()
        config = read_config(folder)
        mesh = make_mesh(MeshConfig(data=1, fsdp=8))
        model = models.Decoder(shape, rngs=nnx.Rngs(0), mesh=mesh)
        state = init_state(model, make_optimizer(config.optimizer, 1), mesh)
        checkpoints = Checkpoints(folder, config.checkpoint, to_dict(config), state.params)
        checkpoints.save(3, state, {})
        checkpoints.close()
        yield folder, nnx.state(state.model(), nnx.Param)


def test_an_export_takes_little_more_memory_than_the_parameters(
    large: tuple[pathlib.Path, nnx.State],
) -> None:
    workdir, params = large
    output = workdir / "exported"
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, f"--workdir={workdir}", f"--output={output}"],
        env=os.environ
        | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"},
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, peak = (1024 * int(number) for number in done.stdout.splitlines()[-1].split())
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert peak - before < 1.1 * size, (before, peak, size)
    with safe_open(output / "model.safetensors", framework="numpy") as file:
        for layer in (0, 15):
            exported = file.get_tensor(f"model.layers.{layer}.mlp.up_proj.weight")
            np.testing.assert_array_equal(exported, params["layers"]["up"][...][layer])
        np.testing.assert_array_equal(
            file.get_tensor("model.embed_tokens.weight"), params["embed"][...]
        )


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_an_export_equals_the_model_of_the_run_on_any_mesh(
    sizes: dict[str, int], tiny_config: Callable[..., TrainConfig], tmp_path: pathlib.Path
) -> None:
    # Divided over devices, the vocabulary of 259 is padded to 260.
    mesh = {f"mesh__{axis}": size for axis, size in sizes.items()}
    run, exported = tmp_path / "run", tmp_path / "exported"
    train_and_evaluate(tiny_config(eval__task="", **mesh), run)
    assert export(run, exported) == 6
    names = sorted(path.name for path in exported.iterdir())
    assert names == sorted(path.name for path in (run / "model").iterdir())
    for name in names:
        assert (exported / name).read_bytes() == (run / "model" / name).read_bytes()
    assert "| plain NLL, nats a token |" in (exported / "README.md").read_text()
    # An earlier checkpoint has not been evaluated.
    assert export(run, tmp_path / "earlier", step=4) == 4
    card = (tmp_path / "earlier" / "README.md").read_text()
    assert "| steps | 4 |" in card
    assert "plain NLL" not in card
