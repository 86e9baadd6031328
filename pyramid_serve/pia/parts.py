"""The UNet and the VAE, each loaded alone, from folders as diffusers saved them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pyramid_serve.checkpoints.naming import name_some
from pyramid_serve.checkpoints.sources import CheckpointError, read_config
from pyramid_serve.pia.lora import fuse_into_unet
from pyramid_serve.pia.model_files import UNET_CHANNELS, ModelFiles
from pyramid_serve.precision import vae_dtype
from pyramid_serve.reasons import first_line

_PLAIN_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")


def load_unet(files: ModelFiles, *, dtype: torch.dtype, device: torch.device) -> Any:
    """The UNet of a model, in eval mode: diffusers' ``UNetMotionModel``.

    A motion adapter is merged into a base model's UNet and then forgotten. Raises ``CheckpointError`` for files that
    are broken or do not fit each other.
    """
    import diffusers  # here, since it takes seconds to import

    if files.adapter is None:
        unet = load_part(diffusers.UNetMotionModel, files.unet.folder(), dtype)
    else:
        base = load_part(diffusers.UNet2DConditionModel, files.unet.folder(), dtype)
        adapter = load_part(diffusers.MotionAdapter, files.adapter.folder(), dtype)
        try:
            with _quiet_merge():
                unet = diffusers.UNetMotionModel.from_unet2d(base, adapter)
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{files.adapter.config_folder()}: does not fit the UNet of {files.base}: {first_line(error)}"
            ) from error
    if unet.config.in_channels != UNET_CHANNELS:
        raise CheckpointError(f"{files.base}: in_channels={unet.config.in_channels}: must be {UNET_CHANNELS}")
    fuse_into_unet(unet, files.loras)
    if files.settings.free_u is not None:
        unet.enable_freeu(**files.settings.free_u.model_dump())
    return _ready(unet, device)


def load_vae(files: ModelFiles, *, dtype: torch.dtype, device: torch.device) -> Any:
    """The VAE of a model, in eval mode: diffusers' ``AutoencoderKL``; for float16 in float32, see ``vae_dtype``.

    Raises ``CheckpointError``.
    """
    import diffusers  # here, since it takes seconds to import

    return _ready(load_part(diffusers.AutoencoderKL, files.vae.folder(), vae_dtype(dtype)), device)


def load_part(model_class: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A model of diffusers. Raises ``CheckpointError`` where its files are broken or do not fit its config."""
    read_config(folder)  # for an error of one line where there is none
    has_plain_weights = any((folder / name).is_file() for name in _PLAIN_WEIGHTS)
    has_halved_weights = any(folder.glob("diffusion_pytorch_model.fp16*.safetensors"))
    variant = "fp16" if has_halved_weights and not has_plain_weights else None
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


@contextmanager
def _quiet_merge() -> Iterator[None]:
    """Leave out the warning of diffusers that the merged UNet has an empty list of modules to be kept in float32."""
    from diffusers.utils import logging as diffusers_logging

    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)


def _ready(model: Any, device: torch.device) -> Any:
    return model.to(device).eval().requires_grad_(False)
