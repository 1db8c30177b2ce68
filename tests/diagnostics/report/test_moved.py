"""Two audits of the same data, side by side."""

import pathlib
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Browser

from ranktuner_jax.diagnostics import report
from ranktuner_jax.diagnostics.report.phrasing import number, percent
from ranktuner_jax.errors import UserError
from tests.diagnostics.report import audits
from tests.diagnostics.report.test_browser import CONTRAST, opened

Columns = dict[str, np.ndarray]
AuditFolder = tuple[pathlib.Path, Columns]


def raised(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Another model: most labels more likely than before, some less."""
    logits = logits.copy()
    change = np.random.default_rng(11).normal(0.8, 1.2, len(labels))
    logits[np.arange(len(labels)), labels] += change
    return logits


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory) -> AuditFolder:
    folder = tmp_path_factory.mktemp("audit") / "after"
    columns = audits.write_audit(folder, logits_of=raised)
    # Other row groups than before: the rows are matched, not the groups.
    table = pq.read_table(folder / "tokens.parquet")
    pq.write_table(table, folder / "tokens.parquet", row_group_size=171)
    return folder, columns


@pytest.fixture(scope="module")
def moved(
    audit: AuditFolder, after: AuditFolder, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    path = tmp_path_factory.mktemp("moved") / "moved.html"
    return report.write_moved_report(audit[0], after[0], path)


def words(path: pathlib.Path) -> str:
    return re.sub(r"<(script|style).*?</\1>", "", path.read_text("utf-8"), flags=re.DOTALL)


def test_the_words_say_what_moved(
    audit: AuditFolder, after: AuditFolder, moved: pathlib.Path
) -> None:
    nll = [columns["nll"].astype(np.float64) for _, columns in (audit, after)]
    change = nll[1] - nll[0]
    text = words(moved)
    assert f"The mean nll fell by {number(-change.mean())} nats" in text
    fell, rose = percent(float(np.mean(change < -0.1))), percent(float(np.mean(change > 0.1)))
    assert f"The nll of {fell} of the 960 tokens fell by more than 0.1 nats" in text
    assert f"that of {rose} rose by more" in text
    first = [percent(float(np.mean(columns["rank"] == 1))) for _, columns in (audit, after)]
    assert f"first choice for {first[1]} of the tokens; before, for {first[0]}." in text


def test_the_tokens_that_moved_most_are_listed_first(
    audit: AuditFolder, after: AuditFolder, moved: pathlib.Path
) -> None:
    change = after[1]["nll"].astype(np.float64) - audit[1]["nll"]
    shown = re.findall(r"<td>([−+][\d.]+)</td><td>(\d+):(\d+)</td>", words(moved))
    for order, listed in ((np.argsort(change), shown[:15]), (np.argsort(-change), shown[15:])):
        for row, (value, conversation, position) in zip(order[:15], listed, strict=True):
            assert int(conversation) == audit[1]["conversation"][row]
            assert int(position) == audit[1]["position"][row]
            assert value == f"{change[row]:+.2f}".replace("-", "−")


def test_token_types_are_ranked_by_what_they_moved_in_total(
    audit: AuditFolder, after: AuditFolder, moved: pathlib.Path
) -> None:
    change = after[1]["nll"].astype(np.float64) - audit[1]["nll"]
    ids = audit[1]["token_id"]
    total, count = np.bincount(ids, weights=change), np.bincount(ids)
    best = int(np.argmin(np.where(count >= 5, total, np.inf)))
    first = re.search(r"by the sum over all.*?<tbody>\s*<tr>(.*?)</tr>", words(moved), re.DOTALL)
    assert first is not None
    cells = re.findall(r"<td>(.*?)</td>", first[1])
    mean = f"{total[best] / count[best]:+.3f}".replace("-", "−")
    assert cells == [str(count[best]), f"{total[best]:+.2f}".replace("-", "−"), mean]


def test_an_audit_against_itself_moves_nothing(audit: AuditFolder, tmp_path: pathlib.Path) -> None:
    text = words(report.write_moved_report(audit[0], audit[0], tmp_path / "same.html"))
    assert "The mean nll did not change." in text
    assert "100\u00a0% stayed where they were" in text
    assert not re.search(r"<td>[−+]\d+\.\d\d</td><td>\d+:\d+</td>", text)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_is_drawn_fits_and_has_contrast(
    browser: Browser, moved: pathlib.Path, width: int, scheme: str
) -> None:
    with opened(browser, moved, width, scheme) as shown:
        assert shown.locator("figure svg").count() == 2
        assert shown.evaluate("document.documentElement.scrollWidth") == width
        lowest = shown.evaluate(CONTRAST)
        assert lowest[0][0] >= 4.5, lowest


def test_audits_of_other_numbers_of_tokens_are_refused(
    audit: AuditFolder, tmp_path: pathlib.Path
) -> None:
    audits.cut_audit(audit[0], tmp_path, 120)
    with pytest.raises(UserError, match="got 120 tokens in place of 960; audit the same data"):
        report.write_moved_report(audit[0], tmp_path, tmp_path / "moved.html")
    assert not (tmp_path / "moved.html").exists()


def test_audits_of_other_tokens_are_refused_with_the_first_place(
    audit: AuditFolder, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(audit[0], tmp_path / "other")
    table = pq.read_table(audit[0] / "tokens.parquet")
    ids = table["token_id"].to_numpy().copy()
    there = ids[45]
    ids[45] = (there + 1) % 97
    index = table.schema.get_field_index("token_id")
    pq.write_table(
        table.set_column(index, "token_id", [ids]), tmp_path / "other" / "tokens.parquet"
    )
    with pytest.raises(
        UserError, match=rf"token_id {ids[45]} in place of {there} \(conversation 1, position 10\)"
    ):
        report.write_moved_report(audit[0], tmp_path / "other", tmp_path / "moved.html")
