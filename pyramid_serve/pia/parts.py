"""The UNet and the VAE, each loaded alone, from folders as diffusers saved them."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pyramid_serve.checkpoints.naming import name_some
from pyramid_serve.checkpoints.sources import CheckpointError, read_config
from pyramid_serve.precision import vae_dtype
from pyramid_serve.reasons import first_line

logger = logging.getLogger(__name__)

UNET_CHANNELS = 9
"""Of the UNet's input: noisy latents (4), the affinity to the picture (1), the picture's latents (4)."""
MERGED = "UNetMotionModel"
BASE = "UNet2DConditionModel"


def load_unet(folder: Path, adapter: Path | None, *, dtype: torch.dtype, device: torch.device) -> Any:
    """The UNet of a ``unet`` folder, in eval mode: diffusers' ``UNetMotionModel``.

    adapter: the folder of the motion adapter, which is merged into a base model's UNet and then forgotten; a folder
    that holds the merged UNet needs none. Raises ``CheckpointError`` where the result is not a UNet of PIA.
    """
    import diffusers  # here, since it takes seconds to import

    config = read_config(folder)
    num_channels = check_unet(folder, config, adapter)
    if config["_class_name"] == MERGED:
        return _ready(load_part(diffusers.UNetMotionModel, folder, dtype), device)
    assert adapter is not None  # or check_unet would have refused it
    base = load_part(diffusers.UNet2DConditionModel, folder, dtype)
    motion = load_part(diffusers.MotionAdapter, adapter, dtype)
    try:
        merged = diffusers.UNetMotionModel.from_unet2d(base, motion)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{adapter}: does not fit the UNet {folder}: {first_line(error)}") from error
    assert merged.config.in_channels == num_channels
    return _ready(merged, device)


def check_unet(folder: Path, config: Mapping[str, Any], adapter: Path | None) -> int:
    """The number of input channels of the UNet that ``load_unet`` would make. Reads no weights.

    Raises ``CheckpointError`` unless it is that of PIA.
    """
    kind = config.get("_class_name")
    if kind == MERGED:
        found, where = config.get("in_channels"), f"{folder / 'config.json'}: in_channels"
    elif kind != BASE:
        raise CheckpointError(f"{folder / 'config.json'}: _class_name={kind!r}: must be {BASE} or {MERGED}")
    elif adapter is None:
        raise CheckpointError(f"{folder}: the UNet of a base model, without a motion adapter to make it one of PIA")
    else:
        found, where = read_config(adapter).get("conv_in_channels"), f"{adapter / 'config.json'}: conv_in_channels"
        if config.get("in_channels") != 4:
            raise CheckpointError(
                f"{folder / 'config.json'}: in_channels={config.get('in_channels')!r:.60}: must be 4 in a base model; "
                "one for inpainting cannot be used"
            )
    if found != UNET_CHANNELS:
        raise CheckpointError(f"{where}={found!r:.60}: must be {UNET_CHANNELS}; this one is of AnimateDiff, not of PIA")
    return UNET_CHANNELS


def load_vae(folder: Path, *, dtype: torch.dtype, device: torch.device) -> Any:
    """The VAE of a folder, in eval mode: diffusers' ``AutoencoderKL``; for float16 in float32, see ``vae_dtype``."""
    import diffusers  # here, since it takes seconds to import

    return _ready(load_part(diffusers.AutoencoderKL, folder, vae_dtype(dtype)), device)


def load_part(model_class: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A model of diffusers. Raises ``CheckpointError`` where its files are broken or do not fit its config."""
    read_config(folder)  # for an error of one line where there is none
    variant = None
    if not any(folder.glob("diffusion_pytorch_model*.bin")) and not _has_plain_weights(folder):
        variant = "fp16"  # the only other kind that is published
    try:
        model, report = model_class.from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True, output_loading_info=True, variant=variant
        )
    except Exception as error:  # diffusers raises any class for files that are broken
        raise CheckpointError(f"{folder}: cannot be loaded: {type(error).__name__}: {first_line(error)}") from error
    found = (
        ("missing", report["missing_keys"]),
        ("misshapen", [key[0] for key in report["mismatched_keys"]]),
        ("left over", report["unexpected_keys"]),
    )
    problems = [f"{len(keys)} {what}: {name_some(sorted(keys))}" for what, keys in found if keys]
    if problems:
        raise CheckpointError(f"{folder}: weights do not fit the config: {'; '.join(problems)}")
    return model


def _has_plain_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _PLAIN_WEIGHTS)


_PLAIN_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")


def _ready(model: Any, device: torch.device) -> Any:
    return model.to(device).eval().requires_grad_(False)
