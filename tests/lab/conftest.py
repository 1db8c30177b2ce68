"""Small laboratories, each written once."""

import functools
import pathlib
from collections.abc import Callable, Iterator

import pytest

from ranktuner_jax import cli

MakeLab = Callable[..., pathlib.Path]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKTUNER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def make_lab(tmp_path_factory: pytest.TempPathFactory) -> MakeLab:
    """Writes a laboratory with the given axes, from the command line; the same one only once."""

    @functools.cache
    def write(copy: int, **axes: float) -> pathlib.Path:
        folder = tmp_path_factory.mktemp("lab") / f"lab{copy}"
        sizes = {"rows": 120, "questions": 30, "pretrain_rows": 800}
        arguments = [f"--{name}={value}" for name, value in {**sizes, **axes}.items()]
        assert cli.main(["lab", f"--output={folder}", *arguments]) == 0
        return folder

    def make(*, copy: int = 0, **axes: float) -> pathlib.Path:
        return write(copy, **{name: axes[name] for name in sorted(axes) if axes[name]})

    return make
