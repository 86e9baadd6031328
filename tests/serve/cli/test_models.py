"""An app with several models: both variants of Pyramid Flow, PIA, and a family that does not come with the package."""

import io
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from deployments import cli
from pyramid_serve.api import Status, new_record
from pyramid_serve.media.pictures import read_picture
from pyramid_serve.pia.whole import load_pipeline
from pyramid_serve.pyramid_flow.pipeline import PyramidFlow, VideoInput
from pyramid_serve.pyramid_flow.planned import video_settings
from pyramid_serve.storage import VideoStore
from tests.serve.cli.test_command_line import processes_of
from tests.serve.cli.up_at_hand import Up
from tests.serve.local_server import probe
from tests.unit.pia.golden import CHECKPOINT
from tests.unit.pia.models_at_hand import picture_file

NOISE = "tests.families.noise:FAMILY"
SMALL_REPLICA = {"ray_actor_options": {"num_cpus": 0.01}}
POOLS = dict.fromkeys(("text_encoder", "denoiser", "decoder"), SMALL_REPLICA)


@pytest.fixture(scope="module")
def noise_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "noise"
    folder.mkdir()
    (folder / "noise.json").write_text(json.dumps({"size": [128, 64]}))
    return folder


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, miniflux: Path, mmdit: Path, noise_model: Path) -> Iterator[Up]:
    models: list[dict[str, Any]] = [
        {"source": str(miniflux), "name": "mini", "dtype": "float32", **POOLS},
        {"source": str(mmdit), "name": "tiny/sd3", "dtype": "float32", **POOLS, "decoder": "with denoiser"},
        {"source": str(noise_model), "family": NOISE, **POOLS, "decoder": "with denoiser"},
        {
            **{"source": str(CHECKPOINT), "name": "pia", "dtype": "float32", **POOLS, "decoder": "with denoiser"},
            "denoiser": {**SMALL_REPLICA, "settings": {"state_interval_s": 0.3}},
        },
    ]
    up = Up(tmp_path_factory.mktemp("up"), models)
    try:
        yield up
    finally:
        up.stop()


def frame_of(up: Up, video_id: str) -> numpy.ndarray[Any, Any]:
    """The first frame, as its thumbnail shows it: (H, W, 3)."""
    content = up.client.get(f"/v1/videos/{video_id}/content?variant=thumbnail").read()
    path = up.folder / f"{video_id}.webp"
    path.write_bytes(content)
    return numpy.asarray(Image.open(path).convert("RGB"), dtype=float)


def test_each_model_is_told_on_the_terminal(up: Up) -> None:
    for name in ("mini", "tiny/sd3", "noise", "pia"):
        assert f"Model {name} in float32 on cpu: " in up.said


def test_the_models_are_listed_with_what_each_can_do(up: Up) -> None:
    mini, sd3, noise, pia = models = up.client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["mini", "tiny/sd3", "noise", "pia"]
    assert [model["family"] for model in models] == ["pyramid_flow", "pyramid_flow", "noise", "pia"]
    assert (pia["fps"], pia["max_num_frames"], pia["size_multiple"], pia["num_inference_steps"]) == (8, 32, 4, 25)
    assert pia["request_fields"]["mode"]["enum"] == ["animate", "loop", "style"]
    assert "mode" not in mini["request_fields"]
    assert (noise["fps"], noise["max_num_frames"], noise["sizes"], noise["hue"]) == (8, 16, ["128x64"], 0.0)
    assert noise["request_fields"]["hue"]["maximum"] == 1
    assert "guidance_scale" in mini["request_fields"] and "guidance_scale" not in noise["request_fields"]
    assert up.client.get("/v1/models/tiny/sd3").json() == sd3
    answer = up.client.get("/v1/models/sora-2")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert "'mini', 'tiny/sd3', 'noise', 'pia'" in answer.json()["error"]["message"]


def test_each_model_makes_its_own_videos(up: Up, miniflux: Path, mmdit: Path) -> None:
    checkpoints = {"mini": miniflux, "tiny/sd3": mmdit}
    ids = {name: up.submit(model=name, seed=3) for name in checkpoints}
    for name, checkpoint in checkpoints.items():
        video = up.finish(ids[name])
        assert (video["status"], video["model"]) == ("completed", name), video["error"]
        check_pyramid_flow_is_that_of_the_library(up, ids[name], checkpoint)


