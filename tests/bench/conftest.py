"""The tiny model and data of the training tests, for benchmarks that need a whole run."""

from tests.train.conftest import (  # noqa: F401 (fixtures)
    cache,
    sums,
    tiny_config,
    tiny_config_file,
    tiny_model,
)
