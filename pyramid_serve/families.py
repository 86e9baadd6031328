"""Families: what a kind of model has to answer so that everything else can work with it.

A family is a package beside this file. It is chosen once, by what a checkpoint's own files say, and is asked through
the protocols below; nothing outside of its package names it. One that does not come with this package is named by its
import path, ``"package.module:NAME"``.

Nothing here imports torch. The parts of a model are loaded by a family's three ``load_`` methods alone.
"""

import importlib
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from pydantic import BaseModel

from pyramid_serve.api.limits import RequestLimits
from pyramid_serve.api.offers import OFFER_NAMES, Offer
from pyramid_serve.api.plans import Plan
from pyramid_serve.api.records import PUBLIC_NAMES
from pyramid_serve.api.requests import VideoRequest
from pyramid_serve.checkpoints.naming import there
from pyramid_serve.checkpoints.sources import CheckpointError, Source, resolve

if TYPE_CHECKING:  # torch takes seconds to import, and code that only plans or shows videos does not need it
    from collections.abc import Iterator
    from pathlib import Path

    import torch
    from PIL import Image
    from torch import Tensor

    from pyramid_serve.dtypes import DTypeName

KNOWN = ("pyramid_serve.pyramid_flow.family:FAMILY", "pyramid_serve.pia.family:FAMILY")
"""The families that come with this package."""

_PLAN_OF_VERSION_1 = "pyramid_serve.pyramid_flow.version_1:plan_of"


@dataclass(frozen=True)
class CommandLineOption:
    """How a field of a family is given on the command line. Put into the field's ``Annotated`` type.

    flag: for example ``--steps``; metavar: the value's name in ``--help``; without_value: what the flag alone stands
    for, where it may be given alone.
    """

    flag: str
    metavar: str
    help: str
    without_value: str | None = None


# --- what goes between the parts ------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """A prompt, encoded: named tensors, which only the denoiser of the same family reads."""

    tensors: "Mapping[str, Tensor]"
    truncated_at: int | None = None
    """The character of the prompt at which the text encoder stopped reading. None: it read all of it."""


@dataclass(frozen=True, eq=False)
class UnitState:
    """A unit between two of its steps: what its making can go on from later, elsewhere, with the same bits."""

    num_steps: int
    """Steps that are done."""
    tensors: "Mapping[str, Tensor]"
    """On the CPU, and never changed. Only a family of the same name and ``state_version`` reads them."""


@dataclass(frozen=True, eq=False)
class UnitInput:
    """Everything that one unit is denoised from."""

    plan: Plan
    unit: int
    """Its number; the history has as many units."""
    prompt: "Mapping[str, Tensor]"
    """The full prompt's tensors."""
    negative_prompt: "Mapping[str, Tensor]"
    picture: "Mapping[str, Tensor] | None"
    """What ``DecodePart.encode_picture`` made of the given picture. None: none was given, or it is itself a unit."""
    history: "Sequence[Tensor]"
    """The latents of every unit before, float32, each of the shape that the plan tells."""
    state: UnitState | None = None
    """Where to go on. None: at the start, as always in a family without a ``state_version``."""
    on_step: Callable[[Callable[[], UnitState]], None] | None = None
    """Called after each step with a function that gives the state there, on the thread that drives the steps and before
    they go on. Never called in a family without a ``state_version``."""


class Memory(Protocol):
    """What decoding the next unit of a video needs of those before."""

    @property
    def num_bytes(self) -> int: ...

    def to(self, device: "torch.device | str") -> "Memory": ...


MemoryT = TypeVar("MemoryT", covariant=True)


@dataclass(frozen=True, eq=False)
class Decoded(Generic[MemoryT]):
    """A decoded unit: frames (F, height, width, 3), uint8, on the CPU, and the memory for the next unit, or None."""

    frames: "Tensor"
    memory: MemoryT


class PackRequest(Protocol):
    """One item that a forward computes, of any family."""

    @property
    def num_tokens(self) -> int:
        """Its cost, as a token budget counts it."""
        ...


@dataclass(frozen=True)
class PartSource:
    """Where a part of a model is loaded from, and its dtype, device and options."""

    source: Source
    variant: str | None
    dtype: "torch.dtype"
    device: "torch.device"
    options: Any
    """The family's own options of this part, of the type that the family names."""


