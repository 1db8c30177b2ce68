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
import yaml

import ranktuner_jax

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The wheel of the sdist of a copy of the tree, so that no build leftovers get in or stay."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("ranktuner_jax", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    out = tmp_path_factory.mktemp("wheel")
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    made = subprocess.run([sys.executable, "-c", build, out], cwd=tree, capture_output=True)
    assert made.returncode == 0, made.stderr
    [sdist] = out.glob("*.tar.gz")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", out, sdist], check=True)
    [path] = out.glob("*.whl")
    return path


@pytest.fixture
def installed(wheel: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder that holds what the wheel installs, for PYTHONPATH."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    return tmp_path / "site"


def run_outside(
    installed: pathlib.Path, *command: str | pathlib.Path
) -> subprocess.CompletedProcess[str]:
    """Runs a command outside the repository, which finds the installed package and no other."""
    # -P and the working folder keep the repository, an editable install, out of the way.
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    folder = installed.parent
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


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
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
            wanted = ("--quiet", f"jax=={jax.__version__}", "numpy")
            for install in (
                ("uv", "pip", "install", "--python", python),
                # Slower, with settings that uv does not read.
                ("pip", "--python", python, "install"),
            ):
                built = subprocess.run(
                    [sys.executable, "-m", *install, *wanted], capture_output=True, text=True
                )
                if not built.returncode:
                    break
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
    for path in (ROOT / "ranktuner_jax").rglob("templates/*"):
        assert str(path.relative_to(ROOT)) in names
    assert "ranktuner_jax/py.typed" in names
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)
    tops = {name.split("/")[0] for name in names}
    assert all(top == "ranktuner_jax" or top.endswith(".dist-info") for top in tops)


def test_the_version_is_the_same_everywhere() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:2] == ["Unreleased", ranktuner_jax.__version__]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == ranktuner_jax.__version__


def test_the_citation_is_that_of_the_readme() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    [bibtex] = re.findall(r"```bibtex\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert citation["title"] in bibtex
    assert f"{{{citation['year']}}}" in bibtex
    for author in citation["authors"]:
        assert f"{author['family-names']}, {author['given-names']}" in bibtex


def test_the_losses_run_where_only_jax_is_installed(
    installed: pathlib.Path, bare_python: pathlib.Path
) -> None:
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
    ran = run_outside(installed, bare_python, "-c", code)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(str(installed))


def test_every_command_and_every_config_is_found_outside_the_repository(
    installed: pathlib.Path,
) -> None:
    """The default config too, which `ranktuner train` takes without --config."""
    code = """
import ranktuner_jax
from ranktuner_jax import cli, train
print(ranktuner_jax.__file__)
for name in train.config_names():
    train.load_config(name)
for command in cli.COMMANDS:
    assert cli.main([*command.split(), "--help"]) == 0
assert cli.main(["train", "--config=own_data", "--help"]) == 0
"""
    ran = run_outside(installed, sys.executable, "-c", code)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(str(installed))
    assert "smollm2_chain_sum" in ran.stdout


def test_a_program_that_uses_the_losses_passes_strict_type_checks(
    installed: pathlib.Path, bare_python: pathlib.Path
) -> None:
    program = """
import jax

from ranktuner_jax import losses


def loss(logits: jax.Array, labels: jax.Array, clip: float | None) -> losses.LossOutput:
    out = losses.weighted_nll(logits, labels, weighting=losses.RankTuner("one", clip=clip))
    return out.merge(out)
"""
    (installed.parent / "program.py").write_text(program)
    (installed.parent / "wrong.py").write_text(program.replace('"one"', '"two"'))
    mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(bare_python)]
    ran = run_outside(installed, *mypy, "program.py", "wrong.py")
    [error] = [line for line in ran.stdout.splitlines() if ": error:" in line]
    # Without py.typed everything would be Any, and this no mistake.
    assert error.startswith("wrong.py:")
    assert "expected \"Literal['prob', 'one']\"" in error
