"""From training states to a checkpoint in the published layout, in bfloat16.

`python -m tools.shapes.export vae --state vae.pt --out DIR`; then, at any time of the transformer's training,
`python -m tools.shapes.export model --vae DIR --state dit.pt --out pyramid_serve/models/shapes`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pyramid_serve.pyramid_flow.autoencoder import CausalVideoVAE, from_config
from tools.shapes.latents import GAIN
from tools.shapes.train_transformer import CONFIG as TRANSFORMER_CONFIG
from tools.shapes.train_transformer import TextToVideo
from tools.shapes.train_vae import CONFIG as VAE_CONFIG
from tools.shapes.train_vae import NOISE
from tools.shapes.training import load_state

WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMER = "diffusion_transformer_128p"


def trained_vae(state_path: Path) -> CausalVideoVAE:
    """The averaged weights of a training state, in float32."""
    vae = from_config(VAE_CONFIG)
    vae.load_state_dict(load_state(state_path)["averaged"])
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def set_variance(vae: CausalVideoVAE) -> None:
    """Make the encoder's log variance constant, that of the noise which the decoder was trained with. In place."""
    moments = vae.quant_conv.conv
    if moments.bias is None:
        raise ValueError("quant_conv: must have a bias")
    num = vae.config.latent_channels
    moments.weight[num:] = 0.0
    moments.bias[num:] = 2 * math.log(GAIN * NOISE / 2)


def write_vae(vae: CausalVideoVAE, folder: Path) -> None:
    write_part(folder / "causal_video_vae", VAE_CONFIG, vae.state_dict())


def write_part(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """One part of a checkpoint: its configuration and its weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({name: x.to(torch.bfloat16).contiguous() for name, x in state.items()}, folder / WEIGHTS)


def replace_folder(new: Path, target: Path) -> None:
    """Put a finished folder in the place of another; readers see the one or the other for all but an instant."""
    old = target.with_name(target.name + ".old")
    if target.exists():
        os.replace(target, old)
    os.replace(new, target)
    shutil.rmtree(old, ignore_errors=True)


def psnr(made: Tensor, real: Tensor) -> float:
    """dB, of pictures in 0..255."""
    error = (made.float() - real.float()).square().mean().item()
    return 10 * math.log10(255.0**2 / max(error, 1e-9))


CAPABILITIES: dict[str, Any] = {
    "sizes": [[128, 128]],
    "max_num_latent_frames": 16,
    "default_num_latent_frames": 16,
    "num_inference_steps": [10, 10, 10],
    "video_num_inference_steps": [5, 5, 5],
    "guidance_scale": 4.0,
    "video_guidance_scale": 1.5,
    "image_video_guidance_scale": 1.5,
    "example_prompts": [
        "a red circle moves right on a black background",
        "a blue star spins on a white background",
        "a yellow triangle grows on a brown background",
        "a cyan square moves up on a gray background",
    ],
    "prompt_suffix": "",
    "negative_prompt": "",
    "dtype": "bfloat16",
}


def write_model(vae_folder: Path, state_path: Path, target: Path) -> None:
    """The whole checkpoint, put in the place of the one at `target`. Files of `target`'s own top level are kept."""
    aside = target.with_name(target.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    shutil.copytree(vae_folder / "causal_video_vae", aside / "causal_video_vae")
    tokenizers = state_path.with_name("tokenizers")
    model = TextToVideo(tokenizers)
    averaged = load_state(state_path)["averaged"]
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(averaged[name])
    write_part(aside / TRANSFORMER, TRANSFORMER_CONFIG, model.flux.state_dict())
    model.text.save(aside)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tokenizers / name, aside / name)
    (aside / "pyramid_serve.json").write_text(json.dumps(CAPABILITIES, indent=2) + "\n")
    for path in target.glob("*") if target.exists() else ():
        if path.is_file() and not (aside / path.name).exists():
            shutil.copy(path, aside / path.name)
    replace_folder(aside, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("vae", "model"))
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--vae", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.what == "vae":
        vae = trained_vae(args.state)
        set_variance(vae)
        write_vae(vae, args.out)
    elif args.vae is None:
        parser.error("model needs --vae, the folder that `export vae` wrote")
    else:
        write_model(args.vae, args.state, args.out)


if __name__ == "__main__":
    main()
