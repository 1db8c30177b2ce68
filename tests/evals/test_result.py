"""Numbers that are derived from what an evaluation counts."""

import pytest

from ranktuner_jax.evals import wilson_interval


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (3, 7), (100, 256)])
def test_the_interval_is_where_the_score_test_turns(correct: int, total: int) -> None:
    share = correct / total
    for bound in wilson_interval(correct, total):
        variance = bound * (1 - bound) / total
        assert (share - bound) ** 2 == pytest.approx(1.959964**2 * variance, abs=1e-12)


@pytest.mark.parametrize(("correct", "total"), [(-1, 5), (6, 5), (0, 0)])
def test_an_impossible_share_is_refused(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match="expected 0 <= correct <= total"):
        wilson_interval(correct, total)
