"""The package that generates data sets is imported quietly, or named."""

import pathlib
import sys

import pytest

from ranktuner_jax.data.generator import import_reasoning_gym
from ranktuner_jax.errors import UserError


def test_warnings_of_its_code_are_not_the_users(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.joinpath("reasoning_gym.py").write_text("def f():\n    assert (1, 'always true')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)  # Put back afterwards.
    del sys.modules["reasoning_gym"]
    # Compiled here for the first time; pytest turns a warning into an error.
    module = import_reasoning_gym("a test")
    assert module.__file__ == str(tmp_path / "reasoning_gym.py")


def test_what_needs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match="ranktuner lab: expected the package reasoning-gym, got"):
        import_reasoning_gym("ranktuner lab")