class StepRun(NamedTuple):
    """Equal denoising steps in a row, and the tokens of each sequence that one of them computes."""

    num_steps: int
    sequence_tokens: tuple[int, ...]


# --- the parts of a model -------------------------------------------------------------------------------------------


class TextPart(Protocol):
    """Turns prompts into tensors. Not thread-safe."""

    @property
    def dtype(self) -> "torch.dtype": ...

    def encode(self, prompts: Sequence[str]) -> list[Encoded]:
        """Each prompt's tensors on the CPU. Raises ``NonFiniteError`` where they hold NaN or infinity."""
        ...


class DenoisePart(Protocol):
    """Makes units step by step, many units in one forward. Not thread-safe."""

    @property
    def dtype(self) -> "torch.dtype": ...

    def steps(self, given: UnitInput) -> "Generator[Sequence[PackRequest], Sequence[Any], Tensor]":
        """Make a unit: yields the requests of its next step, is sent the responses to them, and returns the latents.

        The latents are float32, on the CPU, and of the plan's shape. Raises ``ValueError`` for an input that does not
        fit, its state among it, and ``NonFiniteError`` where latents hold NaN or infinity.
        """
        ...

    def forward(self, requests: Sequence[Any]) -> Sequence[Any]:
        """The responses to the requests of a pack, in order. Returns when the device has finished."""
        ...

    def packs_with(self, request: Any) -> Hashable:
        """Requests that give the same value may share a forward."""
        ...

    def warm_up(self, size: tuple[int, int] | None) -> None:
        """Run every kind of forward once. size: (width, height) in pixels; None: the smallest that there is."""
        ...


class DecodePart(Protocol):
    """Turns latents into frames, unit by unit, and pictures into tensors. Not thread-safe."""

    @property
    def dtype(self) -> "torch.dtype": ...

    def encode_picture(self, picture: "Image.Image", *, height: int, width: int) -> "dict[str, Tensor]":
        """A picture as named tensors, float32, on the CPU.

        ``latents`` is among them where the picture is a unit of the video. Sizes are those of the video, in pixels; the
        picture is resized and cropped to them. Raises ``InputError`` for a picture that cannot be used.
        """
        ...

    def request(self, latents: "Tensor", memory: Any) -> PackRequest:
        """A unit's latents after what ``memory`` holds (None at the start of a video), as a forward takes them.

        Raises ``ValueError`` for latents of another shape.
        """
        ...

    def forward(self, requests: Sequence[Any]) -> Sequence[Decoded[Memory | None]]:
        """The frames of each request. Raises ``NonFiniteError`` where latents or frames hold NaN or infinity."""
        ...

    def packs_with(self, request: Any) -> Hashable:
        """Requests that give the same value may share a forward."""
        ...

    def warm_up(self, size: tuple[int, int] | None) -> int:
        """Run every kind of forward once; returns the bytes of one video's memory at the model's default size.

        size: (width, height) in pixels; None: the smallest that there is.
        """
        ...


class Pipeline(Protocol):
    """A model in this process."""

    @property
    def description(self) -> str:
        """What it computes in, on which device, and why, for people."""
        ...

    def stream(
        self,
        plan: Plan,
        *,
        picture: "Image.Image | None" = None,
        progress: Callable[[int], None] | None = None,
    ) -> "Iterator[Tensor]":
        """The frames (F, height, width, 3), uint8, of each unit of a video.

        progress: called with the number of a unit after each denoising step of it. Raises ``ValueError`` for a picture
        that does not fit, before any work.
        """
        ...


# --- families -------------------------------------------------------------------------------------------------------


class Capabilities(Protocol):
    """What a model can do; anything that its family knows how to read."""

    @property
    def dtype(self) -> "DTypeName | None":
        """What the model is best computed in on a GPU. None: what suits the device."""
        ...


