"""Strict dtype promotion, for a silent cast in a loss is a mistake; the forms for accelerators."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_dtypes() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(params=["tpu", "gpu"])
def accelerator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the form for GPUs or TPUs (one tile, shared sums), which CPUs never use."""
    name = "tpu" if request.param == "tpu" else "default"
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *xs, **forms: forms[name](*xs))
