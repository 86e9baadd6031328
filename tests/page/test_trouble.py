"""What goes wrong in a browser, and what people do at the wrong moment."""

from pathlib import Path
from typing import Any

import pytest

from deployments.http.config import HttpConfig
from tests.page.test_page import badge, make, until
from tests.serve.http.http_at_hand import png
from tests.serve.local_server import LocalServer, serve_locally

SLOW_PICTURES = """
const made = window.createImageBitmap;
window.createImageBitmap = async (file) => {
  if (file.name.startsWith("slow")) await new Promise((resolve) => setTimeout(resolve, 1000));
  return made(file);
};
"""
NO_FRAGMENTS = "MediaSource.prototype.addSourceBuffer = () => { throw new Error('no such codec'); };"


@pytest.fixture
def quick(tmp_path: Path) -> Any:
    with serve_locally(str(tmp_path)) as server:
        yield server


def test_keys_that_are_held_down_ask_for_one_video(page: Any, quick: LocalServer) -> None:
    page.goto(quick.url)
    page.wait_for_selector("#own-fields .field", state="attached")
    page.fill("#prompt", "a ball")
    page.focus("#prompt")
    for _ in range(6):  # Playwright marks a key that is down already as repeated
        page.keyboard.down("Control")
        page.keyboard.down("Enter")
    page.wait_for_selector("#jobs .card")
    page.evaluate("for (let i = 0; i < 5; i++) document.querySelector('#form').requestSubmit()")
    until(lambda: len(quick.client.get("/v1/videos").json()["data"]) >= 2)
    page.wait_for_timeout(500)
    assert len(quick.client.get("/v1/videos").json()["data"]) == 2


def test_where_fragments_cannot_be_played_the_finished_video_is_shown(page: Any, server: LocalServer) -> None:
    page.add_init_script(NO_FRAGMENTS)
    page.goto(server.url)
    make(page, seconds="1")
    until(lambda: badge(page) == "completed")
    until(lambda: bool(page.locator("#jobs video").is_visible()))
    assert page.evaluate("document.querySelector('#jobs video').duration") == pytest.approx(25 / 24, abs=0.1)


def test_the_picture_that_is_shown_is_the_one_chosen_last(page: Any, quick: LocalServer) -> None:
    page.add_init_script(SLOW_PICTURES)
    page.goto(quick.url)
    for name, size in (("slow.png", (64, 128)), ("quick.png", (128, 64))):
        page.set_input_files("#picture", {"name": name, "mimeType": "image/png", "buffer": png(*size)})
    page.wait_for_selector("#preview:not([hidden])")
    page.set_input_files("#picture", {"name": "slow.png", "mimeType": "image/png", "buffer": png(64, 64)})
    page.click("#picture-remove")
    page.wait_for_timeout(1500)
    assert not page.is_visible("#preview"), "a picture that was removed is shown"


def test_a_key_that_no_server_can_have_is_asked_for_again(page: Any, tmp_path: Path) -> None:
    with serve_locally(str(tmp_path), http=HttpConfig(api_keys=("secret-1",))) as server:
        page.goto(server.url)
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", "ключ")  # which no header can hold
        page.press("#key", "Enter")
        page.wait_for_selector("#key-error:not(:empty)")
        page.fill("#key", "secret-1")
        page.press("#key", "Enter")
        page.wait_for_selector("#own-fields .field", state="attached")


def test_a_deleted_video_is_not_shown_again_and_is_gone_when_the_page_is_left(page: Any, quick: LocalServer) -> None:
    video_id = quick.submit(seconds="0.04")
    quick.finish(video_id)
    page.goto(quick.url)
    page.click("#gallery >> text=Delete")
    page.wait_for_selector("#gallery-empty:not([hidden])")
    assert page.evaluate("document.activeElement.textContent") == "Undo"
    page.select_option("#filter", "completed")
    page.wait_for_timeout(500)
    assert page.locator("#gallery .card").count() == 0
    page.goto("about:blank")
    until(lambda: quick.client.get(f"/v1/videos/{video_id}").status_code == 404)


def test_a_remix_that_is_refused_keeps_what_was_typed(page: Any, quick: LocalServer) -> None:
    quick.finish(quick.submit(seconds="0.04"))
    page.goto(quick.url)
    page.click("#gallery >> text=Remix")
    page.fill("#remix-prompt", "x" * 501)
    page.click("#viewer >> text=Make")
    page.wait_for_selector("#viewer .error:not(:empty)")
    assert page.input_value("#remix-prompt") == "x" * 501


def test_text_is_selected_where_it_cannot_be_copied(page: Any, quick: LocalServer) -> None:
    page.add_init_script("Object.defineProperty(navigator, 'clipboard', { value: undefined });")
    quick.finish(quick.submit(seconds="0.04"))
    page.goto(quick.url)
    page.click("#gallery >> text=Request")
    page.click("#viewer >> text=Copy >> nth=0")
    assert page.evaluate("getSelection().toString()").startswith("curl ")
    assert page.locator("#viewer .toast").is_visible()
