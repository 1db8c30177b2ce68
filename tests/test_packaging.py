"""What a wheel holds, and that the losses run where only JAX is installed."""

import fcntl
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import jax
import pytest

import ranktuner_jax

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A wheel built from a copy of the tree, so that no build leftovers get in or stay."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("ranktuner_jax", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", out, tree], check=True)
    [path] = out.iterdir()
    return path


@pytest.fixture(scope="module")
def bare_python(pytestconfig: pytest.Config) -> pathlib.Path:
    """An interpreter that has JAX and what JAX needs; built once, kept in pytest's cache."""
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir(
        f"bare-{sys.version_info.major}.{sys.version_info.minor}-jax-{jax.__version__}"
    )
    python = folder / "bin" / "python"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Another test process may be building it.
        if not (folder / "ready").exists():
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            built = subprocess.run(
                [python, "-m", "pip", "install", "--quiet", f"jax=={jax.__version__}", "numpy"],
                capture_output=True,
                text=True,
            )
            if built.returncode:
                # Continuous integration has an index; elsewhere the tests need no network.
                give_up = pytest.fail if os.environ.get("CI") else pytest.skip
                give_up(f"no index to install JAX from: {built.stderr.strip()[-200:]}")
            (folder / "ready").touch()
    return python


def test_a_wheel_holds_configs_types_and_licence_and_no_tests(wheel: pathlib.Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "configs").glob("*.py"):
        assert f"ranktuner_jax/configs/{path.name}" in names
    for path in (ROOT / "ranktuner_jax").rglob("*.py"):
        assert str(path.relative_to(ROOT)) in names
    assert "ranktuner_jax/py.typed" in names
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)
    tops = {name.split("/")[0] for name in names}
    assert all(top == "ranktuner_jax" or top.endswith(".dist-info") for top in tops)


def test_the_version_is_the_newest_release_of_the_changelog() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:2] == ["Unreleased", ranktuner_jax.__version__]


def test_the_losses_run_where_only_jax_is_installed(
    wheel: pathlib.Path, bare_python: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = """
import importlib.util
import jax
import jax.numpy as jnp
assert importlib.util.find_spec("flax") is None
from ranktuner_jax import losses
print(losses.__file__)
hidden, unembed, labels = jnp.ones((4, 3)), jnp.eye(5, 3), jnp.arange(4)
for loss in (
    lambda h: losses.weighted_nll(h @ unembed.T, labels).mean(),
    lambda h: losses.fused_weighted_nll(h, unembed, labels).mean(),
):
    value, gradient = jax.value_and_grad(loss)(hidden)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run(
        [bare_python, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(str(tmp_path))
