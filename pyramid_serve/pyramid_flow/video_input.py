"""What one video of a call is made from.

h w: latent size of the video.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from pyramid_serve.api.requests import MAX_SEED
from pyramid_serve.checks import whole_number
from pyramid_serve.media.pictures import PictureSource, covering_size, read_picture
from pyramid_serve.precision import check_finite
from pyramid_serve.pyramid_flow.noise import NoiseSource, SeededNoise
from pyramid_serve.pyramid_flow.shapes import LATENT_CHANNELS, NUM_STAGES, LatentShape
from pyramid_serve.pyramid_flow.video_settings import check_texts


@dataclass(frozen=True)
class VideoInput:
    """What one video of a call is made from.

    seed: 0 to 2**64 - 1; None and -1 are replaced by a drawn one, which ``video.seed`` then tells; image: a
    picture to begin with, as a file, an image or an array (see :data:`media.pictures.PictureSource`), which is
    read at once (:func:`media.pictures.read_picture`) and later resized and cropped to the video's size;
    latents: (16, k, h, w) of units already made, to go on from, with the same ``image`` as before where there was one
    (their first is the picture, and the model's own guidance depends on there being one); noise: drawn from ``seed``
    unless given.

    Raises ``ValueError`` naming the field for a prompt that is blank or not text, and for a seed, picture or tensor
    that cannot be used.
    """

    prompt: str
    seed: int | None = 0
    image: PictureSource | None = None
    latents: Tensor | None = None
    noise: NoiseSource | None = None

    def __post_init__(self) -> None:
        check_texts({"prompt": self.prompt})
        object.__setattr__(self, "seed", _seed_of(self.seed))
        if self.image is not None:
            object.__setattr__(self, "image", read_picture(self.image, name="image"))
        if self.latents is not None and (not is_dense_floats(self.latents) or self.latents.ndim != 4):
            came = type(self.latents).__name__
            if isinstance(self.latents, Tensor):
                came = f"{self.latents.dtype} {tuple(self.latents.shape)} on {self.latents.device}"
            raise ValueError(
                f"latents: must be a tensor of floating-point numbers, not {came}; (16, k, h, w) and dense"
            )

    @property
    def num_given_units(self) -> int:
        """Units that need not be made. A picture is the first unit even if ``latents`` has none yet."""
        num_made = 0 if self.latents is None else self.latents.shape[1]
        return max(num_made, int(self.image is not None))

    def noise_source(self, shape: LatentShape) -> NoiseSource:
        if self.noise is not None:
            return self.noise
        assert self.seed is not None  # __post_init__ draws one where it was
        return SeededNoise(self.seed, shape)

    def check(self, shape: LatentShape) -> None:
        """``ValueError`` unless this can begin a video of this shape.

        The picture must not be too narrow for it, and ``latents`` must be the beginning of one, all of them finite.
        """
        if isinstance(self.image, Image.Image):
            height, width = shape.pixel_size
            covering_size(self.image, height=height, width=width, name="image")
        if self.latents is None:
            return
        expected = (LATENT_CHANNELS, *shape.size_at(NUM_STAGES - 1))
        channels, num_units, *size = self.latents.shape if self.latents.ndim == 4 else (0, 0)
        if (channels, *size) != expected or num_units > shape.num_latent_frames:
            raise ValueError(
                f"latents: shape {tuple(self.latents.shape)}, must be {expected[0]} channels, at most "
                f"{shape.num_latent_frames} frames of {expected[1]} x {expected[2]}"
            )
        for unit, latents in enumerate(self.latents.unbind(1)):
            check_finite(latents, f"latents: unit {unit}")


Videos = str | VideoInput | Sequence[str | VideoInput]
"""What a call makes: one video or several, each a ``VideoInput`` or only its prompt."""


def is_dense_floats(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.layout == torch.strided
        and not value.is_meta
        and not value.is_quantized
    )


def inputs_of(videos: Videos) -> list[VideoInput]:
    """The videos of a call. Raises ``ValueError`` for anything else, naming its place."""
    if isinstance(videos, str | VideoInput):
        return [_input_of(videos)]
    if not isinstance(videos, Sequence) or isinstance(videos, bytes | bytearray | memoryview):
        raise ValueError(
            f"videos={videos!r:.60}: must be a prompt, a VideoInput, or a sequence of them, not {type(videos).__name__}"
        )
    if not videos:
        raise ValueError("videos: give at least one")
    inputs = []
    for index, video in enumerate(videos):
        try:
            inputs.append(_input_of(video))
        except ValueError as error:
            raise ValueError(f"videos[{index}]: {error}") from None
    return inputs


def _input_of(video: str | VideoInput) -> VideoInput:
    return video if isinstance(video, VideoInput) else VideoInput(video)


def _seed_of(seed: object) -> int:
    """A seed as it was given, or one that is drawn."""
    try:
        given = -1 if seed is None else whole_number("seed", seed, least=-1, most=MAX_SEED)
    except ValueError:
        allowed = f"a whole number from 0 to {MAX_SEED}, or -1 or None to draw one"
        raise ValueError(f"seed={seed!r:.60}: must be {allowed}") from None
    return secrets.randbelow(MAX_SEED + 1) if given == -1 else given
