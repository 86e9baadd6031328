"""What the configurations of all deployments that load a part of a model have in common."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from deployments.pools.compute_thread import ComputeThread
from deployments.pools.process_end import end_process_soon
from pyramid_serve.api import Computed
from pyramid_serve.cores import usable_cores
from pyramid_serve.dtypes import DTypeName
from pyramid_serve.errors import NonFiniteError
from pyramid_serve.families import Family, PartSource, family_of
from pyramid_serve.precision import Precision, choose_dtype, device_name, dtype_name

logger = logging.getLogger(__name__)

_NICE = 5
_MAX_TURN_S = 120.0
_MAX_TURN_ON_CPU_S = 600.0
_MAX_AUTO_THREADS = 4


@contextmanager
def reported_if_not_finite() -> Iterator[None]:
    """Let a warm-up go on whose numbers overflow, with an error in the log: each video then fails and says where."""
    try:
        yield
    except NonFiniteError as error:
        logger.error("the model fails its warm-up, so its videos will fail too: %s", error)


def auto_threads() -> int:
    """How many threads a replica computes with on this machine where ``num_threads`` is "auto"."""
    return min(max(usable_cores() - 1, 1), _MAX_AUTO_THREADS)


class ModelConfig(BaseModel):
    """Which model, and how it is computed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    """A local folder, an fsspec URL or a Hub id."""
    variant: str | None = None
    """For example "768p"; None where the checkpoint has only one."""
    family: str | None = None
    """The import path of the model's family. None: the family that recognises the checkpoint's files."""
    device: str | None = None
    """None: CUDA where the replica has one, else the CPU."""
    dtype: DTypeName | None = None
    """The model's ``dtype``. None: what suits the device, see ``precision.suitable_dtype``."""
    num_threads: PositiveInt | Literal["auto"] | None = None
    """Of torch on the CPU. "auto": the cores of the machine less one, which the other pools need, and at most four, for
    more threads than cores wait for each other. None leaves it to Ray: as many as the replica's ``num_cpus``.
    """
    max_turn_s: PositiveFloat | None = None
    """Seconds that one forward or one picture may take before the device counts as hung: then its work is done again by
    another replica, and this one is replaced. Ten times the longest so far is allowed in any case. None: 120 s, and
    600 s on a CPU.
    """
    options: dict[str, Any] = {}
    """What only the model's family knows, see its ``denoise_options`` and ``decode_options``."""

    @cached_property
    def model_family(self) -> Family:
        """Raises ``CheckpointError`` for a checkpoint that is not there or that no family recognises."""
        return family_of(self.source, self.family)

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @cached_property
    def precision(self) -> Precision:
        return self.precision_on(self.torch_device)

    def precision_on(self, device: torch.device) -> Precision:
        """What the model is computed in on a device."""
        preferred = self.model_family.capabilities(self.source, self.variant).dtype
        return choose_dtype(device, asked=self.dtype, preferred=preferred)

    def part_source(self, options: type[BaseModel] | None = None) -> PartSource:
        """Where a part is loaded from. options: of which type the family's own options of this part are.

        Raises ``ValueError`` for options that the family does not have.
        """
        return PartSource(
            source=self.source,
            variant=self.variant,
            dtype=self.precision.dtype,
            device=self.torch_device,
            options=None if options is None else options.model_validate(self.options),
        )

    def computed_as(self, part: str, dtype: torch.dtype) -> Computed:
        """What a replica computes in as this part of the pipeline, for the records of its videos."""
        return Computed(part=part, dtype=dtype_name(dtype), device=device_name(self.torch_device))

    def compute_thread(self, name: str) -> ComputeThread:
        """The thread of a part in this replica, whose process ends when the device fails."""
        default_s = _MAX_TURN_ON_CPU_S if self.torch_device.type == "cpu" else _MAX_TURN_S
        return ComputeThread(name, max_turn_s=self.max_turn_s or default_s, on_failure=end_process_soon)

    def set_up_torch(self) -> None:
        """Set up torch in this process, and log the dtype and device that are chosen.

        A replica that computes on a CPU lowers its priority, so that replicas that answer clients go first.
        """
        precision = self.precision
        logger.info("%s in %s on %s: %s", self.source, precision.name, device_name(self.torch_device), precision.reason)
        if self.num_threads is not None:
            torch.set_num_threads(auto_threads() if self.num_threads == "auto" else self.num_threads)
        if self.torch_device.type == "cpu":
            os.nice(max(_NICE - os.nice(0), 0))  # once, though two parts may share this process
