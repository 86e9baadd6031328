"""What the configurations of all deployments that load a part of the model have in common."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt

from pyramid_serve.api import Computed
from pyramid_serve.checkpoints import capabilities
from pyramid_serve.precision import DTypeName, NonFiniteError, Precision, device_name, dtype_name, vae_dtype

logger = logging.getLogger(__name__)

_NICE = 5


@contextmanager
def reported_if_not_finite() -> Iterator[None]:
    """Let a warm-up go on whose numbers overflow, with an error in the log: each video then fails and says where."""
    try:
        yield
    except NonFiniteError as error:
        logger.error("the model fails its warm-up, so its videos will fail too: %s", error)


class ModelConfig(BaseModel):
    """Which model, and how it is computed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    """A local folder, an fsspec URL or a Hub id."""
    variant: str | None = None
    """For example "768p"; None where the checkpoint has only one."""
    device: str | None = None
    """None: CUDA where the replica has one, else the CPU."""
    dtype: DTypeName | None = None
    """The app's ``model.dtype``. None: what suits the device, see ``precision.suitable_dtype``."""
    num_threads: PositiveInt | None = None
    """Of torch on the CPU. None leaves it to Ray, which gives a replica as many as its ``num_cpus``."""

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @cached_property
    def precision(self) -> Precision:
        return self.precision_on(self.torch_device)

    def precision_on(self, device: torch.device) -> Precision:
        return capabilities(self.source, self.variant).precision_on(device, self.dtype)

    def computed_as(self, part: str) -> Computed:
        """What a replica computes in as this part of the pipeline, for the records of its videos."""
        dtype = vae_dtype(self.torch_dtype) if part == "decoder" else self.torch_dtype
        return Computed(part=part, dtype=dtype_name(dtype), device=device_name(self.torch_device))

    @property
    def torch_dtype(self) -> torch.dtype:
        return self.precision.dtype

    def set_up_torch(self) -> None:
        """Set up torch in this process, and log the dtype and device that are chosen.

        On a CPU computing steps back behind the replicas that answer clients.
        """
        precision = self.precision
        logger.info("%s in %s on %s: %s", self.source, precision.name, device_name(self.torch_device), precision.reason)
        if self.num_threads is not None:
            torch.set_num_threads(self.num_threads)
        if self.torch_device.type == "cpu":
            os.nice(_NICE)
