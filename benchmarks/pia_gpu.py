"""PIA's UNet in its published size with random weights on a CUDA device: seconds, share of the matrix rate, memory.

``python -m benchmarks.library gpu --families pia`` runs it. With ``--device cpu`` it measures the tiny model of the
tests, so that it can be seen to work.
"""

import gc
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.library import GOLDEN, count, seconds_of
from pyramid_serve.pia.compiled import set_up
from pyramid_serve.pia.model_files import model_files
from pyramid_serve.pia.noise import SeededNoise
from pyramid_serve.pia.parts import load_unet
from pyramid_serve.pia.sampler import Conditioning, SamplingSettings, UNetRow, denoise
from pyramid_serve.pia.schedulers import new_scheduler
from pyramid_serve.pia.settings import CompiledName, MotionKind
from pyramid_serve.pia.unet import predict
from pyramid_serve.precision import device_name

NUM_FRAMES, NUM_TEXT_TOKENS = 16, 77
PACKS = (1, 2, 4)


class Way(NamedTuple):
    """How the UNet is computed."""

    compiled: CompiledName
    channels_last: bool
    one_by_one: bool = False


WAYS = {
    "compiled": Way("blocks", True),
    "channels_last": Way("none", True),
    "eager": Way("none", False),
    "batch_invariant": Way("blocks", True, one_by_one=True),
}


class Size(NamedTuple):
    """Of what is measured: the side of the square latents, denoising steps, and the width of a prompt's tokens."""

    side: int
    num_inference_steps: int
    text_width: int


PUBLISHED = Size(64, 25, 768)
TINY = Size(8, 3, 8)


def measure_pia(device: str, *, compare: bool, seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of figures. compare: of all ``WAYS``, not of the first alone; seconds: begin no section after them."""
    end, on = time.monotonic() + seconds, torch.device(device)
    is_cuda = on.type == "cuda"
    size = PUBLISHED if is_cuda else TINY
    rate = matrix_rate(on)
    flops = row_flops(size) if is_cuda else None
    about = {"torch": torch.__version__, "matrix_tflops": rate / 1e12}
    yield {"device": device_name(on), **about, "row_tflop": None if flops is None else flops / 1e12}
    exact: list[Tensor] | None = None
    for way in list(WAYS) if compare else list(WAYS)[:1]:
        unet = random_unet(on)
        set_up(unet, on, compiled=WAYS[way].compiled if is_cuda else "none", channels_last=WAYS[way].channels_last)
        started = time.monotonic()
        for num_rows in (1, 2):  # as the warm-up does
            predicted(unet, random_rows(num_rows, size, on), WAYS[way])
        yield {"part": "warm-up", "way": way, "seconds": time.monotonic() - started}
        alone = predicted(unet, random_rows(2, size, on), WAYS[way])
        exact = exact or alone
        yield {
            "part": "same bits",
            "way": way,
            "again": is_same(alone, predicted(unet, random_rows(2, size, on), WAYS[way])),
            "packed_with_others": is_same(alone, predicted(unet, random_rows(4, size, on), WAYS[way])[:2]),
            "differs_from_first_way": max(float((a - b).abs().max()) for a, b in zip(alone, exact, strict=True)),
        }
        for num_videos in PACKS:
            if time.monotonic() < end:
                yield {
                    "part": "step",
                    "way": way,
                    **step(unet, num_videos, size, on, WAYS[way], flops=flops, rate=rate),
                }
        if time.monotonic() < end:
            yield {"part": "video", "way": way, **video(unet, size, on, WAYS[way], flops=flops, rate=rate)}
        del unet


def step(
    unet: Any, num_videos: int, size: Size, device: torch.device, way: Way, *, flops: float | None, rate: float
) -> dict[str, Any]:
    """One step of so many videos with guidance, packed."""
    rows = random_rows(2 * num_videos, size, device)
    forget_peak(device)
    seconds = seconds_of(lambda: predicted(unet, rows, way), device=str(device))
    share = None if flops is None else 2 * num_videos * flops / seconds / rate
    return {
        "packed": num_videos,
        "milliseconds_per_video": 1000 * seconds / num_videos,
        "share_of_matrix_rate": share,
        "peak_gigabytes": peak_gigabytes(device),
    }


def video(unet: Any, size: Size, device: torch.device, way: Way, *, flops: float | None, rate: float) -> dict[str, Any]:
    """The latents of one video with guidance by DDIM, from its first step to its last."""
    seconds = seconds_of(lambda: latents_of(unet, size, device, way), repeats=1, device=str(device))
    num_rows = 2 * size.num_inference_steps
    return {
        "steps": size.num_inference_steps,
        "seconds": seconds,
        "share_of_matrix_rate": None if flops is None else num_rows * flops / seconds / rate,
        "petaflop": None if flops is None else num_rows * flops / 1e15,
    }


def latents_of(unet: Any, size: Size, device: torch.device, way: Way) -> Tensor:
    shape = (4, size.side, size.side)
    text = torch.zeros(NUM_TEXT_TOKENS, size.text_width, device=device)
    given = Conditioning(text, text, torch.zeros(shape, device=device), torch.ones(shape, device=device))
    settings = SamplingSettings(MotionKind("animate", "moderate"), NUM_FRAMES, "ddim", size.num_inference_steps, 7.5)
    steps = denoise(given, settings, scheduler=new_scheduler("ddim", {}), noise=SeededNoise(0))
    responses: Sequence[Tensor] | None = None
    while True:
        try:
            responses = predicted(unet, steps.send(responses), way)  # type: ignore[arg-type]
        except StopIteration as finished:
            latents: Tensor = finished.value
            return latents


def published_unet() -> Any:
    """The UNet of Stable Diffusion 1.5 with PIA's motion modules, 1.277 billion parameters, on no device at all."""
    import diffusers

    make: Any = diffusers
    with torch.device("meta"):
        base = make.UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
        )
        adapter = make.MotionAdapter(motion_max_seq_length=32, conv_in_channels=9, use_motion_mid_block=False)
        unet = diffusers.UNetMotionModel.from_unet2d(base, adapter, load_weights=False)
    return unet.to("meta").eval().requires_grad_(False)


