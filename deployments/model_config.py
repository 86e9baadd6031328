"""What the configurations of all deployments that load a part of the model have in common."""

import os

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt

from pyramid_serve.checkpoints import DTypeName, capabilities

_NICE = 5


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
    """None: the model's own, see ``Capabilities.dtype``."""
    num_threads: PositiveInt | None = None
    """Of torch on the CPU. None leaves it to Ray, which gives a replica as many as its ``num_cpus``."""

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def torch_dtype(self) -> torch.dtype:
        if self.dtype is None:
            return capabilities(self.source, self.variant).dtype_on(self.torch_device)
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def apply_num_threads(self) -> None:
        """Set up torch in this process. On a CPU computing steps back behind the replicas that answer clients."""
        if self.num_threads is not None:
            torch.set_num_threads(self.num_threads)
        if self.torch_device.type == "cpu":
            os.nice(_NICE)
