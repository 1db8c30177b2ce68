"""report.html of a comparison, from its results.json."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ranktuner_jax.compare import charts, sentences
from ranktuner_jax.compare.analysis import Analysis, MethodResult, analyse
from ranktuner_jax.compare.outcome import Outcome
from ranktuner_jax.compare.tables import UNADJUSTED, method_label, secondary, tables, title, value
from ranktuner_jax.diagnostics.report.page import Figure, Page, Section, Table, write_page
from ranktuner_jax.diagnostics.report.phrasing import counted
from ranktuner_jax.errors import UserError

__all__ = ["write_compare_report"]


def write_compare_report(folder: str | os.PathLike[str]) -> pathlib.Path:
    """Writes report.html into the folder of a comparison, from results.json alone.

    Args:
      folder: The folder, as `ranktuner compare --output` leaves it.

    Returns:
      The path of report.html, one file that needs no network.

    Raises:
      UserError: If the folder holds no results of a comparison.
    """
    path = pathlib.Path(folder, "results.json")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        settings: dict[str, Any] = dict(results["settings"])
        outcomes = [Outcome.from_json(saved) for saved in results["outcomes"]]
        analysis = analyse(outcomes, primary=settings["primary"], baseline=settings["baseline"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder}: expected the folder of a finished ranktuner compare, got none "
            f"({type(error).__name__}: {error})"
        ) from error
    page = pathlib.Path(folder, "report.html")
    write_page(page, _page(analysis, settings))
    return page


def _page(analysis: Analysis, settings: Mapping[str, Any]) -> Page:
    # The baseline, which both analyses have, once.
    methods = list(
        {(m.normalize, m.method): m for group in analysis.groups.values() for m in group}.values()
    )
    sections = [
        section for group in analysis.groups for section in _group(analysis, group, settings)
    ]
    if any(method.curve for method in methods):
        figure = Figure("Plain NLL of training, mean and band of the seeds", charts.curves(methods))
        sections.append(Section("Training", sentences.curves(methods), [figure]))
    if any(method.search for method in methods):
        figure = Figure(
            f"{analysis.primary} by learning rate", charts.search(analysis.primary, methods)
        )
        sections.append(Section("Learning rates", sentences.search(analysis, methods), [figure]))
    sections.append(_settings(settings))
    base = methods[0]
    config = settings.get("config", {})
    return Page(
        title="What the methods differ in",
        lead=f"{config.get('model', 'A model')} on "
        f"{config.get('data', {}).get('source') or 'a mixture'}, each method from the same "
        "start and with the same order of the data for each seed.",
        facts={
            "methods": str(len({method.method for method in methods})),
            "seeds": str(len(analysis.seeds)),
            "questions": f"{base.measured[analysis.primary].questions:,}",
            f"{analysis.primary} of {method_label(base.method)}": value(
                analysis.primary, base.measured[analysis.primary]
            ).split(" (")[0],
        },
        sections=sections,
        footer="From results.json. Intervals are of 95\u00a0%; differences are paired by seed and, "
        "for scores, by question.",
    )


def _group(analysis: Analysis, group: str, settings: Mapping[str, Any]) -> Iterator[Section]:
    """The sections of one of the analyses."""
    methods = analysis.groups[group]
    suffix = ", divided by weights" if group == "weights" else ""
    figures = list(_forests(analysis, methods, [analysis.primary]))
    first, rest = tables(analysis, group)
    names = secondary(analysis, methods)
    words = [sentences.measure(name, analysis, methods) for name in names]
    yield Section(
        f"{analysis.primary}{suffix}", sentences.primary(analysis, group, settings), figures
    )
    yield Section(f"In numbers{suffix}", sentences.adjustment(methods), tables=[first], wide=True)
    yield Section(
        f"Other measures{suffix}", words, list(_forests(analysis, methods, names)), wide=True
    )
    yield Section(f"Other measures in numbers{suffix}", [UNADJUSTED], tables=[rest], wide=True)


def _forests(
    analysis: Analysis, methods: Sequence[MethodResult], names: Sequence[str]
) -> Iterator[Figure]:
    for name in names:
        found = [
            (method, method.measured[name].difference)
            for method in methods
            if name in method.measured
        ]
        differing = [(method, one) for method, one in found if one]
        # A line of zeros, as of the memory of methods that need the same, shows nothing.
        if any(any([*one.by_seed.values(), one.low, one.high]) for _, one in differing):
            base = method_label(analysis.baseline)
            yield Figure(
                f"{title(name)}, minus {base}",
                charts.forest(name, analysis, [m for m, _ in differing]),
            )


def _settings(settings: Mapping[str, Any]) -> Section:
    rows = [[key, text] for key, text in _flat(settings)]
    return Section(
        "Settings",
        [f"{counted(len(rows), 'setting')}, shared by all runs but for what is listed by method."],
        tables=[Table("Keys and values", ["key", "value"], rows, text=(0, 1))],
        wide=True,
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Keys joined by dots, with their values as JSON."""
    for key, one in settings.items():
        if isinstance(one, Mapping) and one:
            yield from _flat(one, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(one, ensure_ascii=False)
