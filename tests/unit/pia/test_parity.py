"""The same latents and frames as ``diffusers.PIAPipeline``, by its golden outputs."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from pyramid_serve.media.tensors import fit_picture
from pyramid_serve.pia.codec import decode_frames, encode_picture
from pyramid_serve.pia.model_files import model_files
from pyramid_serve.pia.parts import load_unet, load_vae
from pyramid_serve.pia.sampler import Conditioning, SamplingSettings, Steps, denoise
from pyramid_serve.pia.schedulers import new_scheduler
from pyramid_serve.pia.settings import FreeInit, MotionKind, num_steps
from pyramid_serve.pia.text_encoder import TextEncoder
from pyramid_serve.pia.unet import predict
from tests.unit.pia.golden import (
    CASES,
    CHECKPOINT,
    HEIGHT,
    NEGATIVE_PROMPT,
    PROMPT,
    SEED,
    WIDTH,
    Case,
    golden,
    latents_of_pipeline,
    picture,
    pipeline_of,
)
from tests.unit.pia.tiny import SCHEDULER

CPU = torch.device("cpu")


class NoiseOfOneGenerator:
    """What ``PIAPipeline`` draws: for all purposes in turn, from one generator."""

    def __init__(self, num_frames: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(SEED)
        self._initial = self._draw((4, num_frames, HEIGHT // 2, WIDTH // 2))
        self._picture = self._draw((4, HEIGHT // 2, WIDTH // 2))

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        return self._initial

    def picture(self, shape: tuple[int, ...]) -> Tensor:
        return self._picture

    def strength(self, shape: tuple[int, ...]) -> Tensor:
        return self._draw(shape)

    def free_init(self, iteration: int, shape: tuple[int, ...]) -> Tensor:
        return self._draw(shape)

    def step(self, iteration: int, step: int) -> torch.Generator:
        return self._generator

    def _draw(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self._generator)


@cache
def conditioning(clip_skip: int) -> Conditioning:
    encoder = TextEncoder(CHECKPOINT, dtype=torch.float32, device=CPU)
    vae = load_vae(model_files(CHECKPOINT), dtype=torch.float32, device=CPU)
    mean, std = encode_picture(vae, fit_picture(picture(), height=HEIGHT, width=WIDTH))
    return Conditioning(encoder.encode(PROMPT)[clip_skip], encoder.encode(NEGATIVE_PROMPT)[0], mean, std)


def settings_of(case: Case) -> SamplingSettings:
    return SamplingSettings(
        motion=MotionKind.of_scale(case["motion_scale"]),
        num_frames=case["num_frames"],
        scheduler=case["scheduler"],
        num_inference_steps=case["num_inference_steps"],
        guidance_scale=case["guidance_scale"],
        strength=case["strength"],
        free_init=None if case["free_init"] is None else FreeInit(**case["free_init"]),
    )


def steps_of(case: Case) -> Steps:
    return denoise(
        conditioning(case["clip_skip"]),
        settings_of(case),
        scheduler=new_scheduler(case["scheduler"], SCHEDULER),
        noise=NoiseOfOneGenerator(case["num_frames"]),
    )


def run(unet: Any, steps: Steps) -> tuple[Tensor, int]:
    """The latents, and how many steps there were."""
    count, responses = 0, None
    with torch.inference_mode():
        while True:
            try:
                rows = steps.send(responses)  # type: ignore[arg-type]
            except StopIteration as finished:
                return finished.value, count
            responses = predict(unet, rows, one_by_one=True)
            count += 1


@pytest.fixture(scope="module")
def unet() -> Any:
    return load_unet(model_files(CHECKPOINT), dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def outputs() -> dict[str, Tensor]:
    return golden()


@pytest.mark.parametrize("name", CASES)
def test_the_latents_are_those_of_the_published_pipeline(name: str, unet: Any, outputs: dict[str, Tensor]) -> None:
    case = CASES[name]
    if case["free_u"] is not None:
        unet.enable_freeu(**case["free_u"])
    try:
        latents, count = run(unet, steps_of(case))
    finally:
        unet.disable_freeu()
    largest = outputs[name].abs().max().clamp(min=1)  # Euler's first latents are 25 times as large as those of others
    assert (latents - outputs[name]).abs().max() / largest <= 1e-5
    settings = settings_of(case)
    planned = num_steps(
        case["scheduler"], case["num_inference_steps"], strength=case["strength"], free_init=settings.free_init
    )
    assert count == planned


def test_the_frames_are_those_of_the_published_pipeline(outputs: dict[str, Tensor]) -> None:
    vae = load_vae(model_files(CHECKPOINT), dtype=torch.float32, device=CPU)
    with torch.inference_mode():
        frames = decode_frames(vae, outputs["motion 0"])
    assert frames.shape == (16, HEIGHT, WIDTH, 3)
    differences = (frames.int() - outputs["frames"].int()).abs()
    assert differences.max() <= 1 and differences.count_nonzero() <= 3  # where a value is just between two bytes


def test_no_two_cases_have_the_same_latents(outputs: dict[str, Tensor]) -> None:
    same = [
        {one, other}
        for one in CASES
        for other in CASES
        if one < other and outputs[one].shape == outputs[other].shape and torch.equal(outputs[one], outputs[other])
    ]
    assert same == [], "a setting has no effect"


@pytest.mark.slow
def test_the_golden_outputs_are_what_the_pipeline_still_makes(outputs: dict[str, Tensor]) -> None:
    pipeline = pipeline_of(CHECKPOINT)
    for name, case in CASES.items():
        difference = (latents_of_pipeline(pipeline, case) - outputs[name]).abs().max()
        assert difference <= 1e-5 * outputs[name].abs().max().clamp(min=1), name
