"""The sums behind the report, against NumPy over all rows at once."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from ranktuner_jax import losses
from ranktuner_jax.diagnostics.report import aggregates
from ranktuner_jax.diagnostics.report.aggregates import Aggregates
from ranktuner_jax.diagnostics.report.audit_charts import noise_limit
from ranktuner_jax.diagnostics.report.audited import open_audit
from tests.diagnostics.report import audits

Columns = dict[str, np.ndarray]
AuditFolder = tuple[pathlib.Path, Columns]


@pytest.fixture(scope="module")
def sums(audit: AuditFolder) -> Aggregates:
    return aggregates.aggregate(open_audit(audit[0]))


def weights(columns: Columns, method: str) -> np.ndarray:
    return columns[f"weight/{method}"].astype(np.float64)


def test_the_effective_share_is_that_of_all_rows(audit: AuditFolder, sums: Aggregates) -> None:
    for method, share in zip(sums.methods, sums.effective_share(), strict=True):
        w = weights(audit[1], method)
        np.testing.assert_allclose(share, w.sum() ** 2 / (len(w) * (w**2).sum()), rtol=1e-12)


def test_each_token_is_in_one_quadrant_with_its_weight(
    audit: AuditFolder, sums: Aggregates
) -> None:
    columns = audit[1]
    prob, bits = columns["prob"], columns["entropy"].astype(np.float64) / np.log(2)
    inside = [
        (prob >= 0.5) & (bits < 2),
        (prob < 0.5) & (bits < 2),
        (prob < 0.5) & (bits >= 2),
        (prob >= 0.5) & (bits >= 2),
    ]
    assert sums.regions[:4].tolist() == [here.sum() for here in inside]
    assert sums.regions[:4].sum() == sums.tokens == len(prob)
    for row, method in enumerate(sums.methods):
        expected = [weights(columns, method)[here].sum() for here in inside]
        np.testing.assert_allclose(sums.regions_weight[row, :4], expected, rtol=1e-12)


def test_the_noise_region_is_that_of_the_training_metrics() -> None:
    rng = np.random.default_rng(3)
    logits = jnp.asarray(rng.normal(size=(400, 61)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 61, 400))
    stats = losses.token_stats(logits, labels, ["expected_rank"])
    ours = aggregates.in_noise_region(
        np.asarray(stats.rank), np.asarray(losses.relative_rank(stats))
    )
    metrics = losses.weighted_nll(logits, labels, weighting=losses.RankTuner(scale="exact")).metrics
    assert 0 < ours.sum() == int(metrics["noise_region"]) < 400


def test_no_token_of_the_noise_region_is_beyond_the_line_that_bounds_it(
    audit: AuditFolder,
) -> None:
    columns = audit[1]
    noise = aggregates.in_noise_region(columns["rank"], columns["relative_rank"])
    limit = noise_limit(columns["entropy"].astype(np.float64))
    assert noise.sum() > 50
    assert np.all(columns["prob"][noise] <= limit[noise] * (1 + 1e-5))
    # Nor is the line looser than it must be: with R = 1/p and E[R] = s(H), I is 1.05 on it.
    entropy = np.linspace(2.5, 9, 30)
    rank, bound = 1 / noise_limit(entropy), np.exp(entropy) / 4 + 1
    indicator = 2 ** (1 / np.log2(rank + 1) - 1 / np.log2(bound + 1))
    np.testing.assert_allclose(indicator, 1.05, rtol=1e-12)


def test_tenths_of_well_separated_values_are_exact(rng: np.random.Generator) -> None:
    nll = rng.permutation(2.0 ** (np.arange(-100, 100) / 8))
    mass = rng.uniform(size=(3, 200))
    keys = aggregates.float_keys(nll)
    size = keys.max() + 1
    by_key = np.stack([np.bincount(keys, weights=one, minlength=size) for one in mass])
    count = np.bincount(keys, weights=np.ones(200), minlength=size)
    shares = aggregates.tenths(1.0 * count, 1.0 * by_key)
    expected = mass[:, np.argsort(nll)].reshape(3, 10, 20).sum(2)
    np.testing.assert_allclose(shares, expected / mass.sum(1, keepdims=True), rtol=1e-9)


def test_deciles_of_p_begin_with_the_lowest(audit: AuditFolder, sums: Aggregates) -> None:
    columns = audit[1]
    order = np.argsort(columns["prob"], kind="stable")
    for row, method in enumerate(sums.methods):
        mass = weights(columns, method)[order] * columns["nll"][order]
        expected = mass.reshape(10, -1).sum(1) / mass.sum()
        # A key holds values within 1/256, so a border moves by the tokens in one key.
        largest = np.bincount(aggregates.float_keys(columns["nll"])).max()
        slack = 2 * largest * mass.max() / mass.sum()
        np.testing.assert_allclose(sums.deciles("p")[row], expected, atol=slack)
    assert sums.deciles("p")[sums.methods.index("sft"), 0] > 0.2


def test_quantiles_are_within_one_key(audit: AuditFolder, sums: Aggregates) -> None:
    for method in ("dft", "ranktuner_one", "profit"):
        exact = np.quantile(weights(audit[1], method), 0.5, method="inverted_cdf")
        np.testing.assert_allclose(sums.quantile(method, 0.5), exact, rtol=1 / 128)


def test_extremes_are_those_of_a_full_sort(audit: AuditFolder, sums: Aggregates) -> None:
    columns = audit[1]
    for method in ("ranktuner", "profit", "sft"):
        w = weights(columns, method)
        for found, order in (
            (sums.heaviest(method), np.lexsort((-columns["nll"], -w))),
            (sums.lightest(method), np.lexsort((-columns["nll"], w))),
        ):
            rows = order[: len(found)]
            assert len(found) == 10
            expected = list(
                zip(columns["conversation"][rows], columns["position"][rows], strict=True)
            )
            assert [(one.conversation, one.position) for one in found] == expected


def test_the_context_of_a_token_stays_in_its_conversation(sums: Aggregates) -> None:
    for one in sums.heaviest("ranktuner_one"):
        # Positions begin at 5, and texts of neighbours are never empty.
        assert (one.before == "") == (one.position == 5)


def test_token_types_are_counted_with_their_weights(audit: AuditFolder, sums: Aggregates) -> None:
    columns = audit[1]
    ids = columns["token_id"]
    np.testing.assert_array_equal(sums.type_count, np.bincount(ids, minlength=97))
    row = sums.methods.index("eaft")
    expected = np.bincount(ids, weights=weights(columns, "eaft"), minlength=97)
    np.testing.assert_allclose(sums.type_weight[row], expected, rtol=1e-12)


def test_sources_and_positions_divide_the_loss(audit: AuditFolder, sums: Aggregates) -> None:
    columns = audit[1]
    mass = weights(columns, "ranktuner") * columns["nll"]
    row = sums.methods.index("ranktuner")
    for name, value in sums.by_source_mass.items():
        np.testing.assert_allclose(value[row], mass[columns["source"] == name].sum(), rtol=1e-6)
    low = columns["position"] < 32
    np.testing.assert_allclose(sums.by_position_mass[row, 0], mass[low].sum(), rtol=1e-6)
    np.testing.assert_allclose(sums.by_position_mass[row, 1], mass[~low].sum(), rtol=1e-6)


def test_rank_correlation_of_two_methods(audit: AuditFolder, sums: Aggregates) -> None:
    names, values, sample = sums.correlation()
    assert sample == sums.tokens
    assert "sft" not in names
    ranks = [
        np.argsort(np.argsort(weights(audit[1], method)))
        for method in ("dft", "ranktuner_one_exact")
    ]
    expected = np.asarray(np.corrcoef(ranks))[0, 1]
    found = values[names.index("dft"), names.index("ranktuner_one_exact")]
    np.testing.assert_allclose(found, expected, atol=1e-4)  # Few ties, in no fixed order.


def test_small_batches_give_the_same_sums(audit: AuditFolder, sums: Aggregates) -> None:
    opened = open_audit(audit[0])
    small = Aggregates(sums.methods, sums.vocab_size, sums.stride)
    columns = [*aggregates._STATISTICS, *(f"weight/{method}" for method in sums.methods)]
    for batch in opened.batches(columns, rows=37):
        small.add(batch)
    for name, value in vars(sums).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_allclose(getattr(small, name), value, rtol=1e-12, err_msg=name)
    for method in sums.methods:
        for one, other in zip(small.heaviest(method), sums.heaviest(method), strict=True):
            assert (one.conversation, one.position) == (other.conversation, other.position)


def test_tokens_without_a_finite_nll_are_left_out(
    audit: AuditFolder, tmp_path: pathlib.Path
) -> None:
    audits.cut_audit(audit[0], tmp_path, 80)
    table = pq.read_table(tmp_path / "tokens.parquet")
    nll = table["nll"].to_numpy().copy()
    nll[7] = np.inf
    index = table.schema.get_field_index("nll")
    pq.write_table(table.set_column(index, "nll", [nll]), tmp_path / "tokens.parquet")
    sums = aggregates.aggregate(open_audit(tmp_path))
    assert (sums.tokens, sums.left_out) == (79, 1)
    assert np.isfinite(sums.mass).all()
