import asyncio
import io
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from ray import serve

from deployments.app import build
from deployments.client import Client
from deployments.telemetry.forwards import ReplicaStats
from pyramid_serve.api import (
    MODEL_NOT_FOUND,
    RequestError,
    Stage,
    Status,
    VideoRecord,
    VideoRequest,
    new_record,
)
from pyramid_serve.media.writers import write_video
from pyramid_serve.pyramid_flow.pipeline import PyramidFlow, VideoInput
from pyramid_serve.pyramid_flow.planning import settings_of
from pyramid_serve.storage import VideoFile, VideoNotFoundError, VideoStore
from tests.serve.conftest import deployed
from tests.serve.orchestrator.conftest import APP, Handle, config_of, request_of

pytestmark = pytest.mark.asyncio

Frames = NDArray[numpy.uint8]


@pytest.fixture(scope="module")
def pipeline(miniflux: Path) -> PyramidFlow:
    return PyramidFlow.from_pretrained(miniflux, dtype="float32")


@pytest.fixture
def picture() -> bytes:
    content = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(content, format="JPEG")
    return content.getvalue()


def frames_of_the_loop(pipeline: PyramidFlow, request: VideoRequest, record: VideoRecord) -> Frames:
    """The frames (F, H, W, 3) that the library makes of a request in one process."""
    plan = record.plan
    picture = None if request.input_reference is None else Image.open(io.BytesIO(request.input_reference))
    settings = pipeline.settings(
        width=plan.width,
        height=plan.height,
        num_latent_frames=plan.num_units,
        sampling=settings_of(plan).sampling,
    )
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a replica
    try:
        videos = pipeline.generate([VideoInput(plan.prompt, seed=plan.seed, image=picture)], settings)
    finally:
        torch.set_num_threads(num_threads)
    frames: Frames = videos[0].numpy()
    return frames


def decode(file: bytes) -> Frames:
    arguments = ["-v", "error", "-i", "pipe:0", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), *arguments], input=file, capture_output=True, check=True
    ).stdout
    return numpy.frombuffer(done, numpy.uint8).reshape(-1, 64, 128, 3)


def blocks(frames: Frames) -> NDArray[numpy.float64]:
    """Mean brightness of blocks of 8 x 8, which survives encoding even where the frames are noise."""
    means: NDArray[numpy.float64] = frames.reshape(-1, 8, 8, 16, 8, 3).mean(axis=(2, 4, 5))
    return means


async def frames_of(handle: Handle, video_id: str, first_unit: int = 0) -> Frames:
    return numpy.concatenate([frames async for frames in Client(handle).frames(video_id, first_unit)])


async def eventually(condition: Callable[[], Any], *, timeout_s: float = 20) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("has_picture", [False, True])
async def test_a_video_is_that_of_the_library(
    handle: Handle, pipeline: PyramidFlow, picture: bytes, has_picture: bool
) -> None:
    request = request_of(input_reference=picture if has_picture else None)
    record = await handle.generate.remote(request)
    assert record.status is Status.COMPLETED and record.progress == 100
    expected = frames_of_the_loop(pipeline, request, record)
    assert numpy.array_equal(await frames_of(handle, record.id), expected)


async def test_eight_videos_at_once_have_the_bytes_of_each_alone_and_of_the_library(
    handle: Handle, pipeline: PyramidFlow, store: VideoStore, tmp_path: Path
) -> None:
    requests = [request_of(20 + index, seconds=(0.3, 0.7)[index % 2], steps=1 + index % 3) for index in range(8)]

    records = await asyncio.gather(*(handle.generate.remote(request) for request in requests))
    together = [store.files.fetch(record.id, VideoFile.VIDEO) for record in records]
    for request, record, file in zip(requests, records, together, strict=True):
        frames = frames_of_the_loop(pipeline, request, record)
        units = torch.from_numpy(frames).split([record.plan.unit(u).num_frames for u in range(record.plan.num_units)])
        write_video(units, tmp_path / "video.mp4", fps=24)
        assert file == (tmp_path / "video.mp4").read_bytes()
    for index in (1, 6):
        alone = await handle.generate.remote(requests[index])
        assert store.files.fetch(alone.id, VideoFile.VIDEO) == together[index]
        latents = (store.files.load_latents(video_id) for video_id in (alone.id, records[index].id))
        assert all(map(numpy.array_equal, *latents))


