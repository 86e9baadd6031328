"""How a video is sampled, as plain values without torch: the motion, the scheduler, FreeInit, and how many steps."""

from typing import Annotated, Literal, NamedTuple, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from pyramid_serve.api.requests import no_bool

SchedulerName = Literal["ddim", "euler", "dpm++", "pndm", "lcm"]
Mode = Literal["animate", "loop", "style"]
"""animate: away from the picture; loop: away and back; style: into the style of the model, away from the picture's."""
Motion = Literal["small", "moderate", "large"]
FilterMethod = Literal["butterworth", "ideal", "gaussian"]
CompiledName = Literal["blocks", "none"]
"""See :mod:`compiled`."""

MAX_GUIDANCE = 100.0
MAX_MOTION_SCALE = 8
MAX_CLIP_SKIP = 3
"""Layers at the end of the text encoder that may be left out."""
MAX_LCM_STEPS = 50
"""Steps that an LCM was distilled for; its scheduler makes no more."""

# The constraints come before the validators that run first: so pydantic tells them in the JSON schema.
_NumIterations = Annotated[int, Field(ge=1, le=5), BeforeValidator(no_bool)]
_Order = Annotated[int, Field(ge=1, le=16), BeforeValidator(no_bool)]
_Frequency = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), BeforeValidator(no_bool)]


class FreeInit(BaseModel):
    """FreeInit: make the video several times, each time from noise with the low frequencies of the time before.

    Source: arXiv 2312.07537. The names and defaults are those of diffusers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    num_iters: Annotated[_NumIterations, Field(description="How often the video is made.")] = 3
    use_fast_sampling: Annotated[
        bool, Field(description="Whether early times take fewer steps: 1/n of them, 2/n, and so on.")
    ] = False
    method: Annotated[FilterMethod, Field(description="The low-pass filter.")] = "butterworth"
    order: Annotated[_Order, Field(description="Of the Butterworth filter.")] = 4
    spatial_stop_frequency: Annotated[_Frequency, Field(description="1 is the highest.")] = 0.25
    temporal_stop_frequency: Annotated[_Frequency, Field(description="1 is the highest.")] = 0.25


class MotionKind(NamedTuple):
    """What moves, and how much."""

    mode: Mode
    motion: Motion

    @property
    def scale(self) -> int:
        """The number from 0 to 8 that diffusers has for it."""
        return 3 * get_args(Mode).index(self.mode) + get_args(Motion).index(self.motion)

    @classmethod
    def of_scale(cls, scale: int) -> "MotionKind":
        """The inverse of ``scale``."""
        mode, motion = divmod(scale, 3)
        return cls(get_args(Mode)[mode], get_args(Motion)[motion])


_LATENT_PIXELS_PER_TOKEN = 16
"""So that a row costs about what as many tokens of Pyramid Flow's transformer do."""


def row_cost(num_latent_pixels: int) -> int:
    """What one row of the UNet, with so many latent pixels over all frames, takes of a token budget."""
    return max(num_latent_pixels // _LATENT_PIXELS_PER_TOKEN, 1)


def num_skipped_steps(num_inference_steps: int, strength: float) -> int:
    """Steps at the start that ``strength`` below 1 leaves out."""
    return num_inference_steps - min(int(num_inference_steps * strength), num_inference_steps)


def steps_of_iterations(num_inference_steps: int, free_init: FreeInit | None) -> list[int]:
    """The steps asked of the scheduler at each iteration of FreeInit; one iteration without it."""
    if free_init is None:
        return [num_inference_steps]
    num = free_init.num_iters
    if not free_init.use_fast_sampling:
        return [num_inference_steps] * num
    return [max(1, int(num_inference_steps / num * (index + 1))) for index in range(num)]


def num_steps(
    scheduler: SchedulerName, num_inference_steps: int, *, strength: float, free_init: FreeInit | None
) -> int:
    """Denoising steps of a whole video, each one turn of the UNet."""
    asked = steps_of_iterations(num_inference_steps, free_init)
    made = sum(num_timesteps(scheduler, each) for each in asked)
    return made if free_init is not None else made - num_skipped_steps(num_inference_steps, strength)


def num_timesteps(scheduler: SchedulerName, num_inference_steps: int) -> int:
    """The steps that a scheduler makes when it is asked for so many.

    PNDM takes its second one twice; see arXiv 2202.09778.
    """
    return num_inference_steps + (scheduler == "pndm" and num_inference_steps > 1)