def check_pyramid_flow_is_that_of_the_library(up: Up, video_id: str, checkpoint: Path) -> None:
    store = VideoStore(str(up.folder / "videos"))
    plan = store.read(video_id).plan
    pipeline = PyramidFlow.from_pretrained(checkpoint, dtype="float32")
    expected = pipeline.generate_latents([VideoInput(plan.prompt, seed=plan.seed)], video_settings(plan))[0]
    latents = numpy.concatenate(store.files.load_latents(video_id), axis=1)
    assert numpy.array_equal(latents, expected.numpy())


def test_units_that_are_denoised_and_decoded_in_the_same_replicas_do_not_get_lost(up: Up) -> None:
    ids = [up.submit(model="tiny/sd3", seed=seed, seconds="1.3") for seed in range(6)]
    for video_id in ids:
        video = up.finish(video_id, timeout_s=60)
        assert video["status"] == "completed", video["error"]


def test_a_request_that_names_no_model_gets_the_first(up: Up) -> None:
    assert up.client.get(f"/v1/videos/{up.submit()}").json()["model"] == "mini"


def test_a_field_of_one_family_is_unknown_to_another(up: Up) -> None:
    for model, fields in (("mini", {"hue": 0.5}), ("noise", {"guidance_scale": 3}), ("noise", {"hue": 2})):
        answer = up.client.post("/v1/videos", json={"prompt": "a", "model": model, **fields})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(fields)))


def test_a_family_of_ones_own_makes_videos_over_http(up: Up) -> None:
    video_id = up.client.post("/v1/videos", json={"prompt": "noise", "model": "noise", "hue": 0.67}).json()["id"]
    video = up.finish(video_id)
    assert video["status"] == "completed", video["error"]
    assert (video["num_frames"], video["fps"], video["seconds"], video["hue"]) == (16, 8, "2", 0.67)
    assert "guidance_scale" not in video
    assert {entry["stage"] for entry in video["timeline"]} == {"encode", "denoise", "decode", "save"}
    path = up.folder / "noise.mp4"
    path.write_bytes(up.client.get(f"/v1/videos/{video_id}/content").read())
    assert probe(path, fps=8) == (16, 128, 64)
    red, _, blue = frame_of(up, video_id).mean(axis=(0, 1))
    assert blue > 3 * red


def test_a_family_of_ones_own_is_streamed_while_it_is_made(up: Up) -> None:
    video_id = up.client.post("/v1/videos", json={"prompt": "slow noise", "model": "noise"}).json()["id"]
    with up.client.stream("GET", f"/v1/videos/{video_id}/stream") as answer:
        assert answer.status_code == 200 and "content-length" not in answer.headers
        streamed = answer.read()
    path = up.folder / "streamed.mp4"
    path.write_bytes(streamed)
    assert probe(path, fps=8) == (16, 128, 64)
    assert up.client.get(f"/v1/videos/{video_id}/stream").read() == streamed


def test_a_picture_that_is_no_unit_goes_to_the_denoiser(up: Up) -> None:
    content = io.BytesIO()
    Image.new("RGB", (128, 64), "black").save(content, format="PNG")
    files = {"input_reference": ("dark.png", content.getvalue(), "image/png")}
    answer = up.client.post("/v1/videos", data={"prompt": "noise", "model": "noise"}, files=files)
    video = up.finish(answer.json()["id"])
    assert video["status"] == "completed", video["error"]
    assert "picture" in {entry["stage"] for entry in video["timeline"]}
    assert frame_of(up, video["id"]).max() < 30


