"""Debian's Chromium, driven by Playwright."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.local_server import LocalServer, serve_locally

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """For one module: while Playwright is started, its event loop is that of the thread, and asyncio.run is refused."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A new tab of 1280 x 900 pixels. At its end, nothing must have been wrong in it that it did not show."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="no-preference")
    tab = context.new_page()
    tab.set_default_timeout(15_000)
    problems: list[str] = []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("console", lambda said: problems.append(said.text) if "Content Security Policy" in said.text else None)
    yield tab
    context.close()
    assert problems == []


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LocalServer]:
    """A server that makes a unit in 0.4 s."""
    with serve_locally(str(tmp_path), unit_seconds=0.4) as server:
        yield server
