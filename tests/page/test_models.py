"""The page with two models of different families: each has its own fields, and one needs a picture."""

from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from pyramid_serve.api import RequestLimits
from pyramid_serve.families import family_of
from pyramid_serve.served_model import ServedModel
from tests.page.test_page import run_python, run_shell
from tests.serve.http.http_at_hand import png
from tests.serve.local_server import MODEL, LocalServer, serve_locally
from tests.unit.pia.tiny import save_tiny


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("tiny-pia")
    save_tiny(folder)
    family = family_of(folder, None)
    pia = ServedModel("pictures", family, family.capabilities(folder, None), RequestLimits())
    with serve_locally(str(tmp_path_factory.mktemp("storage")), models=(MODEL, pia)) as server:
        yield server


def test_a_model_is_chosen_with_its_fields_and_what_it_needs(page: Any, server: LocalServer, tmp_path: Path) -> None:
    page.goto(server.url)
    page.wait_for_selector("#own-fields .field", state="attached")
    assert page.evaluate("[...document.querySelector('#model').options].map((each) => each.value)") == [
        "tiny",
        "pictures",
    ]
    page.evaluate("document.querySelector('#more').open = true")
    assert page.locator("#field-video_guidance_scale").count() == 1
    page.fill("#field-guidance_scale", "3")
    page.select_option("#model", "pictures")
    assert page.locator("#field-video_guidance_scale").count() == 0
    assert page.input_value("#field-guidance_scale") == "3", "what both models have was not kept"
    page.fill("#prompt", "it moves")
    page.click("#make")
    assert "choose one" in page.inner_text("[data-field=input_reference] .error")
    page.set_input_files("#picture", {"name": "red.png", "mimeType": "image/png", "buffer": png(64, 32)})
    page.check("#field-free_init")
    page.fill('[id="field-free_init.num_iters"]', "9")
    page.click("#make")
    assert "at most 5" in page.inner_text("[data-field=free_init] > .error")
    page.fill('[id="field-free_init.num_iters"]', "2")
    page.select_option("#field-motion", "large")
    page.click("#make")
    page.wait_for_selector("#jobs .card")
    (video,) = server.client.get("/v1/videos").json()["data"]
    assert (video["model"], video["motion"], video["guidance_scale"]) == ("pictures", "large", 3.0)
    assert (video["free_init"]["num_iters"], video["free_init"]["method"]) == (2, "butterworth")
    assert video["has_input_reference"] is True
    server.client.post(f"/v1/videos/{video['id']}/cancel")
    page.click("#jobs >> text=Request")
    (tmp_path / "picture.png").write_bytes(png(64, 32))
    for number, run in enumerate((run_shell, run_python)):
        with chdir(tmp_path):
            run(page.inner_text(f"#viewer pre >> nth={number}"))
        again = server.client.get("/v1/videos").json()["data"][0]
        assert again["id"] != video["id"]
        names = ("model", "motion", "guidance_scale", "free_init", "size", "seed", "prompt", "negative_prompt")
        assert [again[name] for name in names] == [video[name] for name in names]
