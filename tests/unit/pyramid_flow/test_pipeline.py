import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy
import pytest
import torch
from PIL import Image
from torch import nn

from pyramid_serve.dtypes import DTypeName
from pyramid_serve.errors import NonFiniteError
from pyramid_serve.pyramid_flow.autoencoder import Tiling
from pyramid_serve.pyramid_flow.codec import to_uint8
from pyramid_serve.pyramid_flow.noise import SeededNoise
from pyramid_serve.pyramid_flow.pipeline import Offload, Progress, PyramidFlow, VideoInput, VideoSettings
from pyramid_serve.pyramid_flow.settings import SamplingSettings
from pyramid_serve.pyramid_flow.shapes import LatentShape

DTYPES: tuple[DTypeName, ...] = ("float32", "float16")
STEPS = SamplingSettings((1, 2, 1), (1, 1, 2))


@pytest.fixture(scope="module", params=["mmdit", "miniflux"])
def pipeline(request: pytest.FixtureRequest) -> PyramidFlow:
    return PyramidFlow.from_pretrained(request.getfixturevalue(request.param))


def settings(pipeline: PyramidFlow, num_latent_frames: int = 3) -> VideoSettings:
    return pipeline.settings(width=128, height=64, num_latent_frames=num_latent_frames, sampling=STEPS)


def picture() -> Image.Image:
    return Image.linear_gradient("L").convert("RGB").resize((200, 100))


def test_text_becomes_frames(pipeline: PyramidFlow) -> None:
    frames = pipeline.generate([VideoInput("a ball")], settings(pipeline))
    assert frames.shape == (1, 17, 64, 128, 3)
    assert frames.dtype == torch.uint8


def test_the_stream_gives_the_whole_unit_by_unit(pipeline: PyramidFlow) -> None:
    whole = pipeline.generate([VideoInput("a ball", seed=5)], settings(pipeline))
    units = list(pipeline.stream([VideoInput("a ball", seed=5)], settings(pipeline)))
    assert [unit.shape[1] for unit in units] == [1, 8, 8]
    assert torch.equal(torch.cat(units, dim=1), whole)


def test_the_first_frames_come_before_the_last_unit_is_made(pipeline: PyramidFlow) -> None:
    seen: list[Progress] = []
    stream = pipeline.stream([VideoInput("a ball")], settings(pipeline), progress=seen.append)
    next(stream)
    assert {progress.unit for progress in seen} == {0}


def test_progress_counts_every_step_of_every_unit(pipeline: PyramidFlow) -> None:
    seen: list[Progress] = []
    pipeline.generate_latents([VideoInput("a ball")], settings(pipeline), progress=seen.append)
    assert seen == [Progress(u, 3, s + 1, 4) for u in range(3) for s in range(4)]


def test_several_videos_of_a_call_equal_each_alone_bit_for_bit(pipeline: PyramidFlow) -> None:
    videos = [VideoInput("a ball", seed=1), VideoInput("FPV over the Great Wall at dawn", seed=2)]
    together = pipeline.generate_latents(videos, settings(pipeline))
    alone = [pipeline.generate_latents([video], settings(pipeline)) for video in videos]
    assert torch.equal(together, torch.cat(alone))


def test_the_same_seed_gives_the_same_bits_and_another_does_not(pipeline: PyramidFlow) -> None:
    a, b, c = (pipeline.generate_latents([VideoInput("a", seed=s)], settings(pipeline)) for s in (4, 4, 5))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("num_made", [0, 1, 2, 3])
def test_resumed_equals_uninterrupted(pipeline: PyramidFlow, num_made: int) -> None:
    latents = pipeline.generate_latents([VideoInput("a ball", seed=9)], settings(pipeline))
    resumed = VideoInput("a ball", seed=9, latents=latents[0, :, :num_made])
    assert torch.equal(pipeline.generate_latents([resumed], settings(pipeline)), latents)


