"""What a model is made of: which folder each of its parts is in. Nothing here imports torch or fetches weights.

A model is one of
- a saved ``PIAPipeline``, whose ``unet`` is merged with the motion adapter already;
- a Stable Diffusion 1.5 folder with the folder ``motion_adapter`` of PIA in it;
- a folder with a ``pyramid_serve.json`` that names its ``base``, its ``motion_adapter`` or both, which are elsewhere.
"""

import os
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pyramid_serve.api.limits import MAX_STEPS
from pyramid_serve.checkpoints.naming import name_some
from pyramid_serve.checkpoints.sources import WHOLE, CheckpointError, Source, read_config, read_json, resolve
from pyramid_serve.dtypes import DTypeName
from pyramid_serve.pia.settings import MAX_GUIDANCE, Motion, SchedulerName

SETTINGS_FILE = "pyramid_serve.json"
ADAPTER_PART = "motion_adapter"
MERGED = "UNetMotionModel"
BASE = "UNet2DConditionModel"
UNET_CHANNELS = 9
"""Of the UNet's input: noisy latents (4), the affinity to the picture (1), the picture's latents (4)."""

_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)
_Factor = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]


class FreeU(BaseModel):
    """How much the UNet's skip connections (s) and its backbone (b) count at its two deepest levels; arXiv 2309.11497.

    It belongs to the model and not to a request, since it is state of the UNet that all requests share.
    """

    model_config = _STRICT

    s1: _Factor
    s2: _Factor
    b1: _Factor
    b2: _Factor


class Lora(BaseModel):
    """A LoRA file that is added to the model's weights, so much."""

    model_config = _STRICT

    file: str
    """A ``.safetensors`` file. One that begins with ``./`` is in the folder of the settings, or in a folder of it."""
    scale: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)] = 1.0


class ModelSettings(BaseModel):
    """The fields of ``pyramid_serve.json``, each optional.

    Places are folders, URLs or Hub ids; those that begin with ``./`` are in the folder of this file.
    """

    model_config = _STRICT

    base: str | None = None
    """A model in the layout of Stable Diffusion 1.5. None: this folder."""
    motion_adapter: str | None = None
    """A folder that is PIA's motion adapter. None: ``motion_adapter`` in the base, where its UNet needs one."""
    vae: str | None = None
    """A folder that is a VAE, instead of the base's."""
    lora: Annotated[tuple[Lora, ...], Field(max_length=16, strict=False)] = ()
    free_u: FreeU | None = None
    personalised: bool = False
    """Whether the base has a style of its own, which the mode "style" needs."""
    dtype: DTypeName | None = None
    long_edge: Annotated[int, Field(ge=1)] | None = None
    """Pixels of the longer side where a request leaves the size out. None: what the UNet was trained with."""
    num_inference_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = 25
    guidance_scale: Annotated[float, Field(ge=0, le=MAX_GUIDANCE)] = 7.5
    scheduler: SchedulerName = "ddim"
    motion: Motion = "moderate"
    example_prompts: Annotated[tuple[str, ...], Field(max_length=12, strict=False)] = ()
    """What the model can do, for those who try it."""
    prompt_suffix: str = ""
    negative_prompt: str = "wrong white balance, dark, sketches, worst quality, low quality, deformed, distorted"


class PartFiles(NamedTuple):
    """A part of a model: the folder ``part`` of a source, or all of it (``WHOLE``)."""

    source: Source
    part: str

    def config_folder(self) -> Path:
        """The local folder, with at least its ``config.json`` where it has one. Fetches no weights."""
        return resolve(self.source) / self.part

    def folder(self) -> Path:
        """The local folder with its weights."""
        return resolve(self.source, parts=[self.part]) / self.part


class LoraFile(NamedTuple):
    """A LoRA file beside the settings that name it, or anywhere on this machine."""

    source: Source
    named: str
    scale: float

    def path(self) -> Path:
        """The local file, fetched where the settings are elsewhere."""
        if not self.named.startswith("./"):
            return Path(self.named).expanduser()
        part, _, name = self.named.removeprefix("./").rpartition("/")
        return resolve(self.source, parts=[part or WHOLE]) / part / name


