"""A family that is not part of the package: coloured noise, one unit, 8 fps, with a request field of its own.

Its checkpoint is a folder with a ``noise.json``, which may name the fields of ``Capabilities``.
"""

import colorsys
import json
import secrets
import time
from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pyramid_serve.api import Offer, Plan, RequestError, RequestLimits, UnitRun, VideoRequest
from pyramid_serve.api.offers import field_schemas_of
from pyramid_serve.dtypes import DTypeName
from pyramid_serve.families import CommandLineOption, Decoded, Encoded, PartSource, StepRun, UnitInput
from pyramid_serve.pipeline import PartsPipeline

NUM_FRAMES, NUM_STEPS, FPS = 16, 4, 8

SECONDS_A_STEP = {"slow noise": 0.5}
"""By the prompt."""

_FORBID = ConfigDict(extra="forbid", frozen=True)


class Capabilities(BaseModel):
    model_config = _FORBID

    size: tuple[int, int] = (64, 48)
    dtype: DTypeName | None = None


class RequestFields(BaseModel):
    model_config = _FORBID

    hue: Annotated[
        float | None,
        CommandLineOption("--hue", "H", "of the noise, 0 to 1"),
        Field(ge=0, le=1, description="Of the noise: 0 is red, 0.33 green, 0.67 blue."),
    ] = None


class ShownFields(BaseModel):
    hue: float


class NoOptions(BaseModel):
    model_config = _FORBID


@dataclass(frozen=True)
class NoiseRequest:
    seed: int
    shape: tuple[int, ...]
    num_tokens: int = 1


class Text:
    dtype = torch.float32

    def encode(self, prompts: Sequence[str]) -> list[Encoded]:
        return [Encoded({"length": torch.tensor([len(prompt)])}) for prompt in prompts]


class Denoise:
    dtype = torch.float32

    def steps(self, given: UnitInput) -> Generator[Sequence[NoiseRequest], Sequence[Tensor], Tensor]:
        shape = given.plan.unit(given.unit).latent_shape
        colour = torch.tensor(colorsys.hsv_to_rgb(given.plan.settings["hue"], 1.0, 1.0)).reshape(3, 1, 1, 1)
        latents = torch.zeros(shape)
        for step in range(given.plan.unit(given.unit).num_steps):
            time.sleep(SECONDS_A_STEP.get(given.plan.prompt, 0.0))
            (noise,) = yield (NoiseRequest(given.plan.seed * 100 + step, shape),)
            latents = latents + noise
        brightness = 0.5 if given.picture is None else given.picture["brightness"]
        return latents.sigmoid() * colour * brightness * 2

    def forward(self, requests: Sequence[NoiseRequest]) -> list[Tensor]:
        return [torch.randn(one.shape, generator=torch.Generator().manual_seed(one.seed)) for one in requests]

    def packs_with(self, request: NoiseRequest) -> Hashable:
        return request.shape

    def warm_up(self, size: tuple[int, int] | None) -> None:
        self.forward([NoiseRequest(0, (3, 1, 2, 2))])


@dataclass(frozen=True, eq=False)
class DecodeRequest:
    latents: Tensor
    num_tokens: int = 1


class Decode:
    dtype = torch.float32

    def encode_picture(self, picture: Image.Image, *, height: int, width: int) -> dict[str, Tensor]:
        return {"brightness": torch.tensor(sum(picture.convert("L").resize((1, 1)).tobytes()) / 255)}

    def request(self, latents: Tensor, memory: Any) -> DecodeRequest:
        if latents.ndim != 4 or latents.shape[0] != 3:
            raise ValueError(f"latents: shape {tuple(latents.shape)}, must be (3, F, H, W)")
        return DecodeRequest(latents)

    def forward(self, requests: Sequence[DecodeRequest]) -> list[Decoded[None]]:
        frames = [(one.latents.clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous() for one in requests]
        return [Decoded(video, None) for video in frames]

    def packs_with(self, request: DecodeRequest) -> Hashable:
        return request.latents.shape

    def warm_up(self, size: tuple[int, int] | None) -> int:
        return 0


class NoiseFamily:
    name = "noise"
    title = "Noise"
    decodes_in_order = False
    state_version = None
    request_fields = RequestFields
    shown_fields = ShownFields
    denoise_options = NoOptions
    decode_options = NoOptions
    pipeline_options = NoOptions

    def recognises(self, folder: Path) -> bool:
        return (folder / "noise.json").is_file()

    def capabilities(self, source: Any, variant: str | None) -> Capabilities:
        return Capabilities.model_validate(json.loads((Path(source) / "noise.json").read_text()))

    def offer(self, capabilities: Capabilities, limits: RequestLimits) -> Offer:
        return Offer(
            default_size=capabilities.size,
            fps=FPS,
            default_num_frames=NUM_FRAMES,
            max_num_frames=NUM_FRAMES,
            sizes=(capabilities.size,),
            defaults={"hue": 0.0},
            field_schemas=field_schemas_of(RequestFields),
        )

    def plan(
        self,
        request: VideoRequest,
        fields: RequestFields,
        *,
        model: str,
        capabilities: Capabilities,
        limits: RequestLimits,
    ) -> Plan:
        # Every length is brought to the nearest that can be made, and there is one.
        width, height = request.size_asked_for or capabilities.size
        if (width, height) != capabilities.size:
            raise RequestError(f"size={width}x{height}: this model makes another", param="size")
        shape = (3, NUM_FRAMES, height, width)
        return Plan(
            family=self.name,
            model=model,
            prompt=request.prompt,
            prompt_suffix=request.prompt_suffix or "",
            negative_prompt=request.negative_prompt or "",
            seconds=str(NUM_FRAMES // FPS),
            width=width,
            height=height,
            fps=FPS,
            seed=secrets.randbelow(2**31) if request.seed is None else request.seed,
            has_picture=request.input_reference is not None,
            units=(UnitRun(count=1, num_frames=NUM_FRAMES, num_steps=NUM_STEPS, latent_shape=shape),),
            settings={"hue": fields.hue or 0.0},
        )

    def step_runs(self, plan: Plan, unit: int, *, num_text_tokens: int) -> list[StepRun]:
        return [StepRun(plan.unit(unit).num_steps, (1,))]

    def load_text(self, source: PartSource) -> Text:
        return Text()

    def load_denoise(self, source: PartSource) -> Denoise:
        return Denoise()

    def load_decode(self, source: PartSource) -> Decode:
        return Decode()

    def load_pipeline(self, source: Any, **_: Any) -> PartsPipeline:
        return PartsPipeline(Text(), Denoise(), Decode(), "float32 on cpu: it is noise")


FAMILY = NoiseFamily()
