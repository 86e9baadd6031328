"""Train the causal video VAE on moving shapes: `python -m tools.shapes.train_vae --out vae.pt`.

The loss is the squared and absolute error of pixels. Instead of a learned variance, the latents get noise of up to 0.15
of their size, so that the decoder forgives a transformer's small errors; a penalty holds the latents of frame 0 and of
the others at the two sizes of the published scaling. Run it again with the same `--out` to go on from its last state.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pyramid_serve.pyramid_flow.autoencoder import CausalVideoVAE, from_config
from pyramid_serve.pyramid_flow.causal_conv import Carry
from tools.shapes.optim import Averaged, Optimizers, load_state, rate_at, save_state
from tools.shapes.scenes import NUM_FRAMES, SIZE, Scene, render, sample_scene

logger = logging.getLogger(__name__)

CONFIG = {
    "_class_name": "CausalVideoVAE",
    "add_post_quant_conv": True,
    "encoder_out_channels": 16,
    "encoder_block_out_channels": [16, 16, 64, 64],
    "encoder_layers_per_block": [1, 1, 1, 1],
    "encoder_spatial_down_sample": [True, True, True, False],
    "encoder_temporal_down_sample": [True, True, True, False],
    "encoder_norm_num_groups": 1,
    "decoder_in_channels": 16,
    "decoder_out_channels": 3,
    "decoder_block_out_channels": [16, 16, 64, 64],
    "decoder_layers_per_block": [1, 2, 2, 1],
    "decoder_spatial_up_sample": [True, True, True, False],
    "decoder_temporal_up_sample": [True, True, True, False],
    "decoder_norm_num_groups": 1,
    "downsample_scale": 8,
}
IMAGE_SIZE, VIDEO_SIZE = 1.8726 / 3.0986, 1.0  # of the latents while training: in proportion to the published scales
NOISE = 0.15
# (clips, frames, pixels) of the training batches: many small crops first, then longer and larger ones, so that neither
# a long video nor a whole picture is new when the model is used.
EARLY_BATCHES = ((12, 9, 32),)
MIDDLE_BATCHES = ((3, 33, 32), (6, 17, 32), (3, 9, 64), (3, 33, 32), (2, 17, 64), (1, 9, 128))
LATE_BATCHES = ((1, 121, 32), (3, 33, 32), (1, 9, 128), (1, 33, 64), (2, 17, 64), (1, 17, 96))


def batch_at(step: int, num_steps: int) -> tuple[int, int, int]:
    """(clips, frames, pixels) of a step's batch."""
    if step < 0.28 * num_steps:
        batches: tuple[tuple[int, int, int], ...] = EARLY_BATCHES
    else:
        batches = MIDDLE_BATCHES if step < 0.7 * num_steps else LATE_BATCHES
    return batches[step % len(batches)]


def training_clips(rng: np.random.Generator, num_clips: int, num_frames: int, size: int) -> Tensor:
    """Crops (B, 3, F, S, S) in [-1, 1] that show part of the shape, in the prompts' colours and in any other."""
    clips = []
    for _ in range(num_clips):
        scene = sample_scene(rng, color_jitter=25.0)
        if rng.random() < 0.25:
            scene = _recolored(scene, rng)
        first = int(rng.integers(0, NUM_FRAMES - num_frames + 1))
        spread = 0.6 * (scene.start_radius + scene.end_radius)
        corner = [
            int(
                np.clip((scene.start[axis] + scene.end[axis] - size) / 2 + rng.uniform(-spread, spread), 0, SIZE - size)
            )
            for axis in (1, 0)
        ]
        clips.append(render(scene, num_frames=num_frames, first_frame=first, box=(corner[0], corner[1], size, size)))
    return torch.stack(clips).transpose(1, 2).float().div_(127.5).sub_(1)


def _recolored(scene: Scene, rng: np.random.Generator) -> Scene:
    color, background = (tuple(float(v) for v in rng.choice((0, 255, rng.uniform(0, 255)), size=3)) for _ in range(2))
    return Scene(**{**scene.__dict__, "color_rgb": color, "background_rgb": background})