def test_the_command_line_asks_for_it_too(up: Up, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["submit", "noise", "--model", "noise", "--url", up.url, "--seed", "5"]
    assert cli.main([*command, "--set", "hue=0.33", "-o", str(tmp_path / "green.mp4")]) == 0
    assert "16 frames of 128x64, seed 5" in capsys.readouterr().out
    assert probe(tmp_path / "green.mp4", fps=8) == (16, 128, 64)
    assert cli.main([*command, "--set", "hue=green"]) == 2
    assert "hue='green': input should be a valid number" in capsys.readouterr().err


def test_one_seed_gives_one_video_of_any_family(up: Up) -> None:
    ids = [
        up.client.post("/v1/videos", json={"prompt": "noise", "model": "noise", "seed": 7}).json()["id"]
        for _ in range(2)
    ]
    contents = [up.client.get(f"/v1/videos/{up.finish(video_id)['id']}/content").read() for video_id in ids]
    assert contents[0] == contents[1]


def test_a_video_of_any_family_goes_on_when_its_orchestrator_is_lost(up: Up) -> None:
    video_id = up.client.post("/v1/videos", json={"prompt": "noise", "model": "noise"}).json()["id"]
    whole = up.finish(video_id)
    store = VideoStore(str(up.folder / "videos"))
    gone = {"status": Status.IN_PROGRESS, "owner": "gone", "attempts": 1, "lease_expires_at": time.time()}
    lost = new_record(store.read(video_id).plan).model_copy(update=gone)
    store.create(lost)  # as if its orchestrator and claims had died
    video = up.finish(lost.id)
    assert (video["status"], video["attempts"]) == ("completed", 2), video["error"]
    contents = [up.client.get(f"/v1/videos/{each['id']}/content").read() for each in (whole, video)]
    assert contents[0] == contents[1]


def test_a_video_of_a_family_that_is_not_installed_any_more_can_still_be_fetched(up: Up) -> None:
    video_id = up.submit(model="mini")
    assert up.finish(video_id)["status"] == "completed"
    store = VideoStore(str(up.folder / "videos"))
    record = store.read(video_id)
    plan = record.plan.model_copy(update={"family": "gone", "settings": {"sparkle": 3}})
    store.update(record.model_copy(update={"plan": plan}))
    time.sleep(1.5)  # what was told of a finished video is told again for a second
    video = up.client.get(f"/v1/videos/{video_id}").json()
    assert (video["sparkle"], video["status"]) == (3, "completed")
    assert up.client.get(f"/v1/videos/{video_id}/content").status_code == 200
    assert up.client.delete(f"/v1/videos/{video_id}").json()["deleted"]


def test_a_video_of_a_model_whose_name_another_family_has_now_is_not_made(up: Up) -> None:
    store = VideoStore(str(up.folder / "videos"))
    done = store.read(up.finish(up.submit(model="mini"))["id"])
    record = new_record(done.plan.model_copy(update={"family": "gone"}))
    store.create(record)  # as if accepted by an app that served the name with another family
    video = up.finish(record.id)
    assert (video["status"], video["attempts"], video["error"]["code"]) == ("failed", 1, "model_not_found")


# --- PIA --------------------------------------------------------------------------------------------------------------


def animate(up: Up, **fields: Any) -> str:
    """The id of a video that is asked for in a form, with a picture."""
    form = {"prompt": "a cat", "model": "pia", "seed": 3, "num_inference_steps": 3, **fields}
    files = {"input_reference": ("cat.jpg", picture_file(320, 160), "image/jpeg")}
    answer = up.client.post("/v1/videos", data=form, files=files)
    assert answer.status_code == 200, answer.text
    video_id: str = answer.json()["id"]
    return video_id


def content_of(up: Up, video_id: str) -> bytes:
    video = up.finish(video_id)
    assert video["status"] == "completed", video["error"]
    return up.client.get(f"/v1/videos/{video_id}/content").read()


def test_pia_makes_an_mp4_at_8_fps_of_a_picture(up: Up) -> None:
    video_id = animate(up, mode="loop", free_init=json.dumps({"num_iters": 2}))
    (up.folder / "pia.mp4").write_bytes(content_of(up, video_id))
    assert probe(up.folder / "pia.mp4", fps=8) == (16, 16, 8)
    video = up.finish(video_id)
    assert (video["num_frames"], video["seconds"], video["size"], video["fps"]) == (16, "2", "16x8", 8)
    assert (video["mode"], video["motion"], video["scheduler"]) == ("loop", "moderate", "ddim")
    assert (video["free_init"]["num_iters"], video["free_init"]["method"]) == (2, "butterworth")
    assert {entry["stage"] for entry in video["timeline"]} == {"encode", "picture", "denoise", "decode", "save"}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many as the replicas have, whose share of a core is small: bits of PIA depend on the number."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def test_one_seed_gives_one_video_of_pia_alone_packed_and_in_one_process(up: Up, one_thread: None) -> None:
    alone = content_of(up, animate(up))
    ids = [
        animate(up),
        animate(up, scheduler="euler", seed=4),
        animate(up, guidance_scale=1),
        animate(up, num_frames=8),
    ]
    contents = [content_of(up, video_id) for video_id in ids]
    assert contents[0] == alone and len(set(contents)) == 4
    check_pia_is_that_of_the_library(up, ids[0])


def check_pia_is_that_of_the_library(up: Up, video_id: str) -> None:
    """Of a video that ``animate`` asked for."""
    store = VideoStore(str(up.folder / "videos"))
    (latents,) = store.files.load_latents(video_id)
    pipeline = load_pipeline(CHECKPOINT, variant=None, dtype="float32", device="cpu")
    (frames,) = pipeline.stream(store.read(video_id).plan, picture=read_picture(picture_file(320, 160)))
    (decoded,) = pipeline.decode.forward([pipeline.decode.request(torch.from_numpy(latents), None)])
    assert torch.equal(frames, decoded.frames)


def test_videos_of_two_families_are_made_at_once_and_are_those_of_the_library(
    up: Up, miniflux: Path, one_thread: None
) -> None:
    ids = [animate(up, num_inference_steps=10), up.submit(model="mini", seed=5, seconds="1", num_inference_steps=10)]
    deadline = time.monotonic() + 60
    while any(up.client.get(f"/v1/videos/{video_id}").json()["status"] != "in_progress" for video_id in ids):
        assert time.monotonic() < deadline, "they were never made at the same time"
        time.sleep(0.02)
    assert [up.finish(video_id)["status"] for video_id in ids] == ["completed"] * 2
    check_pia_is_that_of_the_library(up, ids[0])
    check_pyramid_flow_is_that_of_the_library(up, ids[1], miniflux)


NUM_MANY_STEPS = 120
MANY_STEPS = {
    "num_inference_steps": NUM_MANY_STEPS // 3,
    "free_init": json.dumps({"num_iters": 3}),
    "scheduler": "dpm++",
    "num_frames": 8,
}


@pytest.fixture(scope="module")
def undisturbed(up: Up) -> bytes:
    """The MP4 of a run of FreeInit that nothing happens to."""
    return content_of(up, animate(up, seed=6, **MANY_STEPS))


@pytest.mark.parametrize("deployment", ["Denoiser-pia", "Orchestrator"])
def test_a_run_of_free_init_goes_on_in_the_middle_after_a_kill_with_the_same_bytes(
    up: Up, undisturbed: bytes, deployment: str
) -> None:
    video_id = animate(up, seed=6, **MANY_STEPS)
    states = up.folder / "videos" / "videos" / video_id / "states"
    deadline = time.monotonic() + 60
    while (progress := up.client.get(f"/v1/videos/{video_id}").json()["progress"]) < 30 or not states.exists():
        assert time.monotonic() < deadline, progress
        time.sleep(0.05)
    (pid,) = (pid for pid, command in processes_of(up.command.mark).items() if deployment in command)
    os.kill(pid, signal.SIGKILL)  # of the app that this module started
    assert up.client.get(f"/v1/videos/{video_id}").json()["progress"] >= progress
    assert content_of(up, video_id) == undisturbed
    (step,) = steps_gone_on_from(up, video_id)
    assert NUM_MANY_STEPS // 4 < step < NUM_MANY_STEPS
    assert list(states.iterdir()) == []


def steps_gone_on_from(up: Up, video_id: str) -> list[int]:
    """The steps at which denoisers took a unit up, by their logs."""
    (logs,) = (line.removeprefix("Logs: ") for line in up.said.splitlines() if line.startswith("Logs: "))
    lines = (line for file in Path(logs).rglob("worker-*.err") for line in file.read_text().splitlines())
    told = (re.search(rf"goes on from step (\d+) of {NUM_MANY_STEPS}", line) for line in lines if video_id in line)
    return [int(match[1]) for match in told if match]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"mode": "style"}, "mode"),
        ({"strength": 0.5, "free_init": "{}"}, "strength"),
        ({"num_frames": 33}, "num_frames"),
        ({"video_num_inference_steps": 3}, "video_num_inference_steps"),
    ],
)
def test_what_pia_cannot_make_is_refused_by_name(up: Up, fields: dict[str, Any], param: str) -> None:
    files = {"input_reference": ("cat.jpg", picture_file(), "image/jpeg")}
    answer = up.client.post("/v1/videos", data={"prompt": "a cat", "model": "pia", **fields}, files=files)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_pia_without_a_picture_is_refused(up: Up) -> None:
    answer = up.client.post("/v1/videos", json={"prompt": "a cat", "model": "pia"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input_reference")


def test_the_command_line_asks_for_pia_too(up: Up, tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(picture_file(160, 320))
    command = ["submit", "a cat", "--model", "pia", "--url", up.url, "--image", str(tmp_path / "cat.jpg")]
    output = tmp_path / "cat.mp4"
    assert cli.main([*command, "--steps", "1", "--motion", "large", "-o", str(output)]) == 0
    assert probe(output, fps=8) == (16, 8, 16)
