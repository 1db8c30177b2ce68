"""The layout: imports point down only, and the losses need JAX alone."""

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "ranktuner_jax"

# Every package, and those of ours that it may import.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "losses": {"errors"},
    "adapters": {"losses"},
    "models": {"errors", "files"},
    "data": {"errors", "files"},
    "evals": {"errors", "files", "losses", "models", "data"},
    "diagnostics": {"errors", "files", "losses", "models", "data", "evals"},
    "train": {"errors", "files", "losses", "models", "data", "evals", "diagnostics"},
    "lab": {"errors", "files", "models", "data", "evals"},
    "compare": {"errors", "files", "losses", "models", "data", "evals", "diagnostics", "train"},
    "plan": {"errors", "files", "models", "data", "train"},
    "bench": {"errors", "losses", "models", "data", "evals", "diagnostics", "train", "plan"},
    "cli": {
        *("errors", "losses", "models", "data", "evals", "diagnostics", "train", "bench"),
        *("lab", "compare", "plan"),
    },
    "configs": set(),
}
HEAVY = {"flax", "orbax", "transformers", "tensorflow_datasets", "optax", "grain", "safetensors"}


def imported_names(source: str) -> Iterator[tuple[int, str]]:
    """The line and full name of everything a source imports, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def forbidden_imports(package: str, source: str) -> list[str]:
    """Imports that are relative, or of one of our packages that `package` may not import."""
    found = []
    for line, name in imported_names(source):
        parts = name.split(".")
        if name.startswith(".") or (
            parts[0] == "ranktuner_jax"
            and len(parts) > 1
            and not parts[1].startswith("__")
            and parts[1] not in ALLOWED[package] | {package}
        ):
            found.append(f"line {line}: {name}")
    return found


def without_type_checking(source: str) -> str:
    """The source without its `if TYPE_CHECKING:` blocks."""
    tree = ast.parse(source)
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    return ast.unparse(tree)


def package_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
CONFIGS = sorted((PACKAGE.parent / "configs").glob("*.py"))


def test_every_package_has_an_entry() -> None:
    assert {package_of(path) for path in SOURCES} <= ALLOWED.keys()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_only(path: pathlib.Path) -> None:
    assert forbidden_imports(package_of(path), path.read_text()) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_import_nothing_of_ours(path: pathlib.Path) -> None:
    assert forbidden_imports("configs", path.read_text()) == []


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("losses", "import ranktuner_jax.models"),
        ("losses", "def f():\n  from ranktuner_jax import train"),
        ("models", "from ranktuner_jax.losses import SFT"),
        ("evals", "from ranktuner_jax import losses, train"),
        ("train", "from . import step"),
    ],
)
def test_a_forbidden_import_is_found(package: str, source: str) -> None:
    assert len(forbidden_imports(package, source)) == 1


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "losses").rglob("*.py")), ids=lambda path: path.name
)
def test_losses_import_jax_numpy_and_the_standard_library_only(path: pathlib.Path) -> None:
    source = without_type_checking(path.read_text())
    roots = {name.split(".")[0] for _, name in imported_names(source)}
    assert roots <= {"jax", "numpy", "ranktuner_jax"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.glob("*/__init__.py")), ids=lambda path: path.parent.name
)
def test_a_package_init_only_re_exports(path: pathlib.Path) -> None:
    for node in ast.parse(path.read_text()).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        is_import = isinstance(node, ast.Import | ast.ImportFrom)
        assert is_docstring or is_all or is_import, ast.unparse(node)


def test_importing_the_losses_loads_nothing_heavy() -> None:
    code = "import sys; from ranktuner_jax import losses; print(*sys.modules, sep='\\n')"
    loaded = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    modules = {name.split(".")[0] for name in loaded.split()}
    assert "jax" in modules
    assert not modules & HEAVY
