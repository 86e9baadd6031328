"""Train the decoder further for latents that stay as they are: `python -m tools.shapes.refine_decoder --help`.

It starts from the VAE that `tools.shapes.export vae` wrote, on longer and larger clips. As the encoder does not change,
the transformer can be trained before or meanwhile.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyramid_serve.pyramid_flow.autoencoder import CausalVideoVAE
from pyramid_serve.pyramid_flow.parts import load_vae
from tools.shapes.export import LATENT_SCALE, write_vae
from tools.shapes.optim import Averaged, Optimizers, load_state, rate_at, save_state
from tools.shapes.train_vae import NOISE, decode, encode_mean, is_hidden, training_clips

logger = logging.getLogger(__name__)

# (clips, frames, pixels) of the batches.
BATCHES = ((1, 121, 32), (2, 41, 48), (1, 33, 64), (3, 33, 32), (1, 9, 128), (1, 57, 48))


def decoder_loss(vae: CausalVideoVAE, pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """Loss of the decoder alone, and the PSNR in dB."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            latents = LATENT_SCALE.from_vae(encode_mean(vae, pixels))
            strength = NOISE * torch.rand(latents.shape[0], 1, 1, 1, 1, generator=generator)
            noisy = LATENT_SCALE.to_vae(latents + strength * torch.randn(latents.shape, generator=generator))
        error = decode(vae, noisy) - pixels
    square = error.square().mean()
    return square + 0.2 * error.abs().mean(), float(10 * torch.log10(4 / square.detach()))


def train(*, vae_folder: Path, out: Path, num_steps: int, seed: int, muon_lr: float, adam_lr: float) -> None:
    """Train up to `num_steps`, from the state in `out` if there is one; then write the VAE back into its folder."""
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    vae = load_vae(vae_folder)
    parts = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    params = {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}
    for param in params.values():
        param.requires_grad_(True)
    hidden = {name for name, p in params.items() if is_hidden(p)}
    optimizers = Optimizers(params, hidden, muon_lr=muon_lr, adam_lr=adam_lr)
    averaged = Averaged(params)
    first = 0
    if out.exists():
        state = load_state(out)
        vae.load_state_dict(state["weights"], strict=False)
        optimizers.load_state_dict(state["optimizers"])
        averaged.values = state["averaged"]
        first = state["step"]
    began, psnrs = time.monotonic(), []
    for step in range(first, num_steps):
        rng, generator = np.random.default_rng((seed, step)), torch.Generator().manual_seed(step)
        loss, psnr = decoder_loss(vae, training_clips(rng, *BATCHES[step % len(BATCHES)]), generator)
        loss.backward()
        optimizers.step(rate_at(step, num_steps=num_steps, num_warmup=20, num_decay=num_steps))
        averaged.update(params, step)
        psnrs.append(psnr)
        if (step + 1) % 25 == 0:
            pace = (time.monotonic() - began) / (step + 1 - first)
            logger.info("step %d psnr %.2f dB, %.2f s a step", step + 1, np.mean(psnrs[-25:]), pace)
        if (step + 1) % 100 == 0 or step + 1 == num_steps:
            weights = {name: p.detach() for name, p in params.items()}
            save_state(
                out,
                {
                    "weights": weights,
                    "averaged": averaged.values,
                    "optimizers": optimizers.state_dict(),
                    "step": step + 1,
                },
            )
    vae.load_state_dict(averaged.values, strict=False)
    write_vae(vae, vae_folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--vae", type=Path, required=True, help="the folder that `export vae` wrote; changed at the end"
    )
    parser.add_argument("--out", type=Path, required=True, help="the training's state")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--muon-lr", type=float, default=1e-3)
    parser.add_argument("--adam-lr", type=float, default=5e-4)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(
        vae_folder=args.vae,
        out=args.out,
        num_steps=args.steps,
        seed=args.seed,
        muon_lr=args.muon_lr,
        adam_lr=args.adam_lr,
    )


if __name__ == "__main__":
    main()
