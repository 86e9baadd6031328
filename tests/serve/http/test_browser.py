"""The stream in a browser, while the video is being made."""

import shutil
import time
from pathlib import Path

import pytest

from tests.serve.local_server import serve_locally

CHROMIUM = shutil.which("chromium")
PAGE = "<video muted autoplay src='{src}'></video>"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


def test_chromium_plays_a_video_while_it_is_made(tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    with serve_locally(str(tmp_path), unit_seconds=0.6) as server, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"{server.url}/healthz")  # for the page to be of the same origin
        video_id = server.submit(seconds="5")
        page.set_content(PAGE.format(src=f"/v1/videos/{video_id}/stream"))

        def read(name: str) -> float:
            return float(page.evaluate(f"Number(document.querySelector('video').{name})"))

        deadline = time.monotonic() + 30
        while read("currentTime") == 0:
            assert time.monotonic() < deadline
        num_units_done = server.client.get(f"/v1/videos/{video_id}").json()["num_units_done"]
        assert num_units_done < 16, "it played only when it was finished"
        assert (read("videoWidth"), read("videoHeight")) == (128, 64)
        while not read("ended"):
            assert time.monotonic() < deadline
        assert read("currentTime") == pytest.approx(121 / 24, abs=0.1)
        assert page.evaluate("document.querySelector('video').error") is None
        browser.close()
