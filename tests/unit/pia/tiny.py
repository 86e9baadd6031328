"""A tiny random PIA: a Stable Diffusion 1.5 folder with the folder of a motion adapter in it, half a megabyte.

Its sizes are those that the tests of diffusers had for ``PIAPipeline``. The VAE makes pictures 2 times as large as
latents, and the UNet has one level below the first, so sides are multiples of 4 pixels.
"""

import json
from pathlib import Path

import torch

CHANNELS = (8, 8)
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}
"""As bases have it. PIA needs linear betas, whatever stands here."""
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def save_tiny(folder: Path) -> None:
    """Write the checkpoint. Its weights are the same each time with one release of torch."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    base = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=CHANNELS,
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=2,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
    )
    text_encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=8,
            num_attention_heads=4,
            num_hidden_layers=5,
            intermediate_size=37,
            vocab_size=1000,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    base.save_pretrained(folder / "unet")
    tiny_adapter(conv_in_channels=9).save_pretrained(folder / "motion_adapter")
    vae.save_pretrained(folder / "vae")
    text_encoder.save_pretrained(folder / "text_encoder")
    save_tokenizer(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2))
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2))


def tiny_adapter(*, conv_in_channels: int | None) -> torch.nn.Module:
    """An adapter for the tiny base: of PIA with 9 channels, of AnimateDiff with None."""
    import diffusers

    return diffusers.MotionAdapter(
        block_out_channels=CHANNELS,
        motion_layers_per_block=2,
        motion_norm_num_groups=2,
        motion_num_attention_heads=4,
        use_motion_mid_block=False,
        conv_in_channels=conv_in_channels,
    )


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of CLIP without merges: each byte is a token."""
    characters = [chr(code) for code in range(33, 127)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *characters, *(f"{character}</w>" for character in characters)]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