async def test_the_file_and_the_stream_hold_the_pictures(handle: Handle, store: VideoStore) -> None:
    record = await handle.generate.remote(request_of(2))
    made = await frames_of(handle, record.id)
    file = decode(await asyncio.to_thread(store.files.fetch, record.id, VideoFile.VIDEO))
    assert file.shape == made.shape == (25, 64, 128, 3)
    assert numpy.abs(blocks(file) - blocks(made)).mean() < 4
    streams = [b"".join([part async for part in fragments(handle, record.id)]) for _ in range(2)]
    assert streams[0] == streams[1]
    assert numpy.array_equal(decode(streams[0]), file)


def fragments(handle: Handle, video_id: str) -> Any:
    return handle.options(stream=True).fragments.remote(video_id)


async def test_viewers_get_equal_bytes_while_it_is_made_and_after(handle: Handle) -> None:
    record = await handle.submit.remote(request_of(3, seconds=5))
    started, arrivals = time.monotonic(), []

    async def watch() -> bytes:
        parts = []
        async for part in fragments(handle, record.id):
            arrivals.append(time.monotonic() - started)
            parts.append(part)
        return b"".join(parts)

    first, second = await asyncio.gather(watch(), watch())
    total = time.monotonic() - started
    assert first == second == b"".join([part async for part in fragments(handle, record.id)])
    assert min(arrivals) < total / 2


async def test_a_stream_yields_the_frames_unit_by_unit(handle: Handle) -> None:
    units = [frames async for frames in Client(handle).stream(request_of(4))]
    assert [len(frames) for frames in units] == [1, 8, 8, 8]
    (newest, *_), _ = await handle.list.remote(limit=1)
    assert newest.record.status is Status.COMPLETED
    assert numpy.array_equal(numpy.concatenate(units), await frames_of(handle, newest.record.id))
    assert numpy.array_equal(numpy.concatenate(units[2:]), await frames_of(handle, newest.record.id, 2))


async def test_the_record_tells_the_truth_as_it_goes(handle: Handle) -> None:
    record = await handle.submit.remote(request_of(6, steps=4))
    assert (record.status, record.progress) == (Status.QUEUED, 0)
    views = [view async for view in handle.options(stream=True).events.remote(record.id)]
    statuses = [view.record.status for view in views]
    assert list(dict.fromkeys(statuses))[-2:] == [Status.IN_PROGRESS, Status.COMPLETED]
    progress = [view.record.progress for view in views]
    assert progress == sorted(progress) and progress[-1] == 100
    assert any(0 < percent < 100 for percent in progress)
    done = views[-1].record
    work = {(entry.stage, entry.unit) for entry in done.timeline}
    assert work >= {(stage, unit) for stage in (Stage.DENOISE, Stage.DECODE, Stage.SAVE) for unit in range(4)}
    assert (Stage.ENCODE, None) in work
    assert done.created_at <= done.started_at <= done.first_frame_at <= done.completed_at
    assert {computed.part for computed in done.computed} == {"text_encoder", "denoiser", "decoder"}
    assert {(computed.dtype, computed.device) for computed in done.computed} == {("float32", "cpu")}
    assert done.prompt_truncated_at is None


async def test_the_record_says_where_a_prompt_that_is_too_long_was_cut(handle: Handle, pipeline: PyramidFlow) -> None:
    request = request_of(21, seconds=0.1, steps=1).model_copy(update={"prompt": "a red ball rolls, " * 40})
    record = await handle.generate.remote(request)
    assert record.status is Status.COMPLETED
    assert record.prompt_truncated_at == pipeline.text_encoder.truncated_at(record.plan.full_prompt)
    assert 0 < record.prompt_truncated_at < len(request.prompt)
    assert record.negative_prompt_truncated_at is None
    assert record.public()["prompt_truncated_at"] == record.prompt_truncated_at


def hidden_share(record: VideoRecord) -> float:
    """How much of the decoding, the last unit's aside, happened while later units were denoised."""
    by_stage: dict[Stage, dict[int, tuple[float, float]]] = {Stage.DENOISE: {}, Stage.DECODE: {}}
    for entry in record.timeline:
        if entry.stage in by_stage and entry.unit is not None:
            by_stage[entry.stage][entry.unit] = (entry.start, entry.end)
    last = record.plan.num_units - 1
    hidden = total = 0.0
    for unit in range(last):
        start, end = by_stage[Stage.DECODE][unit]
        total += end - start
        for later in range(unit + 1, last + 1):
            denoise_start, denoise_end = by_stage[Stage.DENOISE][later]
            hidden += max(min(end, denoise_end) - max(start, denoise_start), 0.0)
    return hidden / total


