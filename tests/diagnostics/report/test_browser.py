"""The pages in a real browser: nothing fails, nothing is fetched, everybody can read them."""

import contextlib
import pathlib
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Dialog, Page

from tests.diagnostics.report import audits

# The lowest contrast of a text element with what is behind it, and its text. Backgrounds that are
# transparent show what is under them.
CONTRAST = """() => {
  const channel = (c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if ((color[3] ?? 1) === 1) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    if (element.closest("svg, script, .skip") || !element.checkVisibility()) continue;
    if (![...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    const [a, b] = [light(parse(getComputedStyle(element).color)), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([ratio, element.textContent.slice(0, 40)]);
  }
  const paper = light(behind(document.body));
  for (const element of document.querySelectorAll("svg text")) {
    if (!element.textContent.trim() || element.closest(".mark-text.role-mark")) continue;
    const a = light(parse(getComputedStyle(element).fill));
    found.push([(Math.max(a, paper) + 0.05) / (Math.min(a, paper) + 0.05), element.textContent]);
  }
  return found.sort((x, y) => x[0] - y[0]).slice(0, 3);
}"""


@contextlib.contextmanager
def opened(
    browser: Browser, path: pathlib.Path, width: int = 1400, scheme: str = "light"
) -> Iterator[Page]:
    """The drawn page; fails if the console, a dialog or the network was used."""
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme="dark" if scheme == "dark" else "light",
        has_touch=width < 500,
    )
    page = context.new_page()
    said: list[str] = []

    def refuse(dialog: Dialog) -> None:
        said.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("request", lambda request: said.append(f"request: {request.url}"))
    page.on("dialog", refuse)
    page.goto(path.as_uri())
    page.wait_for_function("document.documentElement.dataset.drawn", timeout=60_000)
    yield page
    assert said == [f"request: {path.as_uri()}"]
    context.close()


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_drawn_fits_and_has_contrast(
    browser: Browser, page: pathlib.Path, width: int, scheme: str
) -> None:
    with opened(browser, page, width, scheme) as shown:
        figures = shown.locator("figure svg")
        assert figures.count() == shown.locator("figure").count() == 10
        for box in (figure.bounding_box() for figure in figures.all()):
            assert box is not None
            assert box["width"] > 0.7 * min(width - 48, 400)
            assert box["x"] + box["width"] <= width
        assert shown.evaluate("document.documentElement.scrollWidth") == width
        assert shown.evaluate("document.documentElement.dataset.theme") == scheme
        for colour in ("I, relative rank", "weight: RankTuner w=1"):
            shown.locator("#colour").select_option(colour)
            lowest = shown.evaluate(CONTRAST)
            assert lowest[0][0] >= 4.5, lowest


def test_text_of_the_data_is_shown_as_text(browser: Browser, page: pathlib.Path) -> None:
    with opened(browser, page) as shown:
        assert audits.HOSTILE in shown.locator("#conversation").inner_text()
        assert (
            shown.locator("#conversation script, #conversation img, td script, td img").count() == 0
        )


def test_a_token_is_reached_and_read_with_the_keyboard(
    browser: Browser, page: pathlib.Path
) -> None:
    with opened(browser, page) as shown:
        shown.locator("#colour").focus()
        before = shown.locator("#conversation .picked").get_attribute("class")
        shown.keyboard.press("ArrowDown")  # From I to the first method, SFT: all weights are equal.
        assert shown.locator("#colour").input_value() == "weight: SFT"
        classes = shown.locator("#conversation .t").evaluate_all(
            "all => all.map(t => t.classList[1])"
        )
        assert set(classes) == {"c4"}
        assert before is not None
        shown.keyboard.press("Tab")
        assert shown.evaluate("document.activeElement.dataset.i") == "5"
        shown.keyboard.press("ArrowRight")
        shown.keyboard.press("ArrowRight")
        assert shown.evaluate("document.activeElement.dataset.i") == "7"
        numbers = shown.locator("#numbers")
        assert "at position 7" in numbers.inner_text()
        assert numbers.locator("table").nth(2).locator("tbody tr").count() == 5
        assert numbers.locator("table").nth(3).locator("tbody tr").count() == len(audits.METHODS)


def test_hover_and_tap_show_the_numbers_of_a_token(browser: Browser, page: pathlib.Path) -> None:
    with opened(browser, page) as shown:
        shown.locator("#conversation .t").nth(11).hover()
        assert "at position 16" in shown.locator("#numbers").inner_text()
    with opened(browser, page, width=390) as shown:
        shown.locator("#conversation .t").nth(3).tap()
        assert "at position 8" in shown.locator("#numbers").inner_text()


def test_conversations_methods_and_themes_are_switched(
    browser: Browser, page: pathlib.Path
) -> None:
    with opened(browser, page) as shown:
        assert shown.locator("#which option").count() == 20
        first = shown.locator("#conversation").inner_text()
        shown.get_by_label("Next conversation").press("Enter")
        assert shown.locator("#conversation").inner_text() != first
        shown.get_by_label("Previous conversation").press("Enter")
        assert shown.locator("#conversation").inner_text() == first
        visible = shown.locator(".choice:visible table").first
        before = visible.inner_text()
        shown.locator(".switched select").select_option("EAFT")
        assert shown.locator(".choice:visible").count() == 1
        assert shown.locator(".choice:visible table").first.inner_text() != before
        shown.locator("#theme").press("Enter")
        assert shown.evaluate("document.documentElement.dataset.theme") == "dark"
        assert (
            shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 29)"
        )
        shown.wait_for_function(
            "document.querySelector('figure svg text').getAttribute('fill') === '#a3acb7'"
        )


def test_a_cell_of_a_figure_says_its_numbers(browser: Browser, page: pathlib.Path) -> None:
    with opened(browser, page) as shown:
        shown.locator("figure").first.locator(".mark-rect.role-mark path").last.hover()
        shown.locator("#vg-tooltip-element").wait_for(state="visible")
        assert "of these in the Noise Region" in shown.locator("#vg-tooltip-element").inner_text()
