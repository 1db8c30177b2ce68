"""The pages as Sphinx builds them, the notebook, and the figure that is drawn from the code."""

import importlib
import importlib.util
import inspect
import json
import os
import pathlib
import subprocess
import warnings
from types import ModuleType

import numpy as np
import PIL.Image
import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_sphinx_builds_every_page_without_a_warning_and_the_api_has_every_public_name(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from sphinx.cmd.build import main

    command = ["--quiet", "--fail-on-warning", "--conf-dir", str(DOCS)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Those of Sphinx's extensions; ours it reports itself.
        code = main(
            [*command, "--doctree-dir", str(tmp_path / "doctrees"), str(ROOT), str(tmp_path)]
        )
    assert code == 0, capfd.readouterr().err
    for page in [*DOCS.glob("*.md"), *DOCS.glob("*.ipynb"), *DOCS.glob("api/*.md")]:
        assert (tmp_path / page.relative_to(ROOT)).with_suffix(".html").exists()
    for page in DOCS.glob("api/*.md"):
        name = page.read_text().splitlines()[0].removeprefix("# ")
        html = (tmp_path / page.relative_to(ROOT)).with_suffix(".html").read_text()
        for public in getattr(importlib.import_module(name), "__all__", ()):
            value = getattr(importlib.import_module(name), public)
            if inspect.isclass(value) or inspect.isroutine(value):  # Others have no docstring.
                assert f'id="{name}.{public}"' in html, (name, public)


def test_the_script_builds_as_the_test_does() -> None:
    ran = subprocess.run(
        [ROOT / "launch/docs.sh", "--dry-run", "--fresh-env"],
        env=os.environ | {"PORT": "8001"},
        capture_output=True,
        text=True,
        check=True,
    )
    build, serve = ran.stdout.splitlines()[-2:]
    assert "sphinx-build --quiet --fail-on-warning --conf-dir docs" in build
    assert build.rstrip().endswith(". build/docs --fresh-env")
    assert serve.rstrip().endswith("--directory build/docs 8001")


def test_the_notebook_runs_and_shows_what_its_text_says() -> None:
    cells = json.loads((DOCS / "notebook.ipynb").read_text())["cells"]
    names: dict[str, object] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            assert cell["outputs"] or "import" in cell["source"][0]  # Those in the file are shown.
    wrong, weights = names["wrong"], names["weights"]
    assert isinstance(wrong, np.ndarray)
    assert isinstance(weights, dict)
    share = {name: weight[wrong].sum() / weight.sum() for name, weight in weights.items()}
    assert share["ranktuner"] < 0.5 * share["sft"]
    assert share["ranktuner_one"] > 1.2 * share["sft"]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """docs/figures.py on a coarse grid."""
    spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PROBS", np.geomspace(0.01, 0.9, 5))
    monkeypatch.setattr(module, "BITS", np.linspace(0.5, 9.5, 6))
    return module


def test_the_figures_predictions_have_the_probability_and_the_entropy_of_their_place(
    figures: ModuleType, tmp_path: pathlib.Path
) -> None:
    prob, bits, logits = figures.predictions()
    assert 10 < len(prob) < 30  # Some of the 30 places cannot occur.
    p = np.exp(logits)
    p /= p.sum(1, keepdims=True)
    np.testing.assert_allclose(p[:, 0], prob, rtol=1e-6)
    entropy = -np.sum(p * np.log2(np.maximum(p, 1e-300)), 1)
    # Between two entries of its table of rates the entropy is interpolated.
    np.testing.assert_allclose(entropy, bits, atol=0.01)

    rows = figures.weights()
    assert len(rows) == len(prob) * len(figures.METHODS)
    assert {row["weight"] for row in rows if row["method"] == "sft"} == {1.0}
    assert all(
        row["weight"] == pytest.approx(row["p"], rel=1e-5) for row in rows if row["method"] == "dft"
    )
    figures.draw(tmp_path / "figure.png")
    with PIL.Image.open(tmp_path / "figure.png") as picture:
        assert picture.width > 600
