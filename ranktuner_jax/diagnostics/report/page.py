"""The page: sections of words, figures and tables in one HTML file that needs no network."""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import markupsafe
import vl_convert

from ranktuner_jax import files

__all__ = ["Figure", "Marked", "Page", "Sample", "Section", "Table", "theme", "write_page"]

_TEMPLATES = pathlib.Path(__file__).parent / "templates"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A chart: a Vega-Lite specification without a theme, and what it shows."""

    caption: str
    spec: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Marked:
    """A table cell: a token in its context."""

    before: str
    marked: str
    after: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A table; `text` are the indices of the columns that hold words and not numbers."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Marked]]
    text: Sequence[int] = (0,)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Texts to read one under another, by what they are."""

    title: str
    texts: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
      title: Its heading.
      words: Paragraphs that stand beside the figures.
      figures: The charts.
      tables: Tables under them.
      wide: The words stand over the figures, which take the whole width.
      switched: Tables of which one group is shown, chosen by `switch_label`.
      reader: Coloured conversations, from `conversations.encode`.
      samples: Texts.
    """

    title: str
    words: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    wide: bool = False
    switch_label: str = ""
    switched: Mapping[str, Sequence[Table]] = dataclasses.field(default_factory=dict)
    reader: Mapping[str, Any] | None = None
    samples: Sequence[Sample] = ()


@dataclasses.dataclass(frozen=True)
class Page:
    """A whole page; `facts` are the numbers at its head."""

    title: str
    lead: str
    facts: Mapping[str, str]
    sections: Sequence[Section]
    footer: str


def write_page(path: os.PathLike[str], page: Page) -> os.PathLike[str]:
    """Writes a page atomically and returns its path."""
    files.write_whole(path, render(page).encode("utf-8", "replace"))
    return path


def render(page: Page) -> str:
    """The HTML of a page. All text is escaped; scripts run only if their hash is in the policy."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    scripts = [_bundle(), (_TEMPLATES / "page.js").read_text()]
    # style-src: Vega sets styles of its elements. data: is the empty icon, which spares a request.
    policy = "; ".join(
        (
            "default-src 'none'",
            "script-src " + " ".join(f"'sha256-{_digest(script)}'" for script in scripts),
            "style-src 'unsafe-inline'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    # Our own files, the only text that is not escaped.
    return environment.get_template("page.html.j2").render(
        page=page,
        policy=policy,
        css=markupsafe.Markup((_TEMPLATES / "page.css").read_text()),
        scripts=[markupsafe.Markup(script) for script in scripts],
        themes={name: theme(name) for name in ("light", "dark")},
    )


@functools.cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed."""
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@functools.cache
def _colours() -> dict[str, dict[str, Any]]:
    loaded: dict[str, dict[str, Any]] = json.loads((_TEMPLATES / "themes.json").read_text())
    return loaded


def theme(name: str) -> dict[str, Any]:
    """The Vega-Lite config of the "light" or the "dark" theme.

    Example:
      >>> theme("light")["background"], theme("light")["axis"]["labelColor"]
      ('transparent', '#57606a')
    """
    c = _colours()[name]
    font = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif'
    line = {"color": c["second"], "strokeWidth": 2}
    return {
        "background": "transparent",
        "font": font,
        "view": {"stroke": c["grid"]},
        # Screen readers get the words and the description, not hundreds of cells.
        "mark": {"color": c["accent"], "aria": False},
        "text": {"color": c["text"]},
        "axis": {
            "labelColor": c["faint"],
            "titleColor": c["faint"],
            "titleFontWeight": "normal",
            "titleFontSize": 13,
            "labelFontSize": 12,
            "labelLimit": 150,
            "gridColor": c["grid"],
            "domainColor": c["grid"],
            "tickColor": c["grid"],
        },
        "legend": {
            "orient": "top",
            "labelColor": c["faint"],
            "titleColor": c["faint"],
            "titleFontWeight": "normal",
            "titleFontSize": 12,
            "labelFontSize": 12,
            "labelLimit": 260,
            "columns": {"signal": "width < 420 ? 1 : 0"},
            "gradientLength": 160,
            "gradientThickness": 10,
            "titleLimit": 320,
        },
        "range": {
            "heatmap": c["heatmap"],
            "ramp": c["heatmap"],
            "diverging": c["diverging"],
            "category": [c["accent"], c["second"], c["faint"], *c["more"]],
        },
        "style": {
            "bound": line,
            "bound-name": {"color": c["second"], "fontSize": 13, "fontWeight": 600},
            "rim": {
                "color": c["cell_gap"],
                "stroke": c["cell_gap"],
                "strokeWidth": 4,
                "strokeJoin": "round",
            },
            "quadrant": {"color": c["faint"], "strokeDash": [4, 4]},
            "quadrant-name": {"color": c["faint"], "fontSize": 13, "fontStyle": "italic"},
            "noise": {"color": c["second"], "filled": True, "size": 8, "opacity": 1},
            "ridge": {
                "color": c["accent"],
                "fillOpacity": 0.5,
                "stroke": c["accent"],
                "strokeWidth": 1,
            },
            "mark": {"color": c["second"], "size": 48, "opacity": 1},
            "note": {"color": c["text"], "fontSize": 12},
            "plain": {"color": c["accent"]},
            "band": {"color": c["accent"], "fillOpacity": 0.25},
            "first": {"color": c["accent"], "strokeWidth": 2},
            "second": line,
            "cell": {"stroke": c["cell_gap"], "strokeWidth": 1},
            "number": {"color": c["text"], "fontSize": 11},
        },
    }


def write_pictures(
    specs: Mapping[str, Mapping[str, Any]], folder: str | os.PathLike[str]
) -> list[pathlib.Path]:
    """Writes each specification as NAME.png, 720 pixels wide at twice the density, on white."""
    paths = []
    for name, spec in specs.items():
        picture = vl_convert.vegalite_to_png(
            json.dumps({**spec, "width": 640}),
            config={**theme("light"), "background": "white", "padding": 12},
            scale=2,
        )
        path = pathlib.Path(folder, f"{name}.png")
        files.write_whole(path, picture)
        paths.append(path)
    return paths
