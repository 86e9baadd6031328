"""PIA as a family. Imports torch only when a part is loaded."""

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from pyramid_serve.api.limits import RequestLimits
from pyramid_serve.api.offers import Offer
from pyramid_serve.api.plans import Plan
from pyramid_serve.api.requests import VideoRequest
from pyramid_serve.checkpoints.sources import Source
from pyramid_serve.families import PartSource, Pipeline, StepRun
from pyramid_serve.pia import planning
from pyramid_serve.pia.capabilities import Capabilities, capabilities
from pyramid_serve.pia.model_files import is_model
from pyramid_serve.pia.request_fields import RequestFields, ShownFields
from pyramid_serve.pia.settings import CompiledName

if TYPE_CHECKING:
    import torch

    from pyramid_serve.dtypes import DTypeName
    from pyramid_serve.pia.serving import Decoding, Denoising, TextEncoding


class NoOptions(BaseModel):
    """The options of a part that has none of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DenoiseOptions(BaseModel):
    """The options of the UNet."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    compiled: CompiledName | None = None
    """What is compiled. None: "blocks" on CUDA, else "none"."""
    channels_last: bool | None = None
    """Whether convolutions have the channels last. None: on CUDA."""
    batch_invariant: bool = False
    """Whether a seed gives the same bits whatever shares its forwards: every prompt of every video is then computed by
    itself. On a CPU this is so in any case.
    """


class PIAFamily:
    """See ``families.Family`` for what each of these is."""

    name = planning.NAME
    title = "PIA"
    decodes_in_order = False
    state_version = f"1, diffusers {metadata.version('diffusers')}"  # whose schedulers' attributes are in a state
    request_fields = RequestFields
    shown_fields = ShownFields
    denoise_options = DenoiseOptions
    decode_options = NoOptions
    pipeline_options = NoOptions

    def recognises(self, folder: Path) -> bool:
        return is_model(folder)

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
        return planning.step_runs(plan, unit)

    def load_text(self, source: PartSource) -> "TextEncoding":
        from pyramid_serve.pia.serving import TextEncoding

        return TextEncoding(source)

    def load_denoise(self, source: PartSource) -> "Denoising":
        from pyramid_serve.pia.serving import Denoising

        return Denoising(source)

    def load_decode(self, source: PartSource) -> "Decoding":
        from pyramid_serve.pia.serving import Decoding

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
        from pyramid_serve.pia.whole import load_pipeline

        return load_pipeline(source, variant=variant, dtype=dtype, device=device)


FAMILY = PIAFamily()
