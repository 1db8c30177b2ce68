"""Values of a `DataConfig`."""

import json
from typing import Any

import pytest

from ranktuner_jax.data import DataConfig
from ranktuner_jax.errors import UserError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_bad_row": "ignore"}, "data.on_bad_row: expected one of error, skip, got 'ignore'"),
        ({"too_long": "cut"}, "data.too_long: expected one of error, truncate, drop, got 'cut'"),
        ({"row_length": 1}, "data.row_length: expected at least 2, got 1"),
        ({"prompt_column": "q"}, "expected both or neither, got 'q' and ''"),
        (
            {"mixture": (("a", 0.0),)},
            r"expected pairs \(source, weight above 0\), got \('a', 0.0\)",
        ),
    ],
    ids=["on_bad_row", "too_long", "row_length", "columns", "mixture"],
)
def test_a_value_that_is_not_allowed_is_the_users_mistake(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        DataConfig(**options)


def test_a_mixture_that_was_saved_as_json_is_the_same() -> None:
    config = DataConfig(mixture=(("a", 1.0), ("b", 2.0)))
    assert DataConfig(mixture=json.loads(json.dumps(config.mixture))) == config
