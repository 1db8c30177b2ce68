"""A part of `ranktuner bench gpu` for the tests, whose first case is wrong."""

from collections.abc import Iterator

from ranktuner_jax.bench.gpu.case import Case


def cases(small: bool) -> Iterator[Case]:
    for name, error in (("sums", float("nan")), ("products", 0.5)):
        figures = {"error": error, "allowed": 1.0}
        yield Case("the tests' wrong part", name, "", figures.copy)