def test_a_picture_becomes_unit_zero(pipeline: PyramidFlow) -> None:
    video = VideoInput("it moves", image=picture())
    latents = pipeline.generate_latents([video], settings(pipeline))
    longer = pipeline.generate_latents([video], settings(pipeline, 4))
    assert torch.equal(latents, longer[:, :, :3])
    other = pipeline.generate_latents([VideoInput("it sinks", seed=3, image=picture())], settings(pipeline))
    assert torch.equal(other[:, :, 0], latents[:, :, 0])
    assert not torch.equal(other[:, :, 1], latents[:, :, 1])


@pytest.mark.parametrize("num_made", [0, 1, 2])
def test_a_video_of_a_picture_resumes_from_any_unit(pipeline: PyramidFlow, num_made: int) -> None:
    whole = pipeline.generate_latents([VideoInput("it moves", image=picture())], settings(pipeline))
    resumed = VideoInput("it moves", image=picture(), latents=whole[0, :, :num_made])
    assert torch.equal(pipeline.generate_latents([resumed], settings(pipeline)), whole)


def test_a_single_picture_is_a_video_of_one_frame(pipeline: PyramidFlow) -> None:
    assert pipeline.generate([VideoInput("a ball")], settings(pipeline, 1)).shape == (1, 1, 64, 128, 3)


def test_a_tiled_stream_equals_the_tiled_whole(pipeline: PyramidFlow) -> None:
    videos, tiling = [VideoInput("a ball")], Tiling(64)
    whole = pipeline.generate(videos, settings(pipeline), tiling=tiling)
    units = list(pipeline.stream(videos, settings(pipeline), tiling=tiling))
    assert torch.equal(torch.cat(units, dim=1), whole)
    assert not torch.equal(pipeline.generate(videos, settings(pipeline)), whole)


@pytest.mark.parametrize("offload", ["model", "layers"])
def test_offloading_changes_nothing(mmdit: Path, offload: Offload) -> None:
    videos = [VideoInput("a ball", image=picture())]
    plain, offloaded = (PyramidFlow.from_pretrained(mmdit, offload=where) for where in ("none", offload))  # type: ignore[arg-type]
    assert torch.equal(
        offloaded.generate(videos, settings(offloaded)), torch.cat(list(plain.stream(videos, settings(plain))), dim=1)
    )


def test_bfloat16_makes_a_video(miniflux: Path) -> None:
    pipeline = PyramidFlow.from_pretrained(miniflux, dtype=torch.bfloat16)
    latents = pipeline.generate_latents([VideoInput("a ball")], settings(pipeline))
    exact = PyramidFlow.from_pretrained(miniflux).generate_latents([VideoInput("a ball")], settings(pipeline))
    assert latents.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(latents.flatten(), exact.flatten(), dim=0) > 0.99


def test_what_does_not_fit_is_refused_before_any_work(pipeline: PyramidFlow) -> None:
    fine = settings(pipeline)
    with pytest.raises(ValueError, match="give at least one"):
        pipeline.stream([], fine)
    with pytest.raises(ValueError, match="latents: shape"):
        pipeline.stream([VideoInput("a", latents=torch.zeros(16, 1, 4, 4))], fine)
    with pytest.raises(ValueError, match="at most 3 frames"):
        pipeline.stream([VideoInput("a", latents=torch.zeros(16, 4, 8, 16))], fine)
    with pytest.raises(ValueError, match="must begin at the same unit"):
        pipeline.stream([VideoInput("a"), VideoInput("b", image=picture())], fine)
    with pytest.raises(ValueError, match="say which settings"):
        pipeline.stream([VideoInput("a", latents=torch.zeros(16, 1, 8, 16)), VideoInput("b", image=picture())])
    with pytest.raises(ValueError, match="image: 1x2000000 is too long and narrow for 128x64"):
        pipeline.stream([VideoInput("a", image=Image.new("RGB", (1, 2_000_000)))], fine)
    with pytest.raises(ValueError, match="size=100x64"):
        pipeline.settings(width=100, height=64)
    with pytest.raises(ValueError, match="give both"):
        pipeline.settings(width=128)
    with pytest.raises(ValueError, match="num_latent_frames=0"):
        pipeline.settings(num_latent_frames=0)


