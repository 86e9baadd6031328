"""What a model of PIA can make, by the configs of its parts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyramid_serve.checkpoints.sources import CheckpointError, Source, read_config, read_json
from pyramid_serve.dtypes import DTypeName
from pyramid_serve.pia.model_files import (
    SETTINGS_FILE,
    ModelFiles,
    ModelSettings,
    PartFiles,
    model_files,
    motion_config,
)
from pyramid_serve.pia.settings import MAX_CLIP_SKIP

MIN_FRAMES = 8
TRAINED_FRAMES = 16
FRAMES_PER_SECOND = 8
LATENT_CHANNELS = 4

_SCHEDULER_PART = "scheduler"
_TRAIN_TIMESTEPS = 1000
"""Where a scheduler's file does not say."""


@dataclass(frozen=True)
class Capabilities:
    """What a model can make. Sizes in pixels."""

    settings: ModelSettings
    latent_factor: int
    """Pixels of a side for each of its latents: 8 for all published VAEs."""
    side_multiple: int
    """Width and height are multiples of it, so that the UNet can halve latents at each of its levels: 64 for SD 1.5."""
    long_edge: int
    """Of a video whose size is not asked for."""
    max_num_frames: int
    """As far as the positions of the motion modules reach."""
    max_clip_skip: int
    max_num_inference_steps: int
    """One less than the timesteps that the base was trained with."""
    timestep_spacing: str | None
    """Of the base's scheduler. None: each scheduler's own."""

    @property
    def dtype(self) -> DTypeName | None:
        return self.settings.dtype

    @property
    def default_num_frames(self) -> int:
        """What the motion modules were trained with."""
        return min(TRAINED_FRAMES, self.max_num_frames)


def capabilities(source: Source, variant: str | None) -> Capabilities:
    """What a model can make. Fetches no weights.

    Raises ``CheckpointError`` for files that are not a model of PIA, a motion adapter that is missing or of another
    kind among them, and for a variant, since there are none.
    """
    if variant is not None:
        raise CheckpointError(f"variant={variant!r:.60}: a model of PIA has no variants")
    files = model_files(source)
    unet = read_config(files.unet.config_folder())
    vae = read_config(files.vae.config_folder())
    text = read_config(PartFiles(files.base, "text_encoder").config_folder())
    latent_factor = 2 ** (_length(files.vae, vae, "block_out_channels") - 1)
    side_multiple = latent_factor * 2 ** (_length(files.unet, unet, "block_out_channels") - 1)
    trained = _count(files.unet, unet, "sample_size", most=1024) * latent_factor
    if (channels := vae.get("latent_channels")) != LATENT_CHANNELS:
        where = files.vae.config_folder() / "config.json"
        raise CheckpointError(f"{where}: latent_channels={channels!r:.60}: must be {LATENT_CHANNELS}")
    if "num_hidden_layers" in text:
        num_layers = _count(PartFiles(files.base, "text_encoder"), text, "num_hidden_layers", most=1024)
    else:
        num_layers = MAX_CLIP_SKIP
    scheduler = scheduler_config(files)
    num_timesteps = scheduler.get("num_train_timesteps", _TRAIN_TIMESTEPS)
    if isinstance(num_timesteps, bool) or not isinstance(num_timesteps, int) or num_timesteps < 2:
        raise CheckpointError(f"{files.base}: num_train_timesteps={num_timesteps!r:.60}: must be at least 2")
    max_num_frames = _count(files.adapter or files.unet, motion_config(files), "motion_max_seq_length", most=1024)
    if max_num_frames < MIN_FRAMES:
        raise CheckpointError(f"{source}: motion_max_seq_length={max_num_frames}: must be at least {MIN_FRAMES}")
    long_edge = files.settings.long_edge
    if long_edge is not None and long_edge % side_multiple:
        raise CheckpointError(
            f"{source}: {SETTINGS_FILE}: long_edge={long_edge}: must be a multiple of {side_multiple}, as all sides are"
        )
    return Capabilities(
        settings=files.settings,
        latent_factor=latent_factor,
        side_multiple=side_multiple,
        long_edge=long_edge or max(trained // side_multiple, 1) * side_multiple,
        max_num_frames=max_num_frames,
        max_clip_skip=min(MAX_CLIP_SKIP, num_layers),
        max_num_inference_steps=num_timesteps - 1,
        timestep_spacing=scheduler.get("timestep_spacing"),
    )


def scheduler_config(files: ModelFiles) -> dict[str, Any]:
    """The base's ``scheduler_config.json``. Raises ``CheckpointError`` where there is none."""
    return read_json(PartFiles(files.base, _SCHEDULER_PART).folder() / "scheduler_config.json")


def _count(files: PartFiles, config: Mapping[str, Any], key: str, *, most: int) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        where = files.config_folder() / "config.json"
        raise CheckpointError(f"{where}: {key}={value!r:.60}: must be a whole number from 1 to {most}")
    return value


def _length(files: PartFiles, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, list) or not 1 <= len(value) <= 8:
        raise CheckpointError(f"{files.config_folder() / 'config.json'}: {key}={value!r:.60}: must be a list")
    return len(value)
