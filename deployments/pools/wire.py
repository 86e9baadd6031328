"""What the deployments send each other: plain frozen dataclasses, their tensors as bytes.

Ray moves numpy arrays without a copy and torch tensors slowly, and numpy has no bfloat16; so a tensor goes as uint8
with its dtype and shape. Nothing here imports torch; see ``tensors`` for the way to and from torch's tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy
import numpy.typing

from pyramid_serve.api import Computed, Plan

Bytes = numpy.typing.NDArray[numpy.uint8]
Latents = numpy.typing.NDArray[numpy.float32]


@dataclass(frozen=True, eq=False)
class WireTensor:
    """A tensor as its bytes: ``data`` (num_bytes,) uint8, ``dtype`` as in ``torch.<dtype>``."""

    data: Bytes
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes


def latents_to_wire(latents: Latents) -> WireTensor:
    """Latents, float32, as the wire carries them."""
    flat = numpy.ascontiguousarray(latents).reshape(-1)
    return WireTensor(flat.view(numpy.uint8), "float32", latents.shape)


def latents_from_wire(wire: WireTensor) -> Latents:
    """Latents, float32. Raises ``ValueError`` for any other dtype."""
    if wire.dtype != "float32":
        raise ValueError(f"latents: {wire.dtype}, must be float32")
    return wire.data.view(numpy.float32).reshape(wire.shape)


# --- TextEncoder ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """An encoded prompt: tensors by name, which only the denoiser of the same family reads."""

    tensors: Mapping[str, WireTensor]
    truncated_at: int | None = None
    """The character of the prompt at which the text encoder stopped reading. None: it read all of it."""
    computed: Computed | None = None
    """What the text encoder computed in."""

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())


# --- Denoiser -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class UnitJob:
    """One unit to be denoised, with everything that it depends on.

    history: the latents of every unit before this one, float32; submitted_at: unix seconds at which the video was
    accepted, since the oldest go first; picture: what the decoder made of the given picture, where that is not itself
    a unit; state: the last that an earlier call for the unit handed out.
    """

    video_id: str
    unit: int
    plan: Plan
    prompt: EncodedPrompt
    negative_prompt: EncodedPrompt
    history: tuple[WireTensor, ...]
    submitted_at: float
    picture: Mapping[str, WireTensor] | None = None
    state: bytes | None = None


@dataclass(frozen=True)
class UnitProgress:
    """A unit in work: ``step`` of ``num_steps`` are done. The first one tells that it was taken into a forward.

    state: from where another call could go on; every few seconds there is a new one.
    """

    step: int
    num_steps: int
    state: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class UnitResult:
    """A finished unit: its ``latents``, float32, of the shape that the plan tells.

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
    """One unit to be decoded: its ``latents``, float32, and perhaps those of the units before it.

    submitted_at: unix seconds at which the video was accepted, or its viewer asked for the unit, since the oldest go
    first; earlier: the latents of all units before, for a replica that has no memory of this video at ``unit``; without
    them that replica answers ``MemoryMissing``, though never at unit 0; is_last: no unit follows, so nothing of the
    video is kept.
    """

    video_id: str
    unit: int
    latents: WireTensor
    submitted_at: float
    earlier: tuple[WireTensor, ...] | None = None
    is_last: bool = False


@dataclass(frozen=True, eq=False)
class DecodeResult:
    """The frames of a unit: (F, height, width, 3), uint8.

    started, ended: unix seconds of its forward (and of the rebuilding before it); batch_size: units in that forward;
    rebuilt_units: earlier units decoded again because their memory was gone; keeps_memory: whether the replica has a
    memory of the video now.
    """

    frames: Bytes
    started: float
    ended: float
    replica: str
    computed: Computed
    batch_size: int
    rebuilt_units: int
    keeps_memory: bool


@dataclass(frozen=True)
class MemoryMissing:
    """The replica has no memory of the video at this unit: ask again with ``earlier``."""

    video_id: str
    unit: int
    replica: str