def test_float16_makes_the_video_of_float32_and_not_a_black_one() -> None:
    """The decoder of the model in the box leaves the range of float16."""
    sampling = SamplingSettings((2, 2, 2), (1, 1, 1), 4.0, 1.0)
    video = VideoInput("a red circle moves right on a white background", seed=1)
    whole, half = (
        pipeline.generate([video], pipeline.settings(num_latent_frames=2, sampling=sampling)).float()
        for pipeline in (PyramidFlow.from_pretrained("shapes", dtype=dtype) for dtype in DTYPES)
    )
    assert (whole - half).abs().mean() < 3
    assert whole.std() > 20


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_given_latents_that_are_no_numbers_are_refused_before_any_work(pipeline: PyramidFlow, value: float) -> None:
    latents = torch.zeros(16, 2, 8, 16)
    latents[3, 1, 2, 2] = value
    with pytest.raises(NonFiniteError, match="latents: unit 1"):
        pipeline.stream([VideoInput("a ball", latents=latents)], settings(pipeline))
    with pytest.raises(NonFiniteError, match="unit 1: latents"):
        list(pipeline.decode(latents[None]))


def test_a_decoder_that_overflows_fails_the_unit_and_names_the_layer(mmdit: Path) -> None:
    pipeline = PyramidFlow.from_pretrained(mmdit, dtype="float32")
    with torch.no_grad():
        pipeline.vae.decoder.conv_in.conv.weight.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match=r"unit 0: frames: NaN.*first at decoder\.conv_in"):
        pipeline.generate([VideoInput("a ball")], settings(pipeline))


def test_a_transformer_that_overflows_fails_the_unit_and_names_the_stage(mmdit: Path) -> None:
    pipeline = PyramidFlow.from_pretrained(mmdit, dtype="float32")
    with torch.no_grad():
        next(iter(cast(nn.Module, pipeline.transformer).parameters())).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="unit 0: latents after stage 0: NaN"):
        pipeline.generate_latents([VideoInput("a ball")], settings(pipeline))


