"""What the videos of one call have in common."""

from collections.abc import Mapping
from dataclasses import dataclass

from pyramid_serve.api.requests import parse_request
from pyramid_serve.checks import whole_number
from pyramid_serve.pyramid_flow.capabilities import Capabilities
from pyramid_serve.pyramid_flow.settings import SamplingSettings
from pyramid_serve.pyramid_flow.shapes import LatentShape


@dataclass(frozen=True)
class VideoSettings:
    """All that the videos of one call have in common. Sizes in pixels; see :meth:`PyramidFlow.settings`.

    Raises ``ValueError`` for values that no model could use, naming the field.
    """

    width: int
    height: int
    num_latent_frames: int
    sampling: SamplingSettings
    prompt_suffix: str
    negative_prompt: str

    def __post_init__(self) -> None:
        for name in ("width", "height", "num_latent_frames"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least=1))
        if not isinstance(self.sampling, SamplingSettings):
            raise ValueError(f"sampling={self.sampling!r:.60}: must be SamplingSettings")
        check_texts({"prompt_suffix": self.prompt_suffix, "negative_prompt": self.negative_prompt})
        _ = self.latent_shape  # refuses a size that has no latents

    @property
    def latent_shape(self) -> LatentShape:
        return LatentShape.of_pixels(height=self.height, width=self.width, num_latent_frames=self.num_latent_frames)


def settings_for(
    capabilities: Capabilities,
    *,
    has_image: bool = False,
    width: int | None = None,
    height: int | None = None,
    num_latent_frames: int | None = None,
    prompt_suffix: str | None = None,
    negative_prompt: str | None = None,
    sampling: SamplingSettings | None = None,
) -> VideoSettings:
    """Settings with the model's own defaults where nothing is given, checked against what it can do.

    Raises ``ValueError`` naming the field, what came and what is allowed.
    """
    if (width is None) != (height is None):
        raise ValueError("size: give both width and height, or neither")
    default_width, default_height = capabilities.default_size
    if width is None or height is None:
        width, height = default_width, default_height
    num_latent_frames = capabilities.default_num_latent_frames if num_latent_frames is None else num_latent_frames
    capabilities.check_size(width, height)
    capabilities.check_num_latent_frames(num_latent_frames)
    return VideoSettings(
        width=width,
        height=height,
        num_latent_frames=num_latent_frames,
        sampling=default_sampling(capabilities, has_image=has_image) if sampling is None else sampling,
        prompt_suffix=capabilities.prompt_suffix if prompt_suffix is None else prompt_suffix,
        negative_prompt=capabilities.negative_prompt if negative_prompt is None else negative_prompt,
    )


def default_sampling(capabilities: Capabilities, *, has_image: bool = False) -> SamplingSettings:
    """The steps and guidances that suit a model best; those of the other units depend on whether a picture is given."""
    return SamplingSettings(
        num_inference_steps=capabilities.num_inference_steps,
        video_num_inference_steps=capabilities.video_num_inference_steps,
        guidance_scale=capabilities.guidance_scale,
        video_guidance_scale=capabilities.image_video_guidance_scale
        if has_image
        else capabilities.video_guidance_scale,
    )


def check_texts(texts: Mapping[str, object]) -> None:
    """``ValueError`` unless these are texts that a server would accept as well."""
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{name}={text!r:.60}: must be text, not {type(text).__name__}")
    parse_request({"prompt": "any", **texts})
