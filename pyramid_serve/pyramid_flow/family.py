"""Pyramid Flow as a family. Imports torch only when a part is loaded."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pyramid_serve.api.limits import RequestLimits
from pyramid_serve.api.offers import Offer
from pyramid_serve.api.plans import Plan
from pyramid_serve.api.requests import VideoRequest
from pyramid_serve.checkpoints.sources import Source
from pyramid_serve.families import CommandLineOption, PartSource, Pipeline, StepRun
from pyramid_serve.pyramid_flow import planning
from pyramid_serve.pyramid_flow.capabilities import Capabilities, capabilities
from pyramid_serve.pyramid_flow.request_fields import RequestFields, ShownFields
from pyramid_serve.pyramid_flow.settings import AttentionName, CompiledName
from pyramid_serve.pyramid_flow.variants import VARIANT_PREFIX

if TYPE_CHECKING:
    import torch

    from pyramid_serve.dtypes import DTypeName
    from pyramid_serve.pyramid_flow.serving import Decoding, Denoising, TextEncoding

_FORBID = ConfigDict(extra="forbid", frozen=True)


class DenoiseOptions(BaseModel):
    """The options of the transformer."""

    model_config = _FORBID

    attention: AttentionName | None = None
    """None: "flex" on CUDA, else "blocks"."""
    compiled: CompiledName | None = None
    """What is compiled beside attention. None: "blocks" on CUDA, unless ``batch_invariant``; else "none"."""
    batch_invariant: bool = False
    """Whether a seed gives the same bits whatever shares its forwards, at a price. On a CPU this is so in any case."""
    graphs: bool = False
    """Whether small packs are replayed as CUDA graphs, with flex attention. No GPU has run them yet."""

    fp8: bool = False
    """Whether the products of the blocks are computed in 8 bits, on an H100 or later. No GPU has run them yet."""

    @model_validator(mode="after")
    def _check_graphs(self) -> Self:
        if self.graphs and self.attention not in (None, "flex"):
            raise ValueError(f"graphs: cannot be had with attention={self.attention!r}, only with 'flex'")
        return self


class DecodeOptions(BaseModel):
    """The options of the VAE."""

    model_config = _FORBID

    tiling: Annotated[int, Field(ge=1)] | None = None
    """Pixels: work in tiles of this size, for less device memory, slower. None: whole frames."""
    compiled: CompiledName | None = None
    """What is compiled between convolutions. None: "blocks" on CUDA, else "none"."""


class PipelineOptions(BaseModel):
    """The options of a pipeline in one process."""

    model_config = _FORBID

    attention: Annotated[
        AttentionName | None, CommandLineOption("--attention", "NAME", "flex on CUDA, else blocks")
    ] = None
    compiled: Annotated[
        CompiledName | None,
        CommandLineOption("--compiled", "NAME", "what is compiled: blocks (on CUDA unless given) or none"),
    ] = None
    batch_invariant: Annotated[
        bool,
        CommandLineOption(
            "--batch-invariant",
            "BOOL",
            "on CUDA: the bits that a server with this option gives; on a CPU they are the same anyway",
            without_value="true",
        ),
    ] = False
    tiling: Annotated[
        Annotated[int, Field(ge=1)] | None,
        CommandLineOption("--tiling", "PIXELS", "tile the VAE, slower, in less device memory", without_value="256"),
    ] = None
    offload: Annotated[
        Literal["none", "model", "layers"],
        CommandLineOption(
            "--offload", "NAME", "for small GPUs: keep a model, or only a layer, on the device at a time"
        ),
    ] = "none"


class PyramidFlowFamily:
    """See ``families.Family`` for what each of these is."""

    name = planning.NAME
    title = "Pyramid Flow"
    decodes_in_order = True
    state_version = None  # a unit takes about as long as the time between two states: see docs/operations.md
    request_fields = RequestFields
    shown_fields = ShownFields
    denoise_options = DenoiseOptions
    decode_options = DecodeOptions
    pipeline_options = PipelineOptions

    def recognises(self, folder: Path) -> bool:
        return any(folder.glob(f"{VARIANT_PREFIX}*/config.json"))

    def capabilities(self, source: Source, variant: str | None) -> Capabilities:
        return capabilities(source, variant)

    def offer(self, capabilities: Capabilities, limits: RequestLimits) -> Offer:
        return planning.offer(capabilities, limits)

    def plan(
        self,
        request: VideoRequest,
        fields: RequestFields,
        *,
        model: str,
        capabilities: Capabilities,
        limits: RequestLimits,
    ) -> Plan:
        return planning.plan(request, fields, model=model, capabilities=capabilities, limits=limits)

    def step_runs(self, plan: Plan, unit: int, *, num_text_tokens: int) -> list[StepRun]:
        return planning.step_runs(plan, unit, num_text_tokens=num_text_tokens)

    def load_text(self, source: PartSource) -> "TextEncoding":
        from pyramid_serve.pyramid_flow.serving import TextEncoding

        return TextEncoding(source)

    def load_denoise(self, source: PartSource) -> "Denoising":
        from pyramid_serve.pyramid_flow.serving import Denoising

        return Denoising(source)

    def load_decode(self, source: PartSource) -> "Decoding":
        from pyramid_serve.pyramid_flow.serving import Decoding

        return Decoding(source)

    def load_pipeline(
        self,
        source: Source,
        *,
        variant: str | None,
        dtype: "DTypeName | None",
        device: "torch.device | str",
        options: Any,
    ) -> Pipeline:
        from pyramid_serve.pyramid_flow.planned import PlannedPipeline

        return PlannedPipeline(source, variant=variant, dtype=dtype, device=device, options=options)


FAMILY = PyramidFlowFamily()