def random_unet(device: torch.device) -> Any:
    """The published UNet in bfloat16; on a CPU the tiny one of the tests. The same weights each time."""
    if device.type != "cuda":
        return load_unet(model_files(GOLDEN / "pia" / "checkpoint"), dtype=torch.float32, device=device)
    unet = published_unet().to(torch.bfloat16).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(1)
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter.shape[1:].numel() ** -0.5, generator=generator)  # so that every layer acts
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    for name, buffer in unet.named_buffers():  # the positions of the motion modules, which have no weights
        if not name.endswith("pe"):
            raise ValueError(f"{name}: a buffer that this does not know")
        buffer.normal_(0, 0.7, generator=generator)
    return unet


def random_rows(num_rows: int, size: Size, device: torch.device) -> list[UNetRow]:
    """The first rows of more are those of fewer."""
    generator = torch.Generator(device).manual_seed(2)
    return [
        UNetRow(
            torch.randn(9, NUM_FRAMES, size.side, size.side, generator=generator, device=device),
            torch.tensor(900.0 - 100 * row, device=device),
            torch.randn(NUM_TEXT_TOKENS, size.text_width, generator=generator, device=device),
        )
        for row in range(num_rows)
    ]


def predicted(unet: Any, rows: Sequence[UNetRow], way: Way) -> list[Tensor]:
    with torch.inference_mode():
        return predict(unet, rows, one_by_one=way.one_by_one)


def row_flops(size: Size) -> float:
    """Of one row, counted on no device."""
    unet = published_unet()
    with torch.device("meta"):
        sample = torch.empty(1, 9, NUM_FRAMES, size.side, size.side)
        text = torch.empty(NUM_FRAMES, NUM_TEXT_TOKENS, size.text_width)
        timestep = torch.empty(1)
    return count(lambda: unet(sample, timestep, encoder_hidden_states=text))


def is_same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of a large matrix product on this device, in bfloat16 on CUDA."""
    length, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a, b = torch.randn(2, length, length, device=device, dtype=dtype).unbind(0)
    return float(2 * length**3 / seconds_of(lambda: a @ b, repeats=20, device=str(device)))


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gigabytes(device: torch.device) -> float | None:
    """Since ``forget_peak``, the weights among it. None: not known of a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
