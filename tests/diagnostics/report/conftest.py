"""One audit, and the pages from it."""

import pathlib
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
from playwright.sync_api import Browser, sync_playwright

from ranktuner_jax.diagnostics import report
from tests.diagnostics.report import audits

Columns = dict[str, np.ndarray]


@pytest.fixture(scope="session")
def audit(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Columns]:
    """A folder with two sources, several row groups and hostile text, and its columns."""
    folder = tmp_path_factory.mktemp("audit") / "before"
    return folder, audits.write_audit(folder)


@pytest.fixture(scope="session")
def page(audit: tuple[pathlib.Path, Columns]) -> pathlib.Path:
    """The report of that audit."""
    return report.write_audit_report(audit[0])


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"needs a Chromium: none of {', '.join(names)} is installed")
    switches = ["no-sandbox", "disable-gpu", "disable-background-networking"]
    switches += ["disable-component-update", "disable-sync"]
    with sync_playwright() as playwright:
        # Playwright makes a fresh profile for each launch.
        started = playwright.chromium.launch(
            executable_path=path, args=[f"--{switch}" for switch in switches]
        )
        yield started
        started.close()