def test_a_prompt_that_is_too_long_is_cut_with_a_warning_that_says_where(
    pipeline: PyramidFlow, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = ["a ball", "a ball, " * 60]
    with caplog.at_level(logging.WARNING):
        short, long = pipeline.encode_prompts(prompts, prompt_suffix=", 8K", negative_prompt="")[0]
    assert short.truncated_at is None
    assert long.truncated_at is not None and 0 < long.truncated_at < len(prompts[1])
    (record,) = caplog.records
    assert f"stopped at character {long.truncated_at} of {len(prompts[1]) + 4}" in record.message


def pixels_of(picture: object) -> Any:
    assert isinstance(picture, Image.Image)
    return numpy.asarray(picture)


def test_a_prompt_is_a_video_and_so_is_each_of_several(pipeline: PyramidFlow) -> None:
    inputs = [VideoInput("a ball"), VideoInput("a cube")]
    both = pipeline.generate_latents(inputs, settings(pipeline, 2))
    assert torch.equal(pipeline.generate_latents(["a ball", "a cube"], settings(pipeline, 2)), both)
    assert torch.equal(pipeline.generate_latents([inputs[0], "a cube"], settings(pipeline, 2)), both)
    one = pipeline.generate(inputs[:1], settings(pipeline, 2))
    assert torch.equal(pipeline.generate("a ball", settings(pipeline, 2)), one)
    assert torch.equal(pipeline.generate(inputs[0], settings(pipeline, 2)), one)
    assert torch.equal(torch.cat(list(pipeline.stream("a ball", settings(pipeline, 2))), dim=1), one)
    (first, *_) = pipeline.stream_latents(("a ball",), settings(pipeline, 2))
    assert first.shape == (1, 16, 1, 8, 16)


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        (None, "videos=None: must be a prompt, a VideoInput, or a sequence of them, not NoneType"),
        (7, "videos=7: must be a prompt"),
        (b"a ball", "videos=b'a ball': must be a prompt"),
        ({"prompt": "a ball"}, "videos={'prompt': 'a ball'}: must be a prompt"),
        ([], "videos: give at least one"),
        ("", "prompt='': must not be blank"),
        (["a ball", None], r"videos\[1\]: prompt=None: must be text, not NoneType"),
        (["a ball", " \n"], r"videos\[1\]: prompt=.*: must not be blank"),
        ("a\0ball", r"prompt=.*U\+0000 at character 2"),
        ("a \ud800 ball", r"prompt=.*U\+D800 at character 3"),
    ],
)
def test_what_is_no_video_is_refused_where_it_is_given(pipeline: PyramidFlow, videos: Any, message: str) -> None:
    for call in (pipeline.generate, pipeline.stream, pipeline.generate_latents, pipeline.stream_latents):
        with pytest.raises(ValueError, match=message):
            call(videos, settings(pipeline))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prompt", 3, "prompt=3: must be text, not int"),
        ("prompt", b"a", "prompt=b'a': must be text, not bytes"),
        ("prompt", "", "prompt='': must not be blank"),
        ("seed", 1.5, "seed=1.5: must be a whole number from 0 to 18446744073709551615, or -1 or None to draw one"),
        ("seed", True, "seed=True: must be"),
        ("seed", "3", "seed='3': must be"),
        ("seed", 2**64, "seed=18446744073709551616: must be"),
        ("seed", -2, "seed=-2: must be"),
        ("seed", float("nan"), "seed=nan: must be"),
        ("image", "no such file.png", "image=no such file.png: no such file"),
        ("image", b"no picture", "image: not a readable image"),
        ("image", [1, 2], "image: must be a path"),
        ("image", numpy.zeros((3, 64, 64), numpy.uint8), "image: shape"),
        ("image", numpy.full((4, 4), numpy.nan), "image: has values that are NaN"),
        ("latents", [1, 2], "latents: must be a tensor of floating-point numbers, not list"),
        ("latents", torch.zeros(16, 1, 8, 16, dtype=torch.int64), "latents: must be .* not torch.int64"),
    ],
)
def test_a_video_input_refuses_what_it_cannot_use(field: str, value: Any, message: str) -> None:
    given: dict[str, Any] = {"prompt": "a", field: value}
    with pytest.raises(ValueError, match=message):
        VideoInput(**given)


@pytest.mark.parametrize("seed", [None, -1])
def test_a_seed_that_is_not_given_is_drawn_and_told(seed: int | None) -> None:
    drawn = [VideoInput("a", seed=seed).seed for _ in range(8)]
    assert len(set(drawn)) == 8
    assert all(isinstance(value, int) and 0 <= value < 2**64 for value in drawn)
    assert VideoInput("a").seed == 0


def test_every_seed_from_0_to_the_largest_makes_its_noise() -> None:
    shape = LatentShape(1, 8, 16)
    for seed in (0, 7, 2**63, 2**64 - 1):
        noise = VideoInput("a", seed=seed).noise_source(shape)
        assert torch.equal(noise.initial(0), SeededNoise(seed, shape).initial(0))
        assert type(VideoInput("a", seed=cast(int, numpy.uint64(seed))).seed) is int
    # The first numbers of seed 7 as they have always been.
    first = SeededNoise(7, shape).initial(0).flatten()[:3]
    assert first.tolist() == pytest.approx([0.302259, -0.065828, -0.043738], abs=1e-4)


def test_a_picture_is_the_same_in_whatever_way_the_library_is_given_it(tmp_path: Path) -> None:
    upright = Image.linear_gradient("L").convert("RGB").resize((40, 24))
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a.png", exif=exif)
    for source in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        (tmp_path / "a.png").read_bytes(),
        Image.open(tmp_path / "a.png"),
        numpy.asarray(upright),
        torch.from_numpy(numpy.array(upright)) / 255,
    ):
        assert (pixels_of(VideoInput("a", image=source).image) == numpy.asarray(upright)).all()


