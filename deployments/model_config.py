"""What the configurations of all deployments that load a part of the model have in common."""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt

DTypeName = Literal["float32", "bfloat16", "float16"]


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
    """None: bfloat16 on CUDA, else float32."""
    num_threads: PositiveInt | None = None
    """Of torch on the CPU. None leaves it to Ray, which gives a replica as many as its ``num_cpus``."""

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def torch_dtype(self) -> torch.dtype:
        name = self.dtype or ("bfloat16" if self.torch_device.type == "cuda" else "float32")
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    def apply_num_threads(self) -> None:
        if self.num_threads is not None:
            torch.set_num_threads(self.num_threads)
