"""What a model of PIA can make, by the configs of its parts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyramid_serve.checkpoints.sources import CheckpointError, Source, read_config, read_json
from pyramid_serve.dtypes import DTypeName
from pyramid_serve.pia.model_files import ModelFiles, ModelSettings, PartFiles, model_files, motion_config
from pyramid_serve.pia.settings import MAX_CLIP_SKIP

MIN_FRAMES = 8
TRAINED_FRAMES = 16
FRAMES_PER_SECOND = 8
LATENT_CHANNELS = 4

_SCHEDULER_PART = "scheduler"


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
    max_num_frames = _count(files.adapter or files.unet, motion_config(files), "motion_max_seq_length", most=1024)
    if max_num_frames < MIN_FRAMES:
        raise CheckpointError(f"{source}: motion_max_seq_length={max_num_frames}: must be at least {MIN_FRAMES}")
    return Capabilities(
        settings=files.settings,
        latent_factor=latent_factor,
        side_multiple=side_multiple,
        long_edge=max((files.settings.long_edge or trained) // side_multiple, 1) * side_multiple,
        max_num_frames=max_num_frames,
        max_clip_skip=min(MAX_CLIP_SKIP, int(text.get("num_hidden_layers", MAX_CLIP_SKIP))),
        timestep_spacing=scheduler_config(files).get("timestep_spacing"),
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
