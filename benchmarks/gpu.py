"""Speed, memory and parity of the published sizes with random bfloat16 weights on a CUDA device.

``python -m benchmarks.library gpu`` runs it. Sections come in the order of their worth, each printed as it ends, so
that what is cut off is the least.
"""

import gc
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from benchmarks.library import (
    NUM_TEXT_TOKENS,
    SHAPES,
    TRANSFORMERS,
    count,
    published_config,
    random_history,
    random_prompt,
    seconds_of,
)
from pyramid_serve.precision import device_name
from pyramid_serve.pyramid_flow import autoencoder
from pyramid_serve.pyramid_flow.attention import attention_by_name, dense_attention, fastest_on
from pyramid_serve.pyramid_flow.fused import fuse_layers
from pyramid_serve.pyramid_flow.history import history_clips
from pyramid_serve.pyramid_flow.pack import ClipSequence
from pyramid_serve.pyramid_flow.parts import Transformer, set_up, set_up_vae
from pyramid_serve.pyramid_flow.settings import CompiledName, SamplingSettings
from pyramid_serve.pyramid_flow.shapes import LATENT_CHANNELS, LatentShape

UNITS = (15, 8, 0)


class Way(NamedTuple):
    """Arguments of :func:`set_up`."""

    compiled: CompiledName
    batch_invariant: bool = False
    graphs: bool = False
    fp8: bool = False


WAYS = {
    "compiled": Way("blocks"),
    "eager": Way("none"),
    "graphs": Way("blocks", graphs=True),
    "fp8": Way("blocks", fp8=True),
    "batch_invariant": Way("none", batch_invariant=True),
}
NUM_RUNS_BEFORE = 3
"""Of a pack before its time is taken: graphs are recorded at the third."""


def measure(
    families: Sequence[str], sizes: Sequence[str], device: str, *, compare: bool, seconds: float
) -> Iterator[dict[str, Any]]:
    """Rows of figures. compare: of all ``WAYS``, not of the first alone; seconds: begin no section after them."""
    end = time.monotonic() + seconds
    rate = matrix_rate(device)
    yield {"device": device_name(torch.device(device)), "torch": torch.__version__, "matrix_tflops": rate / 1e12}
    ways = list(WAYS) if compare else list(WAYS)[:1]
    for family in families:
        yield from measure_parity(family, ways, device)
    for name in sizes:
        for family in families:
            if time.monotonic() < end:
                yield from measure_steps(family, name, ways, device, rate=rate, end=end)
        if time.monotonic() < end:
            yield from measure_decode(name, ways, device, rate=rate)


def random_model(family: str, way: str, device: str) -> Transformer:
    """A transformer of published size, with the same weights for each way of computing it."""
    with torch.device(device):
        model = TRANSFORMERS[family](published_config(f"{family}_transformer")).bfloat16().eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter.shape[1:].numel() ** -0.5, generator=generator)  # so that every layer acts
        elif name.endswith("bias"):
            parameter.zero_()
    fuse_layers(model)
    transformer = cast(Transformer, model)
    set_up(transformer, torch.device(device), **WAYS[way]._asdict())
    return transformer


def random_sequence(model: Transformer, shape: LatentShape, unit: int, stage: int, device: str) -> ClipSequence:
    prompt = random_prompt(cast(nn.Module, model), num_tokens=NUM_TEXT_TOKENS, device=device, dtype=torch.bfloat16)
    current = torch.randn(LATENT_CHANNELS, 1, *shape.size_at(stage), device=device)
    return ClipSequence(prompt, (*history_clips(random_history(shape, unit, device), stage), current), 500.0)


@torch.inference_mode()
def measure_parity(family: str, ways: Sequence[str], device: str) -> Iterator[dict[str, Any]]:
    """The largest difference from eager code with the dense attention, relative to the largest prediction.

    And whether a sequence gives the same bits alone and packed with others.
    """
    eager = random_model(family, "eager", device)
    pack = [random_sequence(eager, SHAPES["384p 5 s"], unit, stage, device) for unit, stage in ((6, 2), (2, 1), (0, 0))]
    exact = eager(pack, attention=dense_attention)
    attention = attention_by_name(fastest_on(torch.device(device)))
    for way in ways:
        model = eager if way == "eager" else random_model(family, way, device)
        for _ in range(NUM_RUNS_BEFORE):
            model(pack, attention=attention)
        predicted = model(pack, attention=attention)
        alone = [model([sequence], attention=attention)[0] for sequence in pack]
        yield {
            "part": f"{family} {way} against dense",
            "largest_relative_difference": max(
                ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(predicted, exact, strict=True)
            ),
            "same_bits_alone": all(map(torch.equal, predicted, alone)),
        }


