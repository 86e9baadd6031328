"""The page in Chromium, as someone uses it. The server behind it makes invented videos, with no Ray."""

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deployments.http.config import HttpConfig
from tests.page.cable import cable_to
from tests.serve.http.http_at_hand import png
from tests.serve.local_server import LocalServer, serve_locally

IN_PROGRESS = ("queued", "in progress")


def make(page: Any, prompt: str = "a ball", seconds: str = "5") -> None:
    page.fill("#prompt", prompt)
    page.fill("#seconds", seconds)
    page.click("#make")
    page.wait_for_selector("#jobs .card")


def badge(page: Any) -> str:
    return str(page.inner_text("#jobs .card .badge"))


def current_time(page: Any) -> float:
    return float(page.evaluate("document.querySelector('#jobs video')?.currentTime ?? 0"))


def until(is_so: Callable[[], bool], *, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_video_plays_while_it_is_made_and_can_be_had_at_its_end(
    page: Any, server: LocalServer, tmp_path: Path
) -> None:
    page.goto(server.url)
    page.fill("#prompt", "a <b>ball</b> & more")
    page.fill("#seconds", "5")
    page.press("#prompt", "Control+Enter")
    until(lambda: current_time(page) > 0)
    first = current_time(page)
    until(lambda: current_time(page) > first)
    assert badge(page) in IN_PROGRESS, "it played only when it was finished"
    assert page.inner_text("#jobs h3") == "a <b>ball</b> & more"
    assert page.locator("#jobs .units li").count() == 16
    until(lambda: badge(page) == "completed")
    assert page.evaluate("document.querySelector('#jobs video').duration") == pytest.approx(121 / 24, abs=0.1)
    assert page.locator("#jobs .units li.decoded").count() == 16
    until(lambda: page.locator("#jobs .units canvas").count() == 16)
    assert "completed" in page.inner_text("#live")
    with page.expect_download() as download:
        page.click("#jobs >> text=MP4")
    download.value.save_as(tmp_path / "video.mp4")
    video_id = page.get_attribute("#jobs .card", "data-id")
    assert (tmp_path / "video.mp4").read_bytes() == server.client.get(f"/v1/videos/{video_id}/content").content
    assert page.locator("#gallery .card").count() == 1
    with page.expect_download() as download:
        page.click("#gallery >> text=GIF")
    download.value.save_as(tmp_path / "video.gif")
    with Image.open(tmp_path / "video.gif") as animation:
        assert (animation.size, getattr(animation, "n_frames", 1) > 10) == ((128, 64), True)


def test_after_a_reload_the_video_goes_on(page: Any, server: LocalServer) -> None:
    page.goto(server.url)
    make(page)
    until(lambda: current_time(page) > 0)
    page.reload()
    page.wait_for_selector("#jobs .card")
    until(lambda: current_time(page) > 0)
    assert badge(page) in IN_PROGRESS
    until(lambda: badge(page) == "completed")


def test_one_video_is_watched_at_a_time_and_all_are_shown_at_their_end(page: Any, server: LocalServer) -> None:
    streams: list[str] = []
    page.on("request", lambda request: streams.append(request.url) if request.url.endswith("/stream") else None)
    page.goto(server.url)
    make(page, "the first", seconds="3")
    until(lambda: current_time(page) > 0)
    make(page, "the second", seconds="3")
    until(lambda: page.locator("#jobs .card").count() == 2)
    until(lambda: current_time(page) > 0)
    first = page.locator("#jobs .card", has_text="the first")
    assert not first.locator("video").is_visible()
    assert first.locator("text=Watch").is_visible()
    until(lambda: page.locator("#jobs .badge.completed").count() == 2)
    until(lambda: page.locator("#jobs video:visible").count() == 2)
    assert len(streams) <= 3, "the first may be watched again when the second is over"
    assert first.locator("video").evaluate("(video) => video.duration") == pytest.approx(73 / 24, abs=0.1)


def test_a_video_can_be_cancelled(page: Any, server: LocalServer) -> None:
    page.goto(server.url)
    make(page, "hold")
    page.click("#jobs >> text=Cancel")
    until(lambda: badge(page) == "failed")
    assert "cancelled" in page.inner_text("#jobs .error")


def test_what_failed_says_why(page: Any, server: LocalServer) -> None:
    page.goto(server.url)
    make(page, "fail")
    until(lambda: badge(page) == "failed")
    assert page.inner_text("#jobs .error") == "it had to fail"


def test_a_picture_is_shown_as_it_will_be_cut_and_is_sent(page: Any, server: LocalServer) -> None:
    page.goto(server.url)
    page.set_input_files("#picture", {"name": "red.png", "mimeType": "image/png", "buffer": png(100, 100)})
    page.wait_for_selector("#preview:not([hidden])")
    assert page.evaluate("[document.querySelector('#preview').width, document.querySelector('#preview').height]") == [
        128,
        64,
    ]
    page.fill("#size", "64x64")
    assert page.evaluate("document.querySelector('#preview').width") == 64
    make(page)
    (video,) = server.client.get("/v1/videos").json()["data"]
    assert video["has_input_reference"] is True
    assert video["size"] == "64x64"


@pytest.mark.parametrize(
    ("field", "typed", "said"),
    [
        ("#prompt", " ", "say what the video shows"),
        ("#prompt", "x" * 501, "may have 500 characters, and has 501"),
        ("#prompt", "a \u202e ball", "U+202e"),
        ("#size", "100x100", "this model makes 128x64, 64x64"),
        ("#size", "large", "must be like 128x64"),
        ("#seconds", "99", "at most 5"),
        ("#seconds", "0", "more than 0"),
        ("#seed", "1.5", "whole number"),
        ("#seed", str(2**64), "whole number"),
        ("#field-guidance_scale", "101", "at most 100"),
        ("#field-num_inference_steps", "2, 2", "one number, or 3"),
        ("#field-num_inference_steps", "2.5", "whole number"),
    ],
)
def test_what_the_server_would_refuse_is_said_beside_the_field(
    refusing_page: Any, field: str, typed: str, said: str
) -> None:
    page = refusing_page
    page.fill("#prompt", "a ball")
    page.evaluate("document.querySelector('#more').open = true")
    page.fill(field, typed)
    page.click("#make")
    beside = page.locator(".field", has=page.locator(field)).locator(".error")
    assert said in beside.inner_text()
    assert page.get_attribute(field, "aria-invalid") == "true"
    page.fill(field, "")
    assert page.get_attribute(field, "aria-invalid") is None
    assert page.locator("#jobs .card").count() == 0


@pytest.fixture(scope="module")
def refusing_page(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with serve_locally(str(tmp_path_factory.mktemp("storage"))) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_selector("#own-fields .field", state="attached")
        page.wait_for_load_state("networkidle")
        yield page
        page.close()
        assert server.client.get("/v1/videos").json()["data"] == []


def test_what_the_server_alone_refuses_is_said_beside_the_field_too(page: Any, server: LocalServer) -> None:
    page.goto(server.url)
    page.set_input_files("#picture", {"name": "a.png", "mimeType": "image/png", "buffer": b"not a picture"})
    page.fill("#prompt", "a ball")
    page.click("#make")
    page.wait_for_selector("[data-field=input_reference] .error")
    assert "input_reference" in page.inner_text("[data-field=input_reference] .error")


def test_a_key_is_asked_for_and_not_kept_in_any_url(page: Any, tmp_path: Path) -> None:
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    with serve_locally(str(tmp_path), unit_seconds=0.1, http=HttpConfig(api_keys=("secret-1",))) as server:
        page.goto(server.url)
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        page.wait_for_selector("#key-error:not(:empty)")
        page.fill("#key", "secret-1")
        page.press("#key", "Enter")
        page.wait_for_selector("#own-fields .field", state="attached")
        make(page, seconds="1")
        until(lambda: badge(page) == "completed")
        until(lambda: page.evaluate("document.querySelector('#gallery img')?.src.startsWith('blob:')"))
        page.reload()  # in the same tab it is still known
        page.wait_for_selector("#gallery .card")
        assert page.evaluate("Object.keys(localStorage).length") == 0
    assert requests
    assert not any("secret-1" in url for url in requests)


def test_the_gallery_shows_200_videos_page_by_page(page: Any, tmp_path: Path) -> None:
    with serve_locally(str(tmp_path)) as server:
        ids = [server.submit(f"number {number}", seconds="0.04") for number in range(200)]
        for video_id in ids:
            server.finish(video_id)
        cancelled = server.submit("hold")
        server.client.post(f"/v1/videos/{cancelled}/cancel")
        page.goto(server.url)
        page.wait_for_selector("#gallery .card")
        while page.is_visible("#gallery-more"):
            page.click("#gallery-more")
            until(lambda: page.is_enabled("#gallery-more") or not page.is_visible("#gallery-more"))
        shown = page.evaluate("[...document.querySelectorAll('#gallery .card')].map((card) => card.dataset.id)")
        assert shown == [cancelled, *reversed(ids)]
        page.select_option("#filter", "failed")
        until(lambda: page.evaluate("document.querySelectorAll('#gallery .card').length === 1"))
        assert page.get_attribute("#gallery .card", "data-id") == cancelled


def test_a_deleted_video_comes_back_on_undo_and_is_gone_otherwise(page: Any, tmp_path: Path) -> None:
    with serve_locally(str(tmp_path)) as server:
        video_id = server.submit(seconds="0.04")
        server.finish(video_id)
        page.goto(server.url)
        page.click("#gallery >> text=Delete")
        page.wait_for_selector("#gallery .card", state="hidden")
        page.click(".toast >> text=Undo")
        page.wait_for_selector("#gallery .card")
        page.click("#gallery >> text=Delete")
        until(lambda: server.client.get(f"/v1/videos/{video_id}").status_code == 404)


def test_again_and_remix_make_videos_of_the_same_settings(page: Any, tmp_path: Path) -> None:
    with serve_locally(str(tmp_path)) as server:
        first = server.finish(server.submit("a ball", seconds="0.4", size="64x64", seed=7))
        page.goto(server.url)
        page.click("#gallery >> text=Again, other seed")
        page.wait_for_selector("#jobs .card")
        page.click(f"#gallery [data-id={first['id']}] >> text=Remix")
        page.fill("#remix-prompt", "a cube")
        page.click("#viewer >> text=Make")
        until(lambda: len(server.client.get("/v1/videos").json()["data"]) == 3)
        remix, again, _ = server.client.get("/v1/videos").json()["data"]
        for video in (remix, again):
            assert (video["remixed_from_video_id"], video["size"], video["num_frames"]) == (first["id"], "64x64", 9)
        assert (remix["prompt"], remix["seed"]) == ("a cube", 7)
        assert again["prompt"] == "a ball"
        assert again["seed"] != 7


def test_the_request_is_shown_as_curl_and_python_that_make_the_same_video(page: Any, tmp_path: Path) -> None:
    with serve_locally(str(tmp_path)) as server:
        fields = {
            "seconds": "0.4",
            "seed": 2**53 + 1,
            "num_inference_steps": [3, 2, 1],
            "guidance_scale": 2.5,
            "negative_prompt": "",
            "prompt_suffix": ", slowly",
        }
        made = server.finish(server.submit('it\'s "a" $ball \\', **fields))
        page.goto(server.url)
        page.click("#gallery >> text=Request")
        shell, python = (page.inner_text(f"#viewer pre >> nth={number}") for number in range(2))
        run_shell(shell)
        run_python(python)
        again = server.client.get("/v1/videos").json()["data"]
        assert len(again) == 3
        for video in again:
            assert [video[name] for name in ("prompt", "size", "num_frames", *fields)] == [
                made[name] for name in ("prompt", "size", "num_frames", *fields)
            ]


def test_a_connection_lost_for_ten_seconds_is_made_up_for(page: Any, server: LocalServer) -> None:
    with cable_to(server.url) as cable:
        page.goto(cable.url)
        make(page)
        until(lambda: current_time(page) > 0)
        cable.pull()
        time.sleep(10)
        cable.plug_in()
        until(lambda: badge(page) == "completed", timeout_s=25)
        until(lambda: float(page.evaluate("document.querySelector('#jobs video').duration")) < 6)
        assert page.evaluate("document.querySelector('#jobs video').duration") == pytest.approx(121 / 24, abs=0.1)
        assert page.evaluate("document.querySelector('#jobs video').error") is None


def test_on_a_phone_nothing_is_wider_than_the_screen(browser: Any, server: LocalServer) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    page = context.new_page()
    page.goto(server.url)
    page.evaluate("document.querySelector('#more').open = true; document.querySelector('#status').open = true")
    make(page, "word" * 60, seconds="1")
    until(lambda: badge(page) == "completed")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser: Any, server: LocalServer, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(color_scheme=scheme, bypass_csp=True, reduced_motion="reduce")
    page = context.new_page()
    page.goto(server.url)
    page.evaluate("document.querySelector('#more').open = true; document.querySelector('#status').open = true")
    page.click("#make")  # the prompt is missing
    make(page, "fail")
    until(lambda: badge(page) == "failed")
    make(page, seconds="0.4")
    until(lambda: page.locator("#gallery .badge.completed").count() == 1)
    page.click("#gallery >> text=Request")
    found = Axe().run(page).response["violations"]
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    assert serious == [], [(each["id"], [node["html"] for node in each["nodes"]]) for each in serious]
    assert page.evaluate("document.querySelector('#jobs video').paused"), "it moves though it should not"
    context.close()


def test_the_form_can_be_used_by_keyboard_alone(page: Any, server: LocalServer) -> None:
    page.goto(server.url)
    page.wait_for_selector("#own-fields .field", state="attached")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("a ball")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#jobs .card")


def run_shell(command: str) -> None:
    subprocess.run(["bash", "-c", command], check=True, capture_output=True, timeout=30)


def run_python(source: str) -> None:
    """Run it, without the part that waits for the video."""
    made = re.sub(r"^client\.videos\.download_content.*$", "", source, flags=re.MULTILINE)
    exec(compile(made, "request", "exec"), {})
