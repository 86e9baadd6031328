"""The family of noise on a device that stops: the first forward of a process that finds no such file yet never ends."""

import threading
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from pyramid_serve.families import PartSource
from tests.families.noise import Denoise, NoiseFamily, NoiseRequest

HAS_STOPPED = "has_stopped"


class StoppingDenoise(Denoise):
    def __init__(self, folder: Path) -> None:
        self._has_stopped = folder / HAS_STOPPED

    def forward(self, requests: Sequence[NoiseRequest]) -> list[Tensor]:
        if requests[0].seed and not self._has_stopped.exists():  # 0: the warm-up
            self._has_stopped.touch()
            threading.Event().wait()
        return super().forward(requests)


class StoppingFamily(NoiseFamily):
    def load_denoise(self, source: PartSource) -> Denoise:
        return StoppingDenoise(Path(source.source))


FAMILY = StoppingFamily()
