"""The page ``/docs``, which needs nothing from elsewhere."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.local_server import LocalServer, serve_locally

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with serve_locally(str(tmp_path_factory.mktemp("storage"))) as server:
        yield server


def test_the_page_takes_nothing_from_elsewhere(server: LocalServer) -> None:
    page = server.client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "://" not in page.text
    paths = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(paths) == 3
    for path in paths:
        assert server.client.get(path).status_code == 200
    policy = page.headers["content-security-policy"]
    assert "http" not in policy
    assert "script-src 'self' 'sha256-" in policy
    assert "unsafe-eval" not in policy
    assert server.client.get("/redoc").status_code == 404


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_chromium_shows_the_page_within_its_policy(server: LocalServer, tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{server.url}/docs")
        page.get_by_text("Ask for a video and get its file").wait_for()
        page.get_by_text("/v1/models", exact=True).click()
        page.get_by_role("button", name="Try it out").click()
        page.get_by_role("button", name="Execute").click()
        page.get_by_text('"owned_by": "pyramid-serve"').first.wait_for()
        page.screenshot(path=tmp_path / "docs.png", full_page=True)
        browser.close()
    assert said == []
    assert all(url.startswith((server.url, "data:")) for url in asked)
