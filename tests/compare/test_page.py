"""report.html and the tables of a comparison."""

import concurrent.futures
import dataclasses
import html
import io
import json
import math
import pathlib
import re
import shutil
from collections.abc import Callable

import pytest
import rich.console
from playwright.sync_api import Browser, sync_playwright

from ranktuner_jax.compare.analysis import analyse
from ranktuner_jax.compare.outcome import Outcome
from ranktuner_jax.compare.page import write_compare_report
from ranktuner_jax.compare.sentences import primary
from ranktuner_jax.compare.tables import p_text, show, tables
from ranktuner_jax.errors import UserError
from tests.compare.results import HOSTILE, PRIMARY, comparison, outcome, write_results
from tests.diagnostics.report.test_browser import CONTRAST, opened

RANKTUNER = "RankTuner base=one scale=exact"


def written(folder: pathlib.Path, runs: list[Outcome]) -> pathlib.Path:
    return write_compare_report(write_results(folder, runs))


def words(path: pathlib.Path) -> str:
    text = path.read_text("utf-8").replace("\u00a0", " ")
    return html.unescape(re.sub(r"<(script|style).*?</\1>", "", text, flags=re.DOTALL))


def specs(path: pathlib.Path) -> list[str]:
    return re.findall(r'class="spec">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return written(tmp_path_factory.mktemp("compared") / "whole", comparison())


def test_the_words_and_tables_carry_the_numbers_of_the_runs(page: pathlib.Path) -> None:
    text, analysis = words(page), analyse(comparison(), primary=PRIMARY)
    sft, dft, best = analysis.groups["tokens"]
    difference = best.measured[PRIMARY].difference
    assert difference is not None
    assert difference.low is not None
    assert difference.high is not None
    shown = (
        f"{100 * difference.value:+.1f} points "
        f"({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
    )
    assert f"{RANKTUNER} is better than SFT: {shown}; p < 0.001, adjusted." in text
    assert f"{shown}</td>" in text
    assert f"No difference from SFT is seen for DFT: {'−' if dft.p else ''}" in text
    assert f"p = {p_text(dft.p_holm)}, adjusted. A gain of up to" in text
    mean = sft.measured[PRIMARY].mean
    assert f"Of {PRIMARY}, SFT has {100 * mean.value:.1f} % (" in text
    assert "the mean over 5 seeds; before training the model has 5 %." in text
    assert "All 5 seeds answer the same 120 questions: intervals are over both" in text
    assert "for 2 tests, 1 stays under 0.05" in text
    assert "Plain NLL, nats: SFT has 1.7 (" in text
    assert "It favours SFT, which minimises it." in text
    assert "The p-value of the only method needs no adjustment." in text  # Divided by weights.
    assert "DFT is worse than SFT: −" in text
    assert 'before.nll</td><td class="text">3.2</td>' in text


def test_every_section_has_words_and_figures_show_what_the_runs_gave(page: pathlib.Path) -> None:
    sections = re.findall(r"<section.*?</section>", page.read_text("utf-8"), re.DOTALL)
    assert len(sections) == 4 + 4 + 3
    for section in sections:
        found = re.search(r'class="words">(.*?)</div>', section, re.DOTALL)
        assert found is not None
        assert "<p>" in found[1], section[:90]
    first = json.loads(specs(page)[0])
    rows = [row for rows in first["datasets"].values() for row in rows]
    seeds = [row for row in rows if "seed" in row and row["method"] == RANKTUNER]
    best = analyse(comparison(), primary=PRIMARY).groups["tokens"][-1].measured[PRIMARY].difference
    assert best is not None
    assert [row["value"] for row in seeds] == pytest.approx(
        [100 * value for value in best.by_seed.values()], rel=1e-3
    )
    # Eight others differ; all methods need the same memory.
    assert len(specs(page)) == 2 * (1 + 8) + 2
    assert not any("memory" in spec for spec in specs(page))


def test_the_search_marks_what_was_chosen_and_says_where_a_grid_ends(
    page: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    assert "DFT takes 0.0003, with " in words(page)
    assert "No chosen rate lies at an end of the grid." in words(page)
    runs = [
        dataclasses.replace(run, rate=1e-3) if (run.method, run.role) == ("dft", "main") else run
        for run in comparison(range(2), weights=False)
    ]
    edge = written(tmp_path / "edge", runs)
    assert "For DFT (0.001) the rate lies at an end of the grid" in words(edge)
    rows = [row for rows in json.loads(specs(edge)[-1])["datasets"].values() for row in rows]
    chosen = {row["method"]: (row["rate"], row["which"]) for row in rows if row["chosen"]}
    assert chosen["DFT"] == (0.001, "chosen, at an end of the grid")
    assert chosen["SFT"] == (0.0003, "chosen")


def test_one_seed_says_what_it_cannot_tell(tmp_path: pathlib.Path) -> None:
    text = words(written(tmp_path / "one", comparison([0], weights=False, searched=False)))
    assert "There is one seed: intervals are over its 120 questions only, not over runs." in text
    assert f"{RANKTUNER} minus SFT is +" in text
    assert "with one seed, too few to tell them apart." in text
    assert "There are no p-values" in text
    assert "better" not in text
    assert "no difference seen" not in text
    assert "<h2>Learning rates</h2>" not in text
    assert not {"None", "nan"} & set(re.split(r"\W+", text))


def test_seeds_that_a_method_lacks_are_counted(tmp_path: pathlib.Path) -> None:
    runs = [run for run in comparison() if (run.method, run.seed) not in {("dft", 0), ("dft", 1)}]
    runs += [outcome("dft", 9, 0.4)]
    text = words(written(tmp_path / "unfinished", runs))
    assert "It rests on the 3 of 6 seeds that both have." in text
    assert "<td>4 (3 paired)</td>" in text


def test_an_interval_that_only_the_adjustment_takes_back_is_said_so() -> None:
    analysis = analyse(comparison(weights=False), primary=PRIMARY)
    sft, dft, best = analysis.groups["tokens"]
    groups = {"tokens": [sft, dft, dataclasses.replace(best, p=0.03, p_holm=0.06)]}
    text = "\n".join(primary(dataclasses.replace(analysis, groups=groups), "tokens", {}))
    assert f"The interval of {RANKTUNER} leaves 0 out" in text
    assert "but not after the adjustment for 2 methods: p = 0.060, adjusted." in text
    assert "better" not in text


def test_a_score_without_any_difference_is_drawn_with_its_interval(tmp_path: pathlib.Path) -> None:
    runs = comparison(range(2), weights=False, searched=False)
    same = [dataclasses.replace(run, scores={PRIMARY: (0.0,) * 40}) for run in runs]
    path = written(tmp_path / "same", same)
    assert "No difference from SFT is seen for DFT: +0.0 points (−" in words(path)
    assert "p = 1.000, adjusted." in words(path)
    assert f"Difference from SFT by method, {PRIMARY}" in specs(path)[0]


def test_a_run_that_diverged_is_left_out_and_named(tmp_path: pathlib.Path) -> None:
    runs = comparison(range(3), weights=False)
    lost = next(run for run in runs if (run.method, run.seed) == ("dft", 1))
    runs[runs.index(lost)] = dataclasses.replace(lost, metrics={**lost.metrics, "nll": math.inf})
    path = written(tmp_path / "lost", runs)
    assert "DFT has a finite value for 2 of 3 seeds." in words(path)
    for spec in specs(path):
        json.loads(spec, parse_constant=pytest.fail)


def test_methods_alone_and_methods_without_a_pair_have_a_page(tmp_path: pathlib.Path) -> None:
    alone = words(written(tmp_path / "alone", [outcome("sft", seed, 0.4) for seed in range(3)]))
    assert "There are no p-values" in alone
    unpaired = [outcome("sft", 0, 0.4), outcome("dft", 1, 0.4)]
    assert "DFT shares no seed with SFT, and is not compared." in words(
        written(tmp_path / "unpaired", unpaired)
    )


def test_hostile_text_is_text_and_nothing_outside_is_referred_to(page: pathlib.Path) -> None:
    source = page.read_text("utf-8")
    assert "<script>alert(" not in source
    assert "<img src=x" not in source
    assert f"tiny on {HOSTILE}, each method" in words(page)
    outside = re.sub(r"<(script|style).*?</\1>", "", source, flags=re.DOTALL)
    addresses = re.findall(r'<[^>]*(?:src|href)="([^"]*)"', outside)
    assert len(addresses) > 10
    assert all(address == "data:," or address.startswith("#") for address in addresses)
    assert page.stat().st_size <= 3_000_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected the folder of a finished ranktuner compare, got none (FileNotFoundError"),
        ("{", "got none (JSONDecodeError"),
        ("[]", "got none (TypeError"),
        ('{"settings": {}, "tables": []}', "got none (KeyError: 'outcomes'"),
        ('{"settings": {"primary": "x"}, "outcomes": [{"method": "sft"}]}', "got none (KeyError"),
        ('{"settings": {"primary": "x"}, "outcomes": [1]}', "got none (TypeError"),
        (
            '{"settings": {"primary": "x", "baseline": "sft"}, "outcomes": []}',
            "expected runs of sft",
        ),
    ],
)
def test_a_foreign_result_is_one_line(
    content: str | None, message: str, tmp_path: pathlib.Path
) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        write_compare_report(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_the_terminal_gets_every_method_and_measure_of_both_analyses() -> None:
    analysis = analyse(comparison(), primary=PRIMARY)
    to = io.StringIO()
    show(analysis, rich.console.Console(file=to))
    text = to.getvalue().replace("\u00a0", " ")
    captions = " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 128
    for group in ("tokens", "weights"):
        for table in tables(analysis, group):
            for row in table.rows:
                for cell in row:
                    for part in str(cell).replace("\u00a0", " ").split(" ("):
                        assert part in text
    assert captions.count("favours SFT, which minimises") == 2
    assert captions.count("intervals are over both") == 2
    assert "Loss divided by the sum of the weights" in text


def in_browser(check: Callable[[Browser], None]) -> None:
    """Runs a check with a headless Chromium, in a thread of its own.

    Playwright runs once in a thread, and the browser of other tests may be running in this one.
    """
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"needs a Chromium: none of {', '.join(names)} is installed")

    def run() -> None:
        with sync_playwright() as playwright:
            switches = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
            started = playwright.chromium.launch(executable_path=path, args=switches)
            check(started)
            started.close()

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        thread.submit(run).result()


def test_the_page_is_drawn_fits_and_has_contrast(page: pathlib.Path) -> None:
    def check(browser: Browser) -> None:
        for width, scheme in ((390, "dark"), (1400, "light")):
            with opened(browser, page, width, scheme) as shown:
                figures = shown.locator("figure svg")
                assert figures.count() == shown.locator("figure").count() == 20
                for box in (figure.bounding_box() for figure in figures.all()):
                    assert box is not None
                    assert box["width"] > 0.7 * min(width - 48, 400)
                    assert box["x"] + box["width"] <= width
                assert shown.evaluate("document.documentElement.scrollWidth") == width
                lowest = shown.evaluate(CONTRAST)
                assert lowest[0][0] >= 4.5, lowest

    in_browser(check)


def test_one_seed_is_drawn_without_a_warning(tmp_path: pathlib.Path) -> None:
    def check(browser: Browser) -> None:
        with opened(browser, written(tmp_path / "one", comparison([0]))) as shown:
            assert shown.locator("figure svg").count() == shown.locator("figure").count() > 10

    in_browser(check)