async def test_decoding_is_hidden_behind_denoising(handle: Handle) -> None:
    record = await handle.generate.remote(request_of(7, seconds=2, steps=20, size="256x128"))
    assert record.plan.num_units == 7
    assert hidden_share(record) >= 0.9


async def test_a_cancelled_video_is_worked_on_by_nobody(handle: Handle) -> None:
    record = await handle.submit.remote(request_of(8, seconds=5, steps=50))
    denoiser, decoder = (serve.get_deployment_handle(name, APP) for name in ("Denoiser", "Decoder"))

    async def is_started() -> bool:
        return (await handle.get.remote(record.id)).record.num_units_done >= 2

    await eventually(is_started)
    cancelled = await handle.cancel.remote(record.id)
    before: ReplicaStats = await denoiser.stats.remote()
    assert cancelled.public()["error"]["code"] == "cancelled" and cancelled.status is Status.FAILED
    await asyncio.sleep(0.5)
    after: ReplicaStats = await denoiser.stats.remote()
    assert after.num_present == 0 and after.num_forwards - before.num_forwards <= 2
    decoding: ReplicaStats = await decoder.stats.remote()
    assert decoding.num_present == 0 and decoding.num_memories == 0
    assert await handle.running.remote() == []
    assert (await handle.get.remote(record.id)).record == cancelled


async def test_a_caller_who_leaves_a_generate_or_a_stream_cancels_the_video(handle: Handle) -> None:
    generate = handle.generate.remote(request_of(9, seconds=5, steps=50))

    async def is_accepted() -> bool:
        views, _ = await handle.list.remote(limit=1)
        return any(view.record.plan.seed == 9 for view in views)

    await eventually(is_accepted)
    generate.cancel()
    stream = Client(handle).stream(request_of(10, seconds=5, steps=50))
    await anext(stream)
    await stream.aclose()

    async def are_cancelled() -> bool:
        views, _ = await handle.list.remote(limit=2)
        return all(view.record.error is not None and view.record.error.code == "cancelled" for view in views)

    async def is_nothing_running() -> bool:
        return bool(await handle.running.remote() == [])

    await eventually(are_cancelled)
    await eventually(is_nothing_running)


async def test_a_viewer_who_leaves_stops_nothing(handle: Handle) -> None:
    record = await handle.submit.remote(request_of(11, seconds=2))
    viewer = fragments(handle, record.id)
    await anext(viewer)
    viewer.cancel()
    assert (await handle.wait.remote(record.id)).status is Status.COMPLETED


async def test_a_deleted_video_is_gone_while_it_is_made(handle: Handle, store: VideoStore) -> None:
    record = await handle.submit.remote(request_of(12, seconds=5, steps=50))

    async def is_made() -> bool:
        return bool((await handle.get.remote(record.id)).record.num_units_done)

    await eventually(is_made)
    await handle.delete.remote(record.id)
    with pytest.raises(VideoNotFoundError):
        await handle.get.remote(record.id)
    await asyncio.sleep(0.5)
    assert record.id not in store.ids()
    assert not (Path(store.root) / "videos" / record.id).exists()


async def test_wrong_requests_are_refused_through_the_handle(handle: Handle) -> None:
    with pytest.raises(RequestError, match="size=100x64") as caught:
        await handle.submit.remote(VideoRequest(prompt="a", size="100x64"))
    assert caught.value.cause.param == "size"  # type: ignore[attr-defined]  # of the RayTaskError around it
    with pytest.raises(RequestError, match="input_reference"):
        await handle.submit.remote(VideoRequest(prompt="a", input_reference=b"no picture"))
    with pytest.raises(RequestError) as other:
        await handle.submit.remote(VideoRequest(prompt="a", model="sora-2"))
    assert other.value.cause.code == MODEL_NOT_FOUND  # type: ignore[attr-defined]


async def test_a_client_makes_one_video_of_one_key(handle: Handle) -> None:
    client = Client(handle)
    first, second = await asyncio.gather(*(client.submit(request_of(13), idempotency_key="the same") for _ in range(2)))
    assert first.id == second.id
    assert (await client.wait(first.id)).status is Status.COMPLETED
    units = [frames async for frames in client.stream(request_of(13))]
    assert numpy.array_equal(numpy.concatenate(units), await frames_of(handle, first.id))