def measure_steps(
    family: str, name: str, ways: Sequence[str], device: str, *, rate: float, end: float
) -> Iterator[dict[str, Any]]:
    """Seconds of a step and share of the matrix rate, by unit, stage, number of videos and way."""
    models = {way: random_model(family, way, device) for way in ways}
    shape, attention = SHAPES[name], attention_by_name(fastest_on(torch.device(device)))
    forget_peak(device)
    started = time.monotonic()
    for way, model in models.items():
        for num_sequences in (4, 1):
            pack = [random_sequence(model, shape, 2, 0, device)] * num_sequences
            with torch.inference_mode():
                model(pack, attention=attention)
        yield {"part": f"{family} {name} {way}", "seconds_of_first_forwards": time.monotonic() - started}
        started = time.monotonic()
    for unit in UNITS:
        seconds_per_unit = dict.fromkeys(ways, 0.0)
        for stage, num_steps in reversed(list(enumerate(SamplingSettings().steps_of(unit)))):
            for num_videos in (1, 4):
                if time.monotonic() > end:
                    return
                sequence = random_sequence(models[ways[0]], shape, unit, stage, device)
                pack = [sequence] * (2 * num_videos)
                flops = len(pack) * count_flops(family, sequence)
                with torch.inference_mode():
                    for model in models.values():
                        for _ in range(NUM_RUNS_BEFORE):
                            model(pack, attention=attention)
                    seconds = {
                        way: seconds_of(partial(model, pack, attention=attention), repeats=3, device=device)
                        for way, model in models.items()
                    }
                if num_videos == 1:
                    seconds_per_unit = {way: seconds_per_unit[way] + num_steps * seconds[way] for way in ways}
                yield {
                    "part": f"{family} {name}",
                    "unit": unit,
                    "stage": stage,
                    "packed": num_videos,
                    "seconds_per_step": {way: own / num_videos for way, own in seconds.items()},
                    "share_of_matrix_rate": {way: flops / own / rate for way, own in seconds.items()},
                }
        yield {"part": f"{family} {name}", "unit": unit, "seconds_per_unit": seconds_per_unit}
    yield {"part": f"{family} {name}", "peak_gigabytes_with_all_models": peak_gigabytes(device)}


def count_flops(family: str, sequence: ClipSequence) -> float:
    """Of one forward of a sequence, counted on no device."""
    with torch.device("meta"):
        model = TRANSFORMERS[family](published_config(f"{family}_transformer"))
    on_meta = ClipSequence(
        sequence.prompt.to("meta", torch.float32), tuple(clip.to("meta") for clip in sequence.clips), sequence.timestep
    )
    return count(lambda: model([on_meta], attention=attention_by_name("blocks")))


@torch.inference_mode()
def measure_decode(size: str, ways: Sequence[str], device: str, *, rate: float) -> Iterator[dict[str, Any]]:
    """A later unit of one video. A way that decodes as another does is not measured."""
    shape = SHAPES[size]
    latents = torch.randn(1, LATENT_CHANNELS, 1, *shape.size_at(2), device=device)
    frames_of_all: list[Tensor] = []
    with torch.device("meta"):
        on_meta = autoencoder.from_config(published_config("causal_video_vae"))
    _, memory = on_meta.decode_unit(latents.to("meta"), None)
    flops = count(lambda: on_meta.decode_unit(latents.to("meta"), memory))
    for way in (way for way in ways if way in ("compiled", "eager")):
        torch.manual_seed(0)
        with torch.device(device):
            vae = autoencoder.from_config(published_config("causal_video_vae")).bfloat16().eval()
        set_up_vae(vae, torch.device(device), compiled=WAYS[way].compiled)
        forget_peak(device)
        started = time.monotonic()
        _, memory = vae.decode_unit(latents, None)
        frames, _ = vae.decode_unit(latents, memory)
        first_seconds = time.monotonic() - started
        seconds = seconds_of(lambda vae=vae, memory=memory: vae.decode_unit(latents, memory), device=device)  # type: ignore[misc]
        frames_of_all.append(frames.float())
        yield {
            "part": f"decode {size}",
            "way": way,
            "seconds_per_unit": seconds,
            "share_of_matrix_rate": flops / seconds / rate,
            "first_two_units_seconds": first_seconds,
            "memory_gigabytes": memory.num_bytes / 2**30,
            "peak_gigabytes": peak_gigabytes(device),
            "differs_from_first_way": float((frames_of_all[-1] - frames_of_all[0]).abs().max()),
        }


def matrix_rate(device: str) -> float:
    """FLOP/s of a large bfloat16 matrix product on this card."""
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16).unbind(0)
    return float(2 * 8192**3 / seconds_of(lambda: a @ b, repeats=20, device=device))


def forget_peak(device: str) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


def peak_gigabytes(device: str) -> float:
    """Since ``forget_peak``, with the weights of all parts."""
    return torch.cuda.max_memory_allocated(device) / 2**30
