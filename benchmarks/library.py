"""Measure the library: seconds, memory and arithmetic. Run ``python -m benchmarks.library --help``.

Without options the tiny checkpoint of the tests on the CPU; with ``packs`` the model in the package there, packed and
alone; with ``flops`` the published sizes on no device at all; with ``gpu`` the published sizes with random weights on a
CUDA device, see :mod:`benchmarks.gpu`.
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pyramid_serve.pyramid_flow import autoencoder, flux, mmdit
from pyramid_serve.pyramid_flow.attention import attention_by_name, block_attention
from pyramid_serve.pyramid_flow.history import history_clips
from pyramid_serve.pyramid_flow.noise import SeededNoise
from pyramid_serve.pyramid_flow.pack import ClipSequence, PromptEmbeds
from pyramid_serve.pyramid_flow.parts import load_transformer, load_vae
from pyramid_serve.pyramid_flow.sampler import denoise_unit, run_units
from pyramid_serve.pyramid_flow.settings import SamplingSettings
from pyramid_serve.pyramid_flow.shapes import LATENT_CHANNELS, LatentShape

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
PUBLISHED = ROOT / "tests" / "published"
IN_PACKAGE = ROOT / "pyramid_serve" / "models" / "shapes"

NUM_TEXT_TOKENS = 128
TRANSFORMERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "sd3": mmdit.from_config,
    "miniflux": flux.from_config,
}
SHAPES = {
    "384p 5 s": LatentShape.of_pixels(height=384, width=640, num_latent_frames=16),
    "768p 5 s": LatentShape.of_pixels(height=768, width=1280, num_latent_frames=16),
    "768p 10 s": LatentShape.of_pixels(height=768, width=1280, num_latent_frames=31),
}
# 10^15 FLOP of the transformer and the VAE, as known of the published model.
KNOWN_PETAFLOP = {
    ("sd3", "384p 5 s"): (2.0, 0.6),
    ("sd3", "768p 5 s"): (10.3, 2.4),
    ("miniflux", "768p 5 s"): (15.0, 2.4),
    ("sd3", "768p 10 s"): (28.2, 4.7),
    ("miniflux", "768p 10 s"): (40.7, 4.7),
}


def published_config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((PUBLISHED / f"{name}_config.json").read_text())
    return config


def seconds_of(work: Callable[[], object], *, repeats: int = 5, device: str = "cpu") -> float:
    """Median over ``repeats`` runs, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def random_prompt(model: nn.Module, *, num_tokens: int, device: str, dtype: torch.dtype) -> PromptEmbeds:
    config: Any = model.config
    return PromptEmbeds(
        torch.randn(num_tokens, config.text_features, device=device, dtype=dtype),
        torch.randn(config.pooled_features, device=device, dtype=dtype),
    )


def random_history(shape: LatentShape, unit: int, device: str) -> torch.Tensor:
    return torch.randn(LATENT_CHANNELS, unit, *shape.size_at(2), device=device)


# --- the tiny checkpoint on the CPU ---------------------------------------------------------------------------------


def measure_tiny(family: str, dtype: torch.dtype, shape: LatentShape) -> Iterator[dict[str, Any]]:
    """Seconds per unit alone and packed, and per decoded unit alone and stacked."""
    source = GOLDEN / family / "checkpoint"
    model: Any = load_transformer(source, dtype=dtype)
    vae = load_vae(source, dtype=dtype)
    attention = attention_by_name("blocks")
    prompt, negative = (random_prompt(model, num_tokens=n, device="cpu", dtype=dtype) for n in (30, 50))
    settings = SamplingSettings((10, 10, 10), (5, 5, 5))
    unit = shape.num_latent_frames - 1
    history = random_history(shape, unit, "cpu")

    def predict(sequences: Any) -> Any:
        with torch.inference_mode():
            return model(sequences, attention=attention)

    def make(num_videos: int) -> None:
        run_units(
            predict,
            [
                denoise_unit(prompt, negative, history, settings=settings, noise=SeededNoise(seed, shape))
                for seed in range(num_videos)
            ],
        )

    for num_videos in (1, 2, 4, 8):
        seconds = seconds_of(lambda n=num_videos: make(n), repeats=3) / num_videos  # type: ignore[misc]
        yield {"part": "denoise", "packed": num_videos, "seconds_per_unit": seconds}
    with torch.inference_mode():
        for num_videos in (1, 2, 4, 8):
            latents = torch.randn(num_videos, LATENT_CHANNELS, 1, *shape.size_at(2))
            _, memory = vae.decode_unit(latents, None)
            seconds = seconds_of(lambda x=latents, m=memory: vae.decode_unit(x, m), repeats=3)  # type: ignore[misc]
            yield {"part": "decode", "packed": num_videos, "seconds_per_unit": seconds / num_videos}


