"""A model in this process as a plain loop over its three parts: encode the prompts, then denoise and decode each unit.

Families that need no more than that use this pipeline.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from pyramid_serve.api.plans import Plan
from pyramid_serve.families import DecodePart, DenoisePart, TextPart, UnitInput


@dataclass(frozen=True)
class PartsPipeline:
    """``families.Pipeline`` of three loaded parts."""

    text: TextPart
    denoise: DenoisePart
    decode: DecodePart
    description: str

    def stream(
        self, plan: Plan, *, picture: Image.Image | None = None, progress: Callable[[int], None] | None = None
    ) -> Iterator[Tensor]:
        """The frames (F, height, width, 3), uint8, of each unit. See ``families.Pipeline``."""
        prompt, negative_prompt = self.text.encode([plan.full_prompt, plan.negative_prompt])
        encoded = None
        if picture is not None:
            encoded = self.decode.encode_picture(picture, height=plan.height, width=plan.width)
        history: list[Tensor] = []
        memory: Any = None
        for unit in range(plan.num_units):
            if plan.unit(unit).is_picture and encoded is not None:
                latents = encoded["latents"]
            else:
                conditioning = encoded if plan.is_conditioned_on_picture else None
                given = UnitInput(plan, unit, prompt.tensors, negative_prompt.tensors, conditioning, history)
                latents = self._denoise(given, progress)
            history.append(latents)
            (decoded,) = self.decode.forward([self.decode.request(latents, memory)])
            memory = decoded.memory
            yield decoded.frames

    def _denoise(self, given: UnitInput, progress: Callable[[int], None] | None) -> Tensor:
        steps: Generator[Sequence[Any], Sequence[Any], Tensor] = self.denoise.steps(given)
        responses: Sequence[Any] | None = None  # what a generator is sent first
        try:
            while True:
                requests = steps.send(responses)  # type: ignore[arg-type]
                responses = self.denoise.forward(requests)
                if progress is not None:
                    progress(given.unit)
        except StopIteration as finished:
            latents: Tensor = finished.value
            return latents
