"""Train the causal video VAE on moving shapes: `python -m tools.shapes.train_vae --out vae.pt`.

The encoder learns a fixed linear transform (`latents.py`), the decoder to put pictures back together from it: squared
and absolute error of pixels. So the two do not wait for each other, nor the transformer for either. The decoder's
latents get noise, so that it forgives a transformer's small errors. Run it again with the same `--out` to go on from
its last state.
"""

from __future__ import annotations

import argparse
import logging

import numpy as np
import torch
from torch import Tensor, nn

from pyramid_serve.pyramid_flow.autoencoder import CausalVideoVAE, from_config
from pyramid_serve.pyramid_flow.causal_conv import Carry
from tools.shapes.latents import GAIN, vae_latents
from tools.shapes.scenes import NUM_FRAMES, SIZE, Scene, render, sample_scene, to_pixels
from tools.shapes.training import Options, Training, autocast

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
NOISE = 0.15  # at most, over the latents' size
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
    return to_pixels(torch.stack(clips).transpose(1, 2))


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


def losses_of(vae: CausalVideoVAE, pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, the encoder's error over the latents' size, and the decoder's PSNR in dB."""
    latents = vae_latents(pixels)
    strength = NOISE * torch.rand(latents.shape[0], 1, 1, 1, 1, generator=generator)
    with autocast(pixels.device):
        missed = (encode_mean(vae, pixels) - latents) / GAIN
        noisy = latents + torch.randn(latents.shape, generator=generator) * strength * GAIN
        error = decode(vae, noisy) - pixels
    square = error.square().mean()
    loss = square + 0.2 * error.abs().mean() + missed.square().mean()
    return loss, missed.detach().square().mean().sqrt(), 10 * torch.log10(4 / square.detach())


def is_hidden(name: str, param: nn.Parameter) -> bool:
    """Whether Muon steps a parameter: weights that neither read nor write pixels."""
    return param.ndim >= 2 and param.shape[0] > 3 and min(param.flatten(1).shape) > 3


def train(options: Options) -> None:
    """Train up to the last step, from the state in `out` if there is one. Logs the encoder's error and the PSNR."""
    torch.manual_seed(options.seed)
    torch.set_flush_denormal(True)
    torch.set_num_threads(options.num_threads)
    vae = from_config(CONFIG)
    initialize(vae)
    training = Training(vae, is_hidden, options, average=0.998)

    def take(step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((options.seed, step))
        pixels = training_clips(rng, *batch_at(step, options.num_steps))
        loss, missed, psnr = losses_of(vae, pixels, torch.Generator().manual_seed(int(rng.integers(2**63))))
        loss.backward()
        return missed, psnr

    training.run(take, num_warmup=50, log_every=50, save_every=250)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    Options.add_to(parser, steps=4000, decay_steps=1200, muon_lr=3e-3, adam_lr=2e-3)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(Options.of(parser.parse_args()))


if __name__ == "__main__":
    main()
