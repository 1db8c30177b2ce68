"""The losses can be copied into another project, with its name in place of ours."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

LOSSES = pathlib.Path(__file__).parents[2] / "ranktuner_jax" / "losses"
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "trainers.md"
USE = """
import sys

class NothingElseOfOurs:
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root in {"ranktuner_jax", "flax", "optax", "orbax", "transformers", "jaxtyping"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NothingElseOfOurs())
import jax
import jax.numpy as jnp
from theirs.ranktuner import RankTuner, fused_weighted_nll, summarize, weighted_nll

hidden, unembed, labels = jnp.ones((4, 3)), jnp.eye(5, 3), jnp.arange(4)
losses = (
    lambda h: weighted_nll(h @ unembed.T, labels, weighting=RankTuner("one")),
    lambda h: fused_weighted_nll(h, unembed, labels, weighting=RankTuner("one")),
)
dense, fused = (jax.jit(jax.value_and_grad(lambda h: f(h).mean()))(hidden) for f in losses)
assert all(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.allclose(a, b, atol=1e-6), dense, fused)))
assert summarize(losses[0](hidden))["nll"] > 0
print(RankTuner.__module__)
"""


def test_a_renamed_copy_of_the_losses_needs_jax_alone(tmp_path: pathlib.Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "ranktuner_jax").mkdir()
    shutil.copytree(LOSSES, tmp_path / "ranktuner_jax" / "losses")
    [commands] = re.findall(r"```sh\n(cp .*?)```", PAGE.read_text(), re.DOTALL)
    subprocess.run(["sh", "-euc", commands], cwd=tmp_path, check=True)
    shutil.rmtree(tmp_path / "ranktuner_jax")
    ran = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "theirs.ranktuner.ranktuner"


def test_every_adapter_has_an_example_a_test_and_a_row_of_the_page() -> None:
    root = LOSSES.parents[1]
    adapters = {path.stem for path in (root / "ranktuner_jax/adapters").glob("[a-z]*.py")}
    examples = {path.stem for path in (root / "examples/trainers").glob("*.py")}
    tests = {path.stem for path in (root / "tests/adapters/hosts").glob("test_*.py")}
    assert len(adapters) == 4
    assert examples == {f"{name}_sft" for name in adapters}
    assert {f"test_{name}" for name in adapters} <= tests
    for name in adapters:
        assert f"(../ranktuner_jax/adapters/{name}.py)" in PAGE.read_text()
        assert f"(../examples/trainers/{name}_sft.py)" in PAGE.read_text()


@pytest.mark.parametrize(
    "path", sorted((LOSSES.parents[1] / "examples/trainers").glob("*.py")), ids=lambda p: p.stem
)
def test_an_example_is_short(path: pathlib.Path) -> None:
    assert len(path.read_text().splitlines()) <= 60