class Family(Protocol):
    """A kind of model. An implementation holds no state, is pickled by reference, and imports torch only to load."""

    @property
    def name(self) -> str:
        """What records call it: lower case, digits and underscores. It must never change."""
        ...

    @property
    def title(self) -> str:
        """Its name for people."""
        ...

    @property
    def request_fields(self) -> type[BaseModel]:
        """The fields of a request that this family adds, each optional. A ``CommandLineOption`` names their flags."""
        ...

    @property
    def shown_fields(self) -> type[BaseModel]:
        """What ``Plan.settings`` holds. The video object shows these fields."""
        ...

    @property
    def denoise_options(self) -> type[BaseModel]:
        """The options of a denoise part that only this family has."""
        ...

    @property
    def decode_options(self) -> type[BaseModel]:
        """The options of a decode part that only this family has."""
        ...

    @property
    def pipeline_options(self) -> type[BaseModel]:
        """The options of a pipeline in one process. A ``CommandLineOption`` names the flag of each field."""
        ...

    @property
    def decodes_in_order(self) -> bool:
        """Whether decoding a unit needs the memory of those before it."""
        ...

    @property
    def state_version(self) -> str | None:
        """Of the states that its denoise part hands out (see ``UnitState``): it takes up those of the same version.

        None: a unit is always made from its start. That is best where one takes seconds, since states are saved every
        few seconds.
        """
        ...

    def recognises(self, folder: "Path") -> bool:
        """Whether a checkpoint is of this family, by the files that ``resolve`` brings without any part's weights."""
        ...

    def capabilities(self, source: Source, variant: str | None) -> Capabilities:
        """What a model can do. Fetches no weights. Raises ``CheckpointError``."""
        ...

    def offer(self, capabilities: Any, limits: RequestLimits) -> Offer:
        """What the model makes within these limits."""
        ...

    def plan(self, request: VideoRequest, fields: Any, *, model: str, capabilities: Any, limits: RequestLimits) -> Plan:
        """The plan of a request. fields: the request's fields of this family, of the type ``request_fields``.

        Raises ``RequestError`` for what the model cannot make or the limits refuse.
        """
        ...

    def step_runs(self, plan: Plan, unit: int, *, num_text_tokens: int) -> Sequence[StepRun]:
        """The steps that make a unit, for prompts of so many tokens: what its requests to the engine cost."""
        ...

    def load_text(self, source: PartSource) -> TextPart: ...

    def load_denoise(self, source: PartSource) -> DenoisePart: ...

    def load_decode(self, source: PartSource) -> DecodePart: ...

    def load_pipeline(
        self,
        source: Source,
        *,
        variant: str | None,
        dtype: "DTypeName | None",
        device: "torch.device | str",
        options: Any,
    ) -> Pipeline:
        """The whole model in this process. options: of the type ``pipeline_options``."""
        ...


def family_of(source: Source, family: str | None = None) -> Family:
    """The family of a checkpoint: the one at the import path ``family``, or else the one that recognises its files.

    Raises ``ValueError`` for an import path that leads to none, and ``CheckpointError`` (a ``ValueError``) for a
    checkpoint that is not there or that no family recognises.
    """
    if family is not None:
        return imported(family)
    folder = resolve(source)
    for known in known_families():
        if known.recognises(folder):
            return known
    titles = ", ".join(known.title for known in known_families())
    present = [entry.name for entry in folder.iterdir()]
    raise CheckpointError(f"{source}: no checkpoint of a model that is known here ({titles}){there(present)}")


def known_families() -> list[Family]:
    """The families that come with this package."""
    return [imported(path) for path in KNOWN]


def imported(path: str) -> Family:
    """The family at an import path, ``"package.module:NAME"``. Raises ``ValueError`` where there is none."""
    module, _, name = path.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"family={path!r}: cannot be imported: {error}") from None
    if not isinstance(getattr(found, "name", None), str) or not hasattr(found, "plan"):
        raise ValueError(f"family={path!r}: is not a family")
    aliased = [
        name for name, field in found.request_fields.model_fields.items() if field.validation_alias or field.alias
    ]
    if aliased:
        raise ValueError(f"family={path!r}: its request fields {', '.join(aliased)} have aliases, which are not taken")
    own = found.request_fields.model_fields.keys() | found.shown_fields.model_fields.keys()
    clash = own & (VideoRequest.model_fields.keys() | PUBLIC_NAMES | OFFER_NAMES)
    if clash:
        raise ValueError(f"family={path!r}: its fields {', '.join(sorted(clash))} are those of every request or answer")
    family: Family = found
    return family


# --- records of earlier releases ------------------------------------------------------------------------------------


def record_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a stored record in today's layout.

    Version 1, which had no number, held a ``spec`` in place of the ``plan``, and there was one family.
    """
    current = dict(fields)
    if "version" not in current and "spec" in current:
        module, _, name = _PLAN_OF_VERSION_1.partition(":")
        current["plan"] = getattr(importlib.import_module(module), name)(current.pop("spec"))
    return current