def measure_packs(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Processor time of a step of the model in the package, of one thread, for each of 1 and 8 videos in a forward.

    The least of four, since other work on the machine adds to it.
    """
    torch.set_num_threads(1)
    model: Any = load_transformer(IN_PACKAGE, dtype=dtype)
    prompts = [random_prompt(model, num_tokens=n, device="cpu", dtype=dtype) for n in (12, 20)]
    shape = LatentShape.of_pixels(height=128, width=128, num_latent_frames=1)
    for num_videos, unit, stage in itertools.product((1, 8), (0, 6), range(3)):
        clips = history_clips(random_history(shape, unit, "cpu"), stage)
        current = torch.randn(LATENT_CHANNELS, 1, *shape.size_at(stage))
        pack = [ClipSequence(prompt, (*clips, current), 500.0) for prompt in prompts] * num_videos
        times = []
        with torch.inference_mode():
            for _ in range(5):
                started = time.thread_time()
                model(pack)
                times.append(time.thread_time() - started)
        milliseconds = 1000 * min(times[1:]) / num_videos
        yield {"packed": num_videos, "unit": unit, "stage": stage, "milliseconds_per_video": milliseconds}


def peak_megabytes(num_latent_frames: int, family: str) -> float:
    """Peak memory of a process that makes and decodes one video, unit by unit."""
    command = [sys.executable, "-m", "benchmarks.library", "one-video", "--family", family]
    done = subprocess.run(
        [*command, "--units", str(num_latent_frames)], check=True, capture_output=True, text=True, cwd=ROOT
    )
    return float(done.stdout)


def make_one_video(family: str, num_latent_frames: int) -> None:
    from pyramid_serve.pyramid_flow.pipeline import PyramidFlow, VideoInput

    pipeline = PyramidFlow.from_pretrained(GOLDEN / family / "checkpoint")
    settings = pipeline.settings(
        width=256, height=256, num_latent_frames=num_latent_frames, sampling=SamplingSettings((2, 2, 2), (1, 1, 1))
    )
    for _ in pipeline.stream([VideoInput("a ball")], settings):
        pass
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


# --- arithmetic -----------------------------------------------------------------------------------------------------


def count_flops(family: str, shape: LatentShape) -> tuple[float, float]:
    """FLOP of the transformer (both halves of guidance) and of the decoder for one video, counted on meta tensors."""
    size = shape.pixel_size
    denoised = sum(unit_flops(family, size, unit) for unit in range(shape.num_latent_frames))
    first, other = decode_flops(size)
    return denoised, first + other * (shape.num_latent_frames - 1)


@lru_cache
def meta_transformer(family: str) -> nn.Module:
    with torch.device("meta"):
        return TRANSFORMERS[family](published_config(f"{family}_transformer"))


@lru_cache
def unit_flops(family: str, size: tuple[int, int], unit: int) -> float:
    model, settings = meta_transformer(family), SamplingSettings()
    shape = LatentShape.of_pixels(height=size[0], width=size[1], num_latent_frames=unit + 1)
    prompt = random_prompt(model, num_tokens=NUM_TEXT_TOKENS, device="meta", dtype=torch.float32)
    history = random_history(shape, unit, "meta")
    total = 0.0
    for stage, num_steps in enumerate(settings.steps_of(unit)):
        current = torch.empty(LATENT_CHANNELS, 1, *shape.size_at(stage), device="meta")
        sequence = ClipSequence(prompt, (*history_clips(history, stage), current), 500.0)
        total += 2 * num_steps * count(lambda s=sequence: model([s], attention=block_attention))  # type: ignore[misc]
    return total


@lru_cache
def decode_flops(size: tuple[int, int]) -> tuple[float, float]:
    """Of the first unit, and of each other one."""
    with torch.device("meta"):
        vae = autoencoder.from_config(published_config("causal_video_vae"))
    shape = LatentShape.of_pixels(height=size[0], width=size[1], num_latent_frames=1)
    latents = torch.empty(1, LATENT_CHANNELS, 1, *shape.size_at(2), device="meta")
    _, memory = vae.decode_unit(latents, None)
    return count(lambda: vae.decode_unit(latents, None)), count(lambda: vae.decode_unit(latents, memory))


def count(work: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


# --- command line ---------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "what", nargs="?", default="tiny", choices=("tiny", "packs", "memory", "flops", "gpu", "one-video")
    )
    parser.add_argument("--family", choices=("mmdit", "miniflux"), default="miniflux")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--units", type=int, default=16)
    gpu = parser.add_argument_group("gpu")
    gpu.add_argument("--device", default="cuda")
    gpu.add_argument("--families", nargs="+", choices=(*TRANSFORMERS, "pia"), default=list(TRANSFORMERS))
    gpu.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES)[:2], metavar="SIZE")
    gpu.add_argument("--compare", action="store_true", help="also without compiling, and with batch_invariant")
    gpu.add_argument("--seconds", type=float, default=300.0, help="begin nothing after this time")
    arguments = parser.parse_args()
    match arguments.what:
        case "tiny":
            shape = LatentShape.of_pixels(height=128, width=128, num_latent_frames=8)
            for row in measure_tiny(arguments.family, getattr(torch, arguments.dtype), shape):
                print(json.dumps(row))
        case "packs":
            for row in measure_packs(getattr(torch, arguments.dtype)):
                print(json.dumps(row))
        case "memory":
            for num_units in (16, 31):
                print(json.dumps({"units": num_units, "peak_megabytes": peak_megabytes(num_units, arguments.family)}))
        case "flops":
            for (family, name), known in KNOWN_PETAFLOP.items():
                transformer, decoder = count_flops(family, SHAPES[name])
                row = {"model": f"{family} {name}", "transformer": transformer / 1e15, "decoder": decoder / 1e15}
                print(json.dumps({**row, "known": known}))
        case "gpu":
            from benchmarks.gpu import measure
            from benchmarks.pia_gpu import measure_pia

            options: dict[str, Any] = {"compare": arguments.compare, "seconds": arguments.seconds}
            rows: Iterator[dict[str, Any]] = iter(())
            if "pia" in arguments.families:
                rows = measure_pia(arguments.device, **options)
            if transformers := [family for family in arguments.families if family in TRANSFORMERS]:
                rows = itertools.chain(rows, measure(transformers, arguments.sizes, arguments.device, **options))
            for row in rows:
                print(json.dumps(row), flush=True)
        case "one-video":
            make_one_video(arguments.family, arguments.units)


if __name__ == "__main__":
    main()
