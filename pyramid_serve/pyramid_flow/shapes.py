"""Sizes of videos, latents and stages, and the conversions between them.

The causal VAE compresses 8x in space and 8x in time, its first latent frame holding a single picture, so
F = 8 (T - 1) + 1 frames are T latent frames. These factors are used here and nowhere else.
Source: arXiv 2410.05954, section 4.1, and the published configurations.
"""

from typing import NamedTuple

from pyramid_serve.checks import whole_multiple, whole_number

LATENT_CHANNELS = 16
FRAMES_PER_SECOND = 24
SPATIAL_FACTOR = 8
TEMPORAL_FACTOR = 8
NUM_STAGES = 3
PATCH_SIZE = 2
SIZE_MULTIPLE = SPATIAL_FACTOR * PATCH_SIZE * 2 ** (NUM_STAGES - 1)
"""Pixels: the lowest stage still has to split into whole patches."""
PIXELS_PER_TOKEN = SPATIAL_FACTOR * PATCH_SIZE
"""Along each side, at the full stage."""


def num_frames_of(num_latent_frames: int) -> int:
    """Pixel frames that this many latent frames decode to."""
    return TEMPORAL_FACTOR * (num_latent_frames - 1) + 1


def num_latent_frames_of(num_frames: int) -> int:
    """Latent frames that this many pixel frames encode to. ``ValueError`` unless ``num_frames`` is 8 n + 1."""
    num_frames = whole_number("num_frames", num_frames, least=1)
    if (num_frames - 1) % TEMPORAL_FACTOR:
        raise ValueError(f"num_frames={num_frames}: must be {TEMPORAL_FACTOR} n + 1 (1, 9, 17, ...)")
    return (num_frames - 1) // TEMPORAL_FACTOR + 1


def nearest_num_latent_frames(seconds: float) -> int:
    """Latent frames of the video whose length at 24 frames a second is nearest to ``seconds``, at least one."""
    return max(1, round((seconds * FRAMES_PER_SECOND - 1) / TEMPORAL_FACTOR) + 1)


def seconds_of(num_latent_frames: int) -> float:
    """Length in seconds at 24 frames a second."""
    return num_frames_of(num_latent_frames) / FRAMES_PER_SECOND


class LatentShape(NamedTuple):
    """A video in latents: T latent frames of height x width, (C, T, H, W) with C = 16."""

    num_latent_frames: int
    height: int
    width: int

    @classmethod
    def of_pixels(cls, *, height: int, width: int, num_latent_frames: int) -> "LatentShape":
        """The latents of a video of ``height`` x ``width`` pixels. ``ValueError`` for a size that has none."""
        return cls(
            whole_number("num_latent_frames", num_latent_frames, least=1),
            whole_multiple("height", height, of=SIZE_MULTIPLE) // SPATIAL_FACTOR,
            whole_multiple("width", width, of=SIZE_MULTIPLE) // SPATIAL_FACTOR,
        )

    @property
    def pixel_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.height * SPATIAL_FACTOR, self.width * SPATIAL_FACTOR

    @property
    def num_frames(self) -> int:
        """Pixel frames."""
        return num_frames_of(self.num_latent_frames)

    def size_at(self, stage: int) -> tuple[int, int]:
        """(height, width) of the latents at a stage: a quarter, a half and the whole of the latent size."""
        scale = 2 ** (NUM_STAGES - 1 - stage)
        return self.height // scale, self.width // scale

    def num_tokens_at(self, stage: int) -> int:
        """Image tokens of one latent frame at a stage."""
        height, width = self.size_at(stage)
        return (height // PATCH_SIZE) * (width // PATCH_SIZE)

    def num_sequence_tokens(self, unit: int, stage: int) -> int:
        """Image tokens of one sequence: the history of ``unit`` finished frames and the current one, at a stage."""
        history = sum(self.num_tokens_at(max(stage - age, 0)) for age in range(unit))
        return history + self.num_tokens_at(stage)
