"""A part of `ranktuner bench gpu` for the tests: it needs no JAX, and waits where it is told to."""

import os
import pathlib
import time
from collections.abc import Iterator

from ranktuner_jax.bench.gpu.case import Case


def cases(small: bool) -> Iterator[Case]:
    print("What a library prints is not a record.")
    for name in ("one", "two"):
        yield Case("the tests' part", name, "float32", lambda: {"median_s": 0.5, "small": small})
        while (wait := os.environ.get("WAIT_FOR")) and not pathlib.Path(wait).exists():
            time.sleep(0.05)