class ModelFiles(NamedTuple):
    """Where the parts of a model are."""

    settings: ModelSettings
    base: Source
    """It has ``text_encoder``, ``tokenizer`` and ``scheduler``."""
    unet: PartFiles
    adapter: PartFiles | None
    """None: the UNet is merged with it already."""
    vae: PartFiles
    loras: tuple[LoraFile, ...]


def is_model(folder: Path) -> bool:
    """Whether a folder is a model of this family; a ``model_index.json`` that is broken makes it none.

    Raises ``CheckpointError`` for a settings file that cannot be read, since no other family has such a file.
    """
    settings = _read_if_there(folder / SETTINGS_FILE)
    try:
        kind = _read_if_there(folder / "model_index.json").get("_class_name")
    except CheckpointError:
        return False
    has_adapter = (folder / ADAPTER_PART / "config.json").is_file()
    names_parts = bool({"base", ADAPTER_PART} & settings.keys())
    return kind == "PIAPipeline" or (kind == "StableDiffusionPipeline" and has_adapter) or names_parts


def model_files(source: Source) -> ModelFiles:
    """Where the parts of a model are. Raises ``CheckpointError`` for a model that is not one of PIA."""
    settings = _settings_in(resolve(source) / SETTINGS_FILE)
    base = source if settings.base is None else _place(source, settings.base)
    unet = PartFiles(base, "unet")
    adapter = None
    kind = read_config(unet.config_folder()).get("_class_name")
    if kind == BASE:
        adapter = PartFiles(base, ADAPTER_PART)
        if settings.motion_adapter is not None:
            adapter = PartFiles(_place(source, settings.motion_adapter), WHOLE)
    elif kind != MERGED:
        raise CheckpointError(
            f"{unet.config_folder() / 'config.json'}: _class_name={kind!r:.60}: must be {BASE} or {MERGED}"
        )
    vae = PartFiles(base, "vae") if settings.vae is None else PartFiles(_place(source, settings.vae), WHOLE)
    loras = tuple(LoraFile(source, lora.file, lora.scale) for lora in settings.lora)
    files = ModelFiles(settings, base, unet, adapter, vae, loras)
    _check_channels(files)
    return files


def motion_config(files: ModelFiles) -> dict[str, Any]:
    """The ``config.json`` that tells of the motion modules: the adapter's, or that of a merged UNet."""
    where = files.unet if files.adapter is None else files.adapter
    if files.adapter is not None and not where.config_folder().is_dir():
        raise CheckpointError(
            f"{files.unet.source}: its UNet is that of a base model, and there is no motion adapter: looked for "
            f"{ADAPTER_PART}/, and for {ADAPTER_PART} in {SETTINGS_FILE}"
        )
    return read_config(where.config_folder())


def _check_channels(files: ModelFiles) -> None:
    """Raise ``CheckpointError`` unless the UNet, when merged, has the input channels of PIA's."""
    unet = files.unet.config_folder() / "config.json"
    if files.adapter is None:
        found, where = read_json(unet).get("in_channels"), f"{unet}: in_channels"
    else:
        found = motion_config(files).get("conv_in_channels")
        where = f"{files.adapter.config_folder() / 'config.json'}: conv_in_channels"
        if (channels := read_json(unet).get("in_channels")) != 4:
            raise CheckpointError(
                f"{unet}: in_channels={channels!r:.60}: must be 4 in a base model; one for inpainting cannot be used"
            )
    if found != UNET_CHANNELS:
        raise CheckpointError(f"{where}={found!r:.60}: must be {UNET_CHANNELS}; this one is not of PIA")


def _settings_in(file: Path) -> ModelSettings:
    try:
        return ModelSettings.model_validate(_read_if_there(file))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise CheckpointError(f"{file}: {name_some(problems, '; ')}") from error


def _read_if_there(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def _place(source: Source, named: str) -> Source:
    """A place that a settings file names."""
    if not named.startswith("./"):
        return named
    return f"{os.fspath(source).rstrip('/')}/{named.removeprefix('./')}"