def test_an_image_that_is_drawn_on_later_does_not_change_the_video() -> None:
    image = Image.new("RGB", (8, 8), "white")
    video = VideoInput("a", image=image)
    image.paste("black", (0, 0, 8, 8))
    assert pixels_of(video.image).min() == 255
    assert pixels_of(replace(video, seed=3).image).min() == 255


@pytest.mark.parametrize("value", [2.5, True, "4", float("nan"), 0, -1, None])
@pytest.mark.parametrize("field", ["width", "height", "num_latent_frames"])
def test_settings_that_are_no_whole_numbers_are_refused(pipeline: PyramidFlow, field: str, value: Any) -> None:
    fine = settings(pipeline)
    with pytest.raises(ValueError, match=field):
        replace(fine, **{field: value})
    if value is not None:
        sizes = {"width": 128, "height": 64, field: value}
        with pytest.raises(ValueError, match=field):
            pipeline.settings(**sizes)
    assert replace(fine, **{field: numpy.int64(128)}) == replace(fine, **{field: 128})


@pytest.mark.parametrize(
    ("field", "value"),
    [("prompt_suffix", None), ("negative_prompt", 3), ("negative_prompt", "a\0"), ("sampling", (20, 20, 20))],
)
def test_settings_of_other_types_are_refused_by_name(pipeline: PyramidFlow, field: str, value: Any) -> None:
    given: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=f"{field}="):
        replace(settings(pipeline), **given)


def test_settings_and_tiling_of_other_types_are_refused_before_any_work(pipeline: PyramidFlow) -> None:
    wrong_settings: Any = {"width": 128}
    wrong_tiling: Any = 64
    with pytest.raises(ValueError, match="settings="):
        pipeline.stream("a ball", wrong_settings)
    with pytest.raises(ValueError, match="tiling=64: must be a Tiling"):
        pipeline.stream("a ball", settings(pipeline), tiling=wrong_tiling)
    with pytest.raises(ValueError, match="prompts='a ball'"):
        pipeline.encode_prompts("a ball", prompt_suffix="", negative_prompt="")


@pytest.mark.parametrize(
    "latents",
    [
        None,
        [0.0],
        torch.zeros(1, 16, 1, 8, 16, dtype=torch.int64),
        torch.zeros(16, 1, 8, 16),
        torch.zeros(1, 16, 1, 8, 16, device="meta"),
        torch.zeros(1, 16, 1, 8, 16, dtype=torch.complex64),
    ],
)
def test_what_is_no_tensor_of_latents_is_not_decoded(pipeline: PyramidFlow, latents: object) -> None:
    with pytest.raises(ValueError, match="latents: must be a dense floating-point tensor"):
        pipeline.decode(cast(torch.Tensor, latents))


@pytest.mark.parametrize("latents", [torch.tensor(0.0), torch.zeros(16, 1, 8, 16, device="meta")])
def test_a_video_goes_on_from_no_other_tensor(latents: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="latents: must be a tensor of floating-point numbers"):
        VideoInput("a ball", latents=latents)


@pytest.mark.parametrize("device", ["nope", "meta", "cuda:99"])
def test_a_device_that_is_not_here_is_refused(miniflux: Path, device: str) -> None:
    with pytest.raises(ValueError, match="device="):
        PyramidFlow.from_pretrained(miniflux, device=device)


def test_another_way_to_offload_is_refused(miniflux: Path) -> None:
    with pytest.raises(ValueError, match="offload='x': must be one of none, model, layers"):
        PyramidFlow.from_pretrained(miniflux, offload=cast(Offload, "x"))


def test_pixels_become_bytes_by_truncation() -> None:
    pixels = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.999, 1.0, 3.0]).view(1, 1, 1, 7).expand(3, 1, 1, 7)
    assert to_uint8(pixels)[0, 0, :, 0].tolist() == [0, 0, 0, 127, 254, 255, 255]
    assert to_uint8(torch.zeros(3, 9, 4, 6)).shape == (9, 4, 6, 3)
