"""What the sampler frees goes back to the operating system."""

import subprocess
import sys

import pytest

_MOVES = """
import resource

import jax.numpy as jnp

from ranktuner_jax.evals import decoding
from ranktuner_jax.models import Cache


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cache(length):
    slots = jnp.zeros((8, length), jnp.int32)
    keys = [jnp.ones((8, 2, 64, length)) for _ in range(8)]
    values = [jnp.ones((8, 2, length, 64)) for _ in range(8)]
    return Cache(tuple(keys), tuple(values), slots, slots, jnp.int32(0))


lengths = [256, 512, 768, 1024]
rows = decoding.Rows(cache(lengths[-1]), *[None] * 5)
size = sum(x.nbytes for x in rows.cache.keys + rows.cache.values)
before = peak()
for length in 2 * lengths:
    rows = decoding.move(rows, 0, length=length, mesh=None)
print((peak() - before) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries give pages back themselves")
def test_a_cache_of_changing_length_takes_hardly_more_than_its_largest() -> None:
    # In a process of its own, whose peak is that of the moves.
    done = subprocess.run(
        [sys.executable, "-c", _MOVES], check=True, capture_output=True, text=True
    )
    # Before there was one cache. Eight moves took two more of them where glibc kept their arrays.
    assert float(done.stdout) < 0.5
