"""The whole model in one process."""

import torch

from pyramid_serve.checkpoints.sources import Source
from pyramid_serve.dtypes import DTypeName
from pyramid_serve.families import PartSource
from pyramid_serve.pia.capabilities import capabilities
from pyramid_serve.pia.family import DenoiseOptions
from pyramid_serve.pia.serving import Decoding, Denoising, TextEncoding
from pyramid_serve.pipeline import PartsPipeline
from pyramid_serve.precision import available_device, choose_dtype, device_name


def load_pipeline(
    source: Source, *, variant: str | None, dtype: DTypeName | None, device: torch.device | str
) -> PartsPipeline:
    """The three parts on one device. dtype: what suits the device unless given. Raises ``CheckpointError``.

    Nothing is compiled, for that takes longer than a video.
    """
    device = available_device(device)
    precision = choose_dtype(device, asked=dtype, preferred=capabilities(source, variant).dtype)
    part = PartSource(source, variant, precision.dtype, device, DenoiseOptions(compiled="none"))
    description = f"{precision.name} on {device_name(device)}: {precision.reason}"
    return PartsPipeline(TextEncoding(part), Denoising(part), Decoding(part), description)
