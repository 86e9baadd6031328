"""Judge the model: `python -m tools.shapes.evaluate vae | videos | phrases | pictures | broken | speed`.

vae: PSNR of held-out clips; videos: text to video over prompts in turn; phrases: the same over a person's own words;
pictures: image to video; broken: text to video with parts of the sampler broken on purpose, as the rows of a table;
speed: seconds for one video of 121 frames, alone in this process.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pyramid_serve.dtypes import DTypeName
from pyramid_serve.precision import choose_dtype
from pyramid_serve.pyramid_flow import sampler, schedule
from pyramid_serve.pyramid_flow.attention import attention_by_name, fastest_on
from pyramid_serve.pyramid_flow.autoencoder import CausalVideoVAE, DecoderMemory
from pyramid_serve.pyramid_flow.capabilities import Capabilities, capabilities
from pyramid_serve.pyramid_flow.codec import decode_unit, encode_picture
from pyramid_serve.pyramid_flow.noise import SeededNoise
from pyramid_serve.pyramid_flow.pack import ClipSequence
from pyramid_serve.pyramid_flow.parts import Transformer, load_transformer, load_vae
from pyramid_serve.pyramid_flow.sampler import append_unit, denoise_unit, run_units
from pyramid_serve.pyramid_flow.settings import SamplingSettings
from pyramid_serve.pyramid_flow.shapes import LATENT_CHANNELS, LatentShape
from pyramid_serve.pyramid_flow.text_encoder import TextEncoder
from tools.shapes.export import psnr
from tools.shapes.judge import Frames, Verdict, agrees, judge, scenes_in_turn
from tools.shapes.latents import LATENT_SCALE
from tools.shapes.phrases import PHRASES
from tools.shapes.scenes import BACKGROUNDS, SIZE, Scene, plain_prompt, render, sample_prompt, to_pixels

logger = logging.getLogger(__name__)

CHECKPOINT = Path(__file__).parents[2] / "pyramid_serve" / "models" / "shapes"
NUM_SHEET_ROWS = 8
BROKEN = ("nothing", "renoising", "history", "start")


@dataclass(frozen=True)
class Model:
    """The parts of the checkpoint, as the library loads them."""

    text_encoder: TextEncoder
    transformer: Transformer
    vae: CausalVideoVAE
    able: Capabilities

    @classmethod
    def load(cls, checkpoint: Path, dtype: DTypeName | None = None, *, device: torch.device | str = "cpu") -> Model:
        """In what suits the device unless a dtype is given."""
        able = capabilities(checkpoint)
        chosen = choose_dtype(torch.device(device), asked=dtype, preferred=able.dtype).dtype
        return cls(
            TextEncoder.from_pretrained(checkpoint, dtype=chosen, device=device),
            load_transformer(checkpoint, dtype=chosen, device=device),
            load_vae(checkpoint, dtype=chosen, device=device),
            able,
        )

    @property
    def device(self) -> torch.device:
        return self.text_encoder.device

    def predict(self, sequences: Sequence[ClipSequence]) -> list[Tensor]:
        """What the transformer predicts for the last clip of each sequence."""
        return self.transformer(sequences, attention=attention_by_name(fastest_on(self.device)))


def default_settings(able: Capabilities, *, has_image: bool) -> SamplingSettings:
    return SamplingSettings(
        num_inference_steps=able.num_inference_steps,
        video_num_inference_steps=able.video_num_inference_steps,
        guidance_scale=able.guidance_scale,
        video_guidance_scale=able.image_video_guidance_scale if has_image else able.video_guidance_scale,
    )


@torch.inference_mode()
def make_latents(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    settings: SamplingSettings,
    num_latent_frames: int = 16,
    histories: Sequence[Tensor] | None = None,
    broken: str = "nothing",
) -> Tensor:
    """Latents (B, 16, T, h, w) of videos made side by side, on the model's device.

    histories: what each goes on from, (16, t, h, w).
    """
    shape = LatentShape.of_pixels(height=SIZE, width=SIZE, num_latent_frames=num_latent_frames)
    *positive, negative = model.text_encoder.encode([*prompts, model.able.negative_prompt])
    if histories is None:
        histories = [torch.zeros(LATENT_CHANNELS, 0, *shape.size_at(2)) for _ in prompts]
    histories = [history.to(model.device) for history in histories]

    def predict(sequences: Sequence[ClipSequence]) -> list[Tensor]:
        if broken == "history":
            sequences = [replace(sequence, clips=sequence.clips[-1:]) for sequence in sequences]
        return model.predict(sequences)

    with _broken_entry(broken):
        for _ in range(histories[0].shape[1], num_latent_frames):
            units = [
                denoise_unit(prompt, negative, history, settings=settings, noise=SeededNoise(seed, shape))
                for prompt, history, seed in zip(positive, histories, seeds, strict=True)
            ]
            made = run_units(predict, units)
            histories = [append_unit(history, one) for history, one in zip(histories, made, strict=True)]
    return torch.stack(list(histories))


def _broken_entry(broken: str) -> AbstractContextManager[object]:
    """The step from stage to stage, broken on purpose."""

    def unrenoised(latents: Tensor, block_noise: Tensor, index: int) -> Tensor:
        return enter_stage(latents, torch.zeros_like(block_noise), index)

    def uncorrected(latents: Tensor, block_noise: Tensor, index: int) -> Tensor:
        """As if a stage began at the noise level where the last one ended: no scaling, no renoising."""
        return F.interpolate(latents, scale_factor=2.0, mode="nearest")

    enter_stage = schedule.enter_stage
    entries = {"renoising": unrenoised, "start": uncorrected}
    return patch.object(sampler, "enter_stage", entries[broken]) if broken in entries else nullcontext()


@torch.inference_mode()
def decode(model: Model, latents: Tensor) -> list[Frames]:
    """Frames (F, H, W, 3) of each video."""
    memory: DecoderMemory | None = None
    frames = []
    for unit in latents.split(1, dim=2):
        made, memory = decode_unit(model.vae, LATENT_SCALE, unit, memory)
        frames.append(made.cpu())
    return list(torch.cat(frames, dim=1).numpy())


@torch.inference_mode()
def vae_psnr(vae: CausalVideoVAE, num_clips: int, seed: int) -> list[float]:
    """dB of whole held-out clips, encoded and decoded as the library streams them."""
    values = []
    for scene in scenes_in_turn(num_clips, seed):
        clip = render(scene)
        moments = vae.encode(to_pixels(clip.transpose(0, 1).unsqueeze(0)).to(next(vae.parameters()).device))
        decoded = vae.decode(moments.mean)[0].transpose(0, 1).float().cpu()
        values.append(psnr((decoded * 127.5 + 127.5).clamp(0, 255), clip))
    return values


def judge_videos(
    model: Model,
    scenes: Sequence[Scene],
    *,
    settings: SamplingSettings,
    batch: int,
    seed: int,
    num_latent_frames: int = 16,
    broken: str = "nothing",
    with_pictures: bool = False,
    sheet: Path | None = None,
    told: Sequence[str] | None = None,
) -> dict[str, float]:
    """Shares of right answers over the scenes; videos have seeds from `seed` on.

    told: the scenes' prompts; without them, plain words for some and others for the rest.
    """
    if told is None:
        told = [_prompt(scene, np.random.default_rng((seed + i, 3))) for i, scene in enumerate(scenes)]
    rows: list[dict[str, float]] = []
    misses: list[str] = []
    kept: list[Frames] = []
    for first in range(0, len(scenes), batch):
        part = scenes[first : first + batch]
        seeds = range(seed + first, seed + first + len(part))
        prompts = told[first : first + batch]
        starts = [render(scene, num_frames=1)[0] for scene in part]
        latents = make_latents(
            model,
            prompts,
            seeds,
            settings=settings,
            num_latent_frames=num_latent_frames,
            histories=[encode_picture(model.vae, LATENT_SCALE, to_pixels(start).to(model.device)) for start in starts]
            if with_pictures
            else None,
            broken=broken,
        )
        for scene, prompt, start, frames in zip(part, prompts, starts, decode(model, latents), strict=True):
            verdict = judge(frames)
            right = agrees(verdict, scene)
            row: dict[str, float] = {
                **right,
                "all": all(right.values()),
                "whole": verdict.is_whole,
                "roughness": roughness(frames),
                "background error": background_error(frames, scene),
            }
            if with_pictures:
                row["first frame dB"] = psnr(torch.from_numpy(frames[0]).permute(2, 0, 1), start)
            rows.append(row)
            kept += [frames] if len(kept) < NUM_SHEET_ROWS else []
            if not all(right.values()) or not verdict.is_whole:
                misses.append(f"{prompt}: {_describe(verdict)}")
        logger.info("%d: %s", len(rows), json.dumps(_means(rows)))
        if sheet is not None:
            write_sheet(sheet, kept)
    for miss in misses:
        logger.info("missed %s", miss)
    return _means(rows)


def _prompt(scene: Scene, rng: np.random.Generator) -> str:
    return plain_prompt(scene) if rng.random() < 0.5 else sample_prompt(scene, rng)


def roughness(frames: Frames) -> float:
    """Mean difference of frames (F, H, W, 3) from themselves blurred over 3 x 3 pixels, in 0..255: edges and grain."""
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    return float((pixels - F.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)).abs().mean())


def background_error(frames: Frames, scene: Scene) -> float:
    """Mean difference of the top and bottom rows of frames (F, H, W, 3) from the background asked for, in 0..255."""
    return float(np.abs(frames[:, [0, -1]] - np.array(BACKGROUNDS[scene.background], dtype=np.float64)).mean())


def _means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: round(float(np.mean([row[name] for row in rows])), 4) for name in rows[0]}


def _describe(verdict: Verdict) -> str:
    return (
        f"{verdict.color} {verdict.shape} {verdict.motion} on {verdict.background}, whole {verdict.is_whole}, "
        f"shift {verdict.shift_x:.0f} {verdict.shift_y:.0f}, growth {verdict.growth:.2f}, turn {verdict.turn:.0f}"
    )


def write_sheet(path: Path, videos: Sequence[Frames], *, num_columns: int = 7, size: int = 96) -> None:
    """A contact sheet: a row for each video, its frames from the first to the last at equal distances."""
    rows = []
    for frames in videos:
        chosen = frames[np.linspace(0, len(frames) - 1, num_columns).round().astype(int)]
        rows.append(
            np.concatenate(
                [np.pad(_resized(frame, size), ((1, 1), (1, 1), (0, 0)), constant_values=60) for frame in chosen],
                axis=1,
            )
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows, axis=0)).quantize(256).save(path, optimize=True)


def _resized(frame: Frames, size: int) -> Frames:
    return np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.LANCZOS))


def measure_speed(model: Model, settings: SamplingSettings) -> dict[str, float]:
    """Seconds to the first frame and to all 121, after one short video to warm up."""
    prompt = "a red circle moves right on a black background"
    decode(model, make_latents(model, [prompt], [0], settings=settings, num_latent_frames=2))
    began = time.perf_counter()
    decode(model, make_latents(model, [prompt], [1], settings=settings, num_latent_frames=1))
    first = time.perf_counter() - began
    began = time.perf_counter()
    latents = make_latents(model, [prompt], [1], settings=settings)
    float(latents.sum())  # a GPU is waited for
    denoised = time.perf_counter() - began
    decode(model, latents)
    return {"first frame": first, "denoising": denoised, "all frames": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("vae", "videos", "phrases", "pictures", "broken", "speed"))
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--first", type=int, default=0, help="videos left out at the beginning, to share the work")
    parser.add_argument("--latent-frames", type=int, default=16, help="1: pictures, 16: all 121 frames")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--steps", type=int, nargs=3)
    parser.add_argument("--video-steps", type=int, nargs=3)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--video-guidance", type=float)
    parser.add_argument("--sheet", type=Path, help="a PNG of the first 8 videos; broken: one for each, named after it")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="what suits the device unless given")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = Model.load(args.checkpoint, args.dtype, device=args.device)
    if args.what == "vae":
        values = vae_psnr(model.vae, args.count, args.seed)
        logger.info("mean %.2f dB, worst %.2f dB over %d clips", np.mean(values), min(values), len(values))
        return
    settings = default_settings(model.able, has_image=args.what == "pictures")
    settings = replace(
        settings,
        num_inference_steps=tuple(args.steps) if args.steps else settings.num_inference_steps,
        video_num_inference_steps=tuple(args.video_steps) if args.video_steps else settings.video_num_inference_steps,
        guidance_scale=settings.guidance_scale if args.guidance is None else args.guidance,
        video_guidance_scale=settings.video_guidance_scale if args.video_guidance is None else args.video_guidance,
    )
    if args.what == "speed":
        logger.info("%s", json.dumps(measure_speed(model, settings)))
        return
    scenes, told = scenes_in_turn(args.first + args.count, args.seed)[args.first :], None
    if args.what == "phrases":
        rng = np.random.default_rng(args.seed)
        phrases = PHRASES[args.first : args.first + args.count]
        scenes, told = [phrase.scene(rng) for phrase in phrases], [phrase.prompt for phrase in phrases]
    for broken in BROKEN if args.what == "broken" else BROKEN[:1]:
        sheet: Path | None = args.sheet
        if sheet is not None and args.what == "broken":
            sheet = sheet.with_stem(f"{sheet.stem}-{broken}")
        score = judge_videos(
            model,
            scenes,
            settings=settings,
            batch=args.batch,
            seed=args.seed + args.first,
            num_latent_frames=args.latent_frames,
            broken=broken,
            with_pictures=args.what == "pictures",
            sheet=sheet,
            told=told,
        )
        logger.info("broken: %s %s", broken, json.dumps(score))


if __name__ == "__main__":
    main()
