"""Every example runs and learns, and differs from a plain loop in two lines."""

import pathlib
import runpy

import pytest

EXAMPLES = sorted((pathlib.Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_learns(path: pathlib.Path) -> None:
    losses = runpy.run_path(str(path))["main"](steps=40)
    assert len(losses) == 40
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_marks_two_changed_lines(path: pathlib.Path) -> None:
    changed = [line for line in path.read_text().splitlines() if "  # changed: " in line]
    assert len(changed) == 2
    assert changed[0].startswith("from ranktuner_jax.losses import")
    assert "weighted_nll(logits, labels, mask" in changed[1]


def test_there_is_an_example_for_each_kind_of_loop() -> None:
    assert [path.stem for path in EXAMPLES] == ["linen_train_state", "nnx_optimizer", "pmap_loop"]
