"""What the deployments send each other: plain frozen dataclasses, their tensors as bytes.

Ray moves numpy arrays without a copy and torch tensors slowly, and numpy has no bfloat16; so a tensor goes as uint8
with its dtype and shape. C = 16 channels, U finished units, H W latent size of a video.
"""

from dataclasses import dataclass

import numpy
import numpy.typing
import torch
from torch import Tensor

from pyramid_serve.api import Computed
from pyramid_serve.pyramid_flow.pack import PromptEmbeds
from pyramid_serve.pyramid_flow.sampler import SamplingSettings
from pyramid_serve.pyramid_flow.shapes import LatentShape

Bytes = numpy.typing.NDArray[numpy.uint8]


@dataclass(frozen=True, eq=False)
class WireTensor:
    """A tensor as its bytes: ``data`` (num_bytes,) uint8, ``dtype`` as in ``torch.<dtype>``."""

    data: Bytes
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes


def to_wire(tensor: Tensor) -> WireTensor:
    """A tensor of any dtype and device, as the wire carries it."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return WireTensor(flat.view(torch.uint8).numpy(), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def from_wire(wire: WireTensor, device: torch.device | str = "cpu") -> Tensor:
    """The tensor, a copy: what Ray hands out is read-only. ``ValueError`` where dtype, shape and bytes do not fit."""
    dtype = getattr(torch, wire.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype={wire.dtype!r}: must be the name of a torch dtype")
    num_bytes = torch.Size(wire.shape).numel() * dtype.itemsize
    if wire.data.dtype != numpy.uint8 or wire.data.nbytes != num_bytes:
        raise ValueError(
            f"data: {wire.data.nbytes} bytes of {wire.data.dtype}, must be {num_bytes} of uint8 for a {wire.dtype} "
            f"tensor of shape {wire.shape}"
        )
    tensor = torch.empty(wire.shape, dtype=dtype)
    numpy.copyto(tensor.reshape(-1).view(torch.uint8).numpy(), wire.data)
    return tensor.to(device)


@dataclass(frozen=True, eq=False)
class WirePromptEmbeds:
    """``PromptEmbeds`` on the wire."""

    prompt_embeds: WireTensor
    pooled_prompt_embeds: WireTensor
    truncated_at: int | None = None
    computed: Computed | None = None
    """What the text encoder computed in."""

    @property
    def num_bytes(self) -> int:
        return self.prompt_embeds.num_bytes + self.pooled_prompt_embeds.num_bytes


def prompt_to_wire(prompt: PromptEmbeds, computed: Computed | None = None) -> WirePromptEmbeds:
    return WirePromptEmbeds(
        to_wire(prompt.prompt_embeds), to_wire(prompt.pooled_prompt_embeds), prompt.truncated_at, computed
    )


def prompt_from_wire(wire: WirePromptEmbeds, device: torch.device | str = "cpu") -> PromptEmbeds:
    return PromptEmbeds(
        from_wire(wire.prompt_embeds, device), from_wire(wire.pooled_prompt_embeds, device), wire.truncated_at
    )


# --- Denoiser -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class UnitJob:
    """One unit to be denoised, with all that it depends on.

    history: (C, U, H, W) float32, so ``unit`` is U; shape: of the whole video; submitted_at: unix seconds at which the
    video came in, for oldest first.
    """

    video_id: str
    unit: int
    prompt: WirePromptEmbeds
    negative_prompt: WirePromptEmbeds
    history: WireTensor
    shape: LatentShape
    sampling: SamplingSettings
    seed: int
    submitted_at: float


@dataclass(frozen=True)
class UnitProgress:
    """A unit in work: ``step`` of ``num_steps`` are done. 0 tells that it was taken into a forward."""

    step: int
    num_steps: int


@dataclass(frozen=True, eq=False)
class UnitResult:
    """A finished unit: ``latents`` (C, 1, H, W) float32.

    started, ended: unix seconds of its first forward's start and its last one's end; mean_slots, mean_tokens: of the
    forwards it was part of, slots and tokens counted over the whole pack.
    """

    latents: WireTensor
    started: float
    ended: float
    replica: str
    computed: Computed
    num_steps: int
    mean_slots: float
    mean_tokens: float


# --- Decoder --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class DecodeJob:
    """One unit to be decoded: ``latents`` (C, 1, H, W), float32, and perhaps those of the units before it.

    earlier: (C, unit, H, W), for a replica that has no memory of this video at ``unit``; without it that replica
    answers ``MemoryMissing``. Never needed at unit 0.
    """

    video_id: str
    unit: int
    latents: WireTensor
    earlier: WireTensor | None = None


@dataclass(frozen=True, eq=False)
class DecodeResult:
    """The frames of a unit: (1 or 8, height, width, 3) uint8.

    started, ended: unix seconds of its forward (and of the rebuilding before it); batch_size: units in that forward;
    rebuilt_units: earlier units decoded again because their memory was gone.
    """

    frames: Bytes
    started: float
    ended: float
    replica: str
    computed: Computed
    batch_size: int
    rebuilt_units: int


@dataclass(frozen=True)
class MemoryMissing:
    """The replica has no memory of the video at this unit: ask again with ``earlier``."""

    video_id: str
    unit: int
    replica: str


# --- all of them ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReplicaStats:
    """What a replica has done since it started, as totals, so two snapshots give what happened between them.

    at: unix seconds of the snapshot; num_slots: units (Denoiser, Decoder) or prompts (TextEncoder), summed over the
    forwards; busy_seconds: of its compute thread; num_present: calls in work or waiting; queue_depth: those waiting;
    num_memories, memory_bytes: decoder memories kept, those in host memory among them.
    """

    replica: str
    at: float
    num_forwards: int
    num_slots: int
    num_tokens: int
    busy_seconds: float
    num_present: int
    queue_depth: int
    num_memories: int = 0
    memory_bytes: int = 0

    @property
    def mean_slots(self) -> float:
        return self.num_slots / self.num_forwards if self.num_forwards else 0.0

    @property
    def mean_tokens(self) -> float:
        return self.num_tokens / self.num_forwards if self.num_forwards else 0.0