def encode_mean(vae: CausalVideoVAE, pixels: Tensor) -> Tensor:
    """Latents (B, 16, T, h, w) of clips, all frames in one go."""
    moments: Tensor = vae.quant_conv(vae.encoder(pixels, Carry(None)), Carry(None))
    return moments[:, : moments.shape[1] // 2].float()


def decode(vae: CausalVideoVAE, latents: Tensor) -> Tensor:
    pixels: Tensor = vae.decoder(vae.post_quant_conv(latents, Carry(None)), Carry(None))
    return pixels.float()


@torch.no_grad()
def initialize(vae: CausalVideoVAE) -> None:
    """Begin as a coarse linear autoencoder: resampling convolutions copy pixels, residual branches add nothing yet."""
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv3d):
            continue
        if module.bias is not None:
            module.bias.zero_()
        weight = module.weight
        num_out, num_in = weight.shape[:2]
        if ".resnets." in name and ".conv2." in name:
            weight.zero_()
        elif ".resnets." in name and ".conv1." in name:
            nn.init.normal_(weight, std=(2 / weight[0].numel()) ** 0.5)
        else:
            repeats = num_out // num_in if "upsamplers" in name else 1
            centre = torch.empty(num_out // repeats, num_in)
            if num_out == repeats * num_in:
                nn.init.eye_(centre)
            else:
                nn.init.orthogonal_(centre, gain=max(1.0, (num_in / num_out) ** 0.5))
            nn.init.normal_(weight, std=0.2 / weight[0].numel() ** 0.5)
            weight[:, :, -1, weight.shape[3] // 2, weight.shape[4] // 2] += centre.repeat_interleave(repeats, dim=0)


def loss_of(vae: CausalVideoVAE, pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """Loss, and the PSNR in dB."""
    with torch.autocast("cpu", torch.bfloat16):
        latents = encode_mean(vae, pixels)
        target = torch.tensor([IMAGE_SIZE] + [VIDEO_SIZE] * (latents.shape[2] - 1)).view(1, 1, -1, 1, 1)
        strength = NOISE * torch.rand(latents.shape[0], 1, 1, 1, 1, generator=generator)
        noisy = latents + torch.randn(latents.shape, generator=generator) * strength * target
        error = decode(vae, noisy) - pixels
    square = error.square().mean()
    size = (latents / target).square().mean(dim=(0, 1, 3, 4)).add(1e-8).sqrt()  # of each latent frame
    loss = square + 0.2 * error.abs().mean() + 0.02 * (size - 1).square().mean() + 1e-3 * latents.mean().square()
    return loss, float(10 * torch.log10(4 / square.detach()))


def is_hidden(param: nn.Parameter) -> bool:
    """Whether Muon steps a parameter: weights that neither read nor write pixels."""
    return param.ndim >= 2 and param.shape[0] > 3 and min(param.flatten(1).shape) > 3


def train(*, out: Path, num_steps: int, num_decay: int, seed: int, muon_lr: float, adam_lr: float) -> None:
    """Train up to `num_steps`, from the state in `out` if there is one."""
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    vae = from_config(CONFIG)
    initialize(vae)
    params = dict(vae.named_parameters())
    hidden = {name for name, p in params.items() if is_hidden(p)}
    optimizers = Optimizers(params, hidden, muon_lr=muon_lr, adam_lr=adam_lr)
    averaged = Averaged(params)
    first = 0
    if out.exists():
        state = load_state(out)
        vae.load_state_dict(state["weights"])
        optimizers.load_state_dict(state["optimizers"])
        averaged.values = state["averaged"]
        first = state["step"]
    began, psnrs = time.monotonic(), []
    for step in range(first, num_steps):
        rng = np.random.default_rng((seed, step))
        generator = torch.Generator().manual_seed(step)
        loss, psnr = loss_of(vae, training_clips(rng, *batch_at(step, num_steps)), generator)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizers.step(rate_at(step, num_steps=num_steps, num_warmup=50, num_decay=num_decay))
        averaged.update(params, step)
        psnrs.append(psnr)
        if (step + 1) % 50 == 0:
            pace = (time.monotonic() - began) / (step + 1 - first)
            logger.info(
                "step %d loss %.4f psnr %.2f dB, %.2f s a step",
                step + 1,
                float(loss.detach()),
                np.mean(psnrs[-50:]),
                pace,
            )
        if (step + 1) % 250 == 0 or step + 1 == num_steps:
            save_state(
                out,
                {
                    "weights": vae.state_dict(),
                    "averaged": averaged.values,
                    "optimizers": optimizers.state_dict(),
                    "step": step + 1,
                    "config": json.dumps(CONFIG),
                },
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2250)
    parser.add_argument("--decay-steps", type=int, default=750)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--muon-lr", type=float, default=3e-3)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(
        out=args.out,
        num_steps=args.steps,
        num_decay=args.decay_steps,
        seed=args.seed,
        muon_lr=args.muon_lr,
        adam_lr=args.adam_lr,
    )


if __name__ == "__main__":
    main()
