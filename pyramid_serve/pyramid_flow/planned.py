"""``families.Pipeline`` for Pyramid Flow: makes with ``PyramidFlow`` what a plan says."""

from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch import Tensor

from pyramid_serve.api.plans import Plan
from pyramid_serve.checkpoints.sources import Source
from pyramid_serve.dtypes import DTypeName
from pyramid_serve.precision import device_name
from pyramid_serve.pyramid_flow.autoencoder import Tiling
from pyramid_serve.pyramid_flow.family import PipelineOptions
from pyramid_serve.pyramid_flow.pipeline import Progress, PyramidFlow, VideoInput, VideoSettings
from pyramid_serve.pyramid_flow.planning import settings_of


class PlannedPipeline:
    """A model in this process that makes the videos of plans."""

    def __init__(
        self,
        source: Source,
        *,
        variant: str | None,
        dtype: DTypeName | None,
        device: torch.device | str,
        options: PipelineOptions,
    ) -> None:
        """See :meth:`PyramidFlow.from_pretrained`."""
        self._tiling = None if options.tiling is None else Tiling(options.tiling)
        self._pipeline = PyramidFlow.from_pretrained(
            source,
            variant=variant,
            dtype=dtype,
            device=device,
            attention=options.attention,
            compiled=options.compiled,
            batch_invariant=options.batch_invariant,
            offload=options.offload,
        )

    @property
    def description(self) -> str:
        precision = self._pipeline.precision
        return f"{precision.name} on {device_name(self._pipeline.device)}: {precision.reason}"

    def stream(
        self, plan: Plan, *, picture: Image.Image | None = None, progress: Callable[[int], None] | None = None
    ) -> Iterator[Tensor]:
        def tell(at: Progress) -> None:
            if progress is not None:
                progress(at.unit)

        video = VideoInput(plan.prompt, seed=plan.seed, image=picture)
        units = self._pipeline.stream([video], video_settings(plan), tiling=self._tiling, progress=tell)
        return (frames[0] for frames in units)


def video_settings(plan: Plan) -> VideoSettings:
    """The settings for :meth:`PyramidFlow.stream` that a plan contains."""
    return VideoSettings(
        width=plan.width,
        height=plan.height,
        num_latent_frames=plan.num_units,
        sampling=settings_of(plan).sampling,
        prompt_suffix=plan.prompt_suffix,
        negative_prompt=plan.negative_prompt,
    )