async def test_viewers_of_one_video_get_its_frames_and_leave_nothing_in_the_decoders(handle: Handle) -> None:
    client, decoder = Client(handle), serve.get_deployment_handle("Decoder", APP)
    record = await client.submit(request_of(15, seconds=2))
    leaving = client.frames(record.id)
    await anext(leaving)
    await leaving.aclose()
    one, other = await asyncio.gather(*(asyncio.wait_for(frames_of(handle, record.id), 60) for _ in range(2)))
    assert numpy.array_equal(one, other)
    assert (await client.wait(record.id)).status is Status.COMPLETED

    async def is_nothing_left() -> bool:
        return not (await decoder.stats.remote()).num_memories

    await eventually(is_nothing_left)


async def test_a_video_that_cannot_be_made_is_tried_once_and_says_why(handle: Handle, store: VideoStore) -> None:
    whole = await handle.generate.remote(request_of(16))
    first, others = whole.plan.units
    units = (first.model_copy(update={"is_picture": True}), others)
    record = new_record(whole.plan.model_copy(update={"has_picture": True, "units": units}))
    await asyncio.to_thread(store.files.put_picture, record.id, b"no picture")
    await asyncio.to_thread(store.create, record)  # as if accepted by a claims that died
    failed = await asyncio.wait_for(handle.wait.remote(record.id), 60)
    assert (failed.status, failed.attempts) == (Status.FAILED, 1)
    assert failed.error is not None and failed.error.code == "invalid_input"
    assert failed.error.message.startswith("picture: not a readable image")


def soon_lost() -> dict[str, Any]:
    """What the record of a video says whose orchestrator is gone, with a lease that leaves time to write its files."""
    return {"status": Status.IN_PROGRESS, "owner": "gone", "lease_expires_at": time.time() + 2}


async def test_a_video_whose_numbers_overflow_fails_and_says_where(handle: Handle, store: VideoStore) -> None:
    whole = await handle.generate.remote(request_of(22))
    record = new_record(whole.plan).model_copy(update=soon_lost())
    latents = numpy.full((16, 1, 8, 16), numpy.nan, numpy.float32)

    def accept_with_latents() -> None:  # as if made by an orchestrator that died
        store.create(record)
        store.files.save_latents(record.id, 0, latents)

    await asyncio.to_thread(accept_with_latents)
    failed = await asyncio.wait_for(handle.wait.remote(record.id), 60)
    assert (failed.status, failed.attempts) == (Status.FAILED, 1)
    assert failed.error is not None and failed.error.code == "non_finite"
    assert "unit" in failed.error.message and "NaN among the values" in failed.error.message


async def test_an_app_whose_vae_overflows_starts_and_fails_its_videos(
    local_ray: None, miniflux: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(miniflux, checkpoint)
    weights = checkpoint / "causal_video_vae" / "diffusion_pytorch_model.bin"
    state = torch.load(weights, weights_only=True)
    state["decoder.conv_in.conv.weight"].fill_(float("inf"))
    torch.save(state, weights)
    with deployed(build(config_of(checkpoint, tmp_path / "videos")), "overflowing"):
        overflowing = serve.get_deployment_handle("Orchestrator", "overflowing")
        failed = await asyncio.wait_for(overflowing.generate.remote(request_of(23, seconds=0.5)), 120)
    assert failed.error is not None and failed.error.code == "non_finite"
    assert "unit 0: frames: NaN among the values, first at decoder.conv_in" in failed.error.message


async def test_a_video_goes_on_from_its_last_saved_unit(handle: Handle, store: VideoStore) -> None:
    whole = await handle.generate.remote(request_of(14))
    record = new_record(whole.plan).model_copy(update={**soon_lost(), "num_units_done": 1})

    def accept_with_units() -> None:  # as if its orchestrator and claims had died
        store.create(record)
        for unit, latents in enumerate(store.files.load_latents(whole.id)[:2]):
            store.files.save_latents(record.id, unit, latents)
        store.files.save_fragment(record.id, 0, store.files.load_fragment(whole.id, 0))

    await asyncio.to_thread(accept_with_units)
    done = await asyncio.wait_for(handle.wait.remote(record.id), 60)
    assert (done.status, done.attempts) == (Status.COMPLETED, 1)
    assert {entry.unit for entry in done.timeline if entry.stage is Stage.DENOISE} == {2, 3}
    assert {entry.unit for entry in done.timeline if entry.stage is Stage.DECODE} == {1, 2, 3}
    for unit in range(4):
        assert store.files.load_fragment(done.id, unit) == store.files.load_fragment(whole.id, unit)
    assert store.files.fetch(done.id, VideoFile.VIDEO) == store.files.fetch(whole.id, VideoFile.VIDEO)
