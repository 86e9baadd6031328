"""What a Pyramid Flow checkpoint can make, and the settings that suit it best."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from pyramid_serve.checkpoints.configs import MAX_COUNT
from pyramid_serve.checkpoints.naming import name_some
from pyramid_serve.checkpoints.sources import CheckpointError, Source, read_config, read_json, resolve
from pyramid_serve.checks import whole_number
from pyramid_serve.dtypes import DTypeName
from pyramid_serve.pyramid_flow.shapes import PIXELS_PER_TOKEN, SIZE_MULTIPLE, seconds_of
from pyramid_serve.pyramid_flow.variants import VARIANT_PREFIX, choose_variant, variants

DEFAULT_PROMPT_SUFFIX = ", hyper quality, Ultra HD, 8K"
DEFAULT_NEGATIVE_PROMPT = (
    "cartoon style, worst quality, low quality, blurry, absolute black, absolute white, low res, extra limbs, "
    "extra digits, misplaced objects, mutated anatomy, monochrome, horror"
)

CAPABILITIES_FILE = "pyramid_serve.json"

_Pixels = Annotated[int, Field(gt=0, multiple_of=SIZE_MULTIPLE)]
_Count = Annotated[int, Field(ge=1)]
_Guidance = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Steps = tuple[_Count, _Count, _Count]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Capabilities:
    """What one transformer can make, and the settings that suit it best.

    ``pyramid_serve.json`` at the top of a checkpoint may hold any of these fields, and under ``variants`` those of
    single variants by their full names, which take precedence.
    """

    sizes: Annotated[tuple[tuple[_Pixels, _Pixels], ...], Field(min_length=1)] | None = None
    """(width, height) in pixels, the default first. None: every legal size."""
    max_side: _Pixels | None = None
    """The largest width or height in pixels, if a sine table of positions limits it. None: any."""
    max_num_latent_frames: _Count | None = None
    """The longest video. None: any."""
    default_num_latent_frames: _Count = 16
    num_inference_steps: _Steps = (20, 20, 20)
    """Steps of unit 0 at each stage."""
    video_num_inference_steps: _Steps = (10, 10, 10)
    """Steps of the other units at each stage."""
    guidance_scale: _Guidance = 7.0
    """Of unit 0."""
    video_guidance_scale: _Guidance = 5.0
    """Of the other units."""
    image_video_guidance_scale: _Guidance = 4.0
    """Of the other units where unit 0 is a given picture."""
    dtype: DTypeName | None = None
    """The dtype that suits it best on a GPU. A CPU computes in what it is fast at, see ``precision.suitable_dtype``."""
    example_prompts: Annotated[tuple[str, ...], Field(max_length=12)] = ()
    """What the model can do, for those who try it."""
    prompt_suffix: str = DEFAULT_PROMPT_SUFFIX
    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT

    @model_validator(mode="after")
    def _default_is_allowed(self) -> Self:
        self.check_num_latent_frames(self.default_num_latent_frames)
        return self

    @property
    def default_size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        if self.sizes:
            return self.sizes[0]
        width, height = _PUBLISHED_CAPABILITIES[VARIANT_PREFIX + "384p"]["sizes"][0]
        return (width, height) if self.max_side is None else (min(width, self.max_side), min(height, self.max_side))

    def check_size(self, width: int, height: int) -> None:
        """``ValueError`` unless the model makes this size (pixels)."""
        width, height = whole_number("width", width, least=1), whole_number("height", height, least=1)
        if self.sizes is not None:
            if (width, height) not in self.sizes:
                allowed = ", ".join(f"{w}x{h}" for w, h in self.sizes)
                raise ValueError(f"size={width}x{height}: this model makes {allowed}")
        elif width % SIZE_MULTIPLE or height % SIZE_MULTIPLE:
            raise ValueError(f"size={width}x{height}: width and height must be positive multiples of {SIZE_MULTIPLE}")
        elif self.max_side is not None and max(width, height) > self.max_side:
            raise ValueError(f"size={width}x{height}: this model's positions reach to {self.max_side} pixels a side")

    def check_num_latent_frames(self, num_latent_frames: int) -> None:
        """``ValueError`` unless the model makes videos of this length."""
        num_latent_frames = whole_number("num_latent_frames", num_latent_frames, least=1)
        longest = self.max_num_latent_frames
        if longest is not None and num_latent_frames > longest:
            length = "a single picture" if longest == 1 else f"{seconds_of(longest):.2g} s at 24 fps"
            raise ValueError(f"num_latent_frames={num_latent_frames}: at most {longest} ({length})")


_PUBLISHED_TRANSFORMERS: tuple[dict[str, Any], ...] = (
    {
        "_class_name": "PyramidDiffusionMMDiT",
        "num_layers": 24,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
    },
    {
        "_class_name": "PyramidFluxTransformer",
        "num_layers": 8,
        "num_single_layers": 16,
        "num_attention_heads": 30,
        "joint_attention_dim": 4096,
    },
)
_PUBLISHED_CAPABILITIES: dict[str, dict[str, Any]] = {
    VARIANT_PREFIX + "384p": {"sizes": [[640, 384]], "max_num_latent_frames": 16},
    VARIANT_PREFIX + "768p": {"sizes": [[1280, 768]], "max_num_latent_frames": 31},
    VARIANT_PREFIX + "image": {
        "sizes": [[1024, 1024], [1280, 768], [768, 1280]],
        "max_num_latent_frames": 1,
        "default_num_latent_frames": 1,
    },
}


def capabilities(source: Source, variant: str | None = None) -> Capabilities:
    """What a variant can do (see ``choose_variant``). Fetches no weights.

    For the published transformers it is known, by their configuration and variant. ``pyramid_serve.json`` takes
    precedence. With neither it is every legal size and length, with the published steps and guidances.
    Raises ``CheckpointError`` for a ``pyramid_serve.json`` with a field that is unknown or not allowed.
    """
    folder, name = resolve(source), choose_variant(source, variant)
    config = read_config(folder / name)
    is_published = any(known.items() <= _scalars(config).items() for known in _PUBLISHED_TRANSFORMERS)
    fields = dict(_PUBLISHED_CAPABILITIES.get(name, {})) if is_published else {}
    if (table_size := config.get("pos_embed_max_size")) is not None:
        if isinstance(table_size, bool) or not isinstance(table_size, int) or not 1 <= table_size <= MAX_COUNT:
            raise CheckpointError(
                f"{folder / name / 'config.json'}: pos_embed_max_size={table_size!r:.60}: "
                f"must be a whole number from 1 to {MAX_COUNT}"
            )
        fields["max_side"] = table_size * PIXELS_PER_TOKEN // SIZE_MULTIPLE * SIZE_MULTIPLE
    file = folder / CAPABILITIES_FILE
    if not file.exists():
        return _parse_capabilities(file, fields)
    given = read_json(file)
    by_variant = given.pop("variants", {})
    if not isinstance(by_variant, dict) or not all(isinstance(own, dict) for own in by_variant.values()):
        raise CheckpointError(f"{file}: variants must be an object of objects by variant")
    unknown = sorted(by_variant.keys() - set(variants(folder)))
    if unknown:
        raise CheckpointError(f"{file}: variants that are not there: {name_some(unknown)}")
    return _parse_capabilities(file, {**fields, **given, **by_variant.get(name, {})})


def _scalars(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if isinstance(value, (str, int))}


def _parse_capabilities(file: Path, fields: Mapping[str, Any]) -> Capabilities:
    try:
        # As JSON, because strict validation takes a list for a tuple there.
        return TypeAdapter(Capabilities).validate_json(json.dumps(fields))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, problem['loc'])) or 'fields'}: {problem['msg']}" for problem in error.errors()]
        raise CheckpointError(f"{file}: {name_some(problems, '; ')}") from error
