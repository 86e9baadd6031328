"""What a server takes at most."""

from typing import Annotated

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

MAX_STEPS = 1000
"""Denoising steps of one stage of one unit: the most that any limit may allow."""


class RequestLimits(BaseModel):
    """What a server takes at most, where the model itself sets no bound."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    max_prompt_characters: Annotated[int, Field(ge=1)] = 4000
    """Of the prompt, and of the negative prompt and the suffix each."""
    max_pixels: Annotated[int, Field(ge=64 * 64)] = 1024 * 1024
    """Width times height."""
    max_num_units: Annotated[
        int, Field(ge=1, validation_alias=AliasChoices("max_num_units", "max_num_latent_frames"))
    ] = 61
    """Units of one video. Configurations of earlier releases call it ``max_num_latent_frames``."""
    max_num_inference_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = 100
    """Of one stage of one unit."""
    max_picture_bytes: Annotated[int, Field(ge=1)] = 20 * 1024 * 1024
    max_picture_pixels: Annotated[int, Field(ge=1)] = 32 * 1024 * 1024
