"""FreeInit's noise: the low frequencies of one tensor and the high ones of another. Source: arXiv 2312.07537, 3.2.

F frames, h w latent size.
"""

from functools import lru_cache

import torch
from torch import Tensor

from pyramid_serve.pia.settings import FreeInit

_NUM_CACHED_FILTERS = 16
_LEAST_FREQUENCY = 1e-6
"""Below it nothing passes: of video that can be made, no frequency beside 0 is as low."""


def mix(low: Tensor, high: Tensor, low_pass: Tensor) -> Tensor:
    """The low frequencies of ``low`` and the high ones of ``high``, both (..., F, h, w), float32."""
    dims = (-3, -2, -1)
    mixed = _frequencies(low) * low_pass + _frequencies(high) * (1 - low_pass)
    result: Tensor = torch.fft.ifftn(torch.fft.ifftshift(mixed, dim=dims), dim=dims).real
    return result


def _frequencies(values: Tensor) -> Tensor:
    dims = (-3, -2, -1)
    shifted: Tensor = torch.fft.fftshift(torch.fft.fftn(values, dim=dims), dim=dims)
    return shifted


def low_pass_filter(settings: FreeInit, shape: tuple[int, int, int]) -> Tensor:
    """What a filter lets through of each frequency of (F, h, w) values: from 0 to 1, float32, on the CPU."""
    return _filter(
        shape,
        settings.method,
        settings.order,
        settings.spatial_stop_frequency,
        settings.temporal_stop_frequency,
    )


@lru_cache(maxsize=_NUM_CACHED_FILTERS)
def _filter(shape: tuple[int, int, int], method: str, order: int, spatial: float, temporal: float) -> Tensor:
    if min(spatial, temporal) < _LEAST_FREQUENCY:
        return torch.zeros(shape)
    frames, rows, columns = (2 * torch.arange(size, dtype=torch.float64) / size - 1 for size in shape)
    frames = frames * (spatial / temporal)
    squared = frames[:, None, None] ** 2 + rows[None, :, None] ** 2 + columns[None, None, :] ** 2
    if method == "butterworth":
        passed = 1 / (1 + (squared / spatial**2) ** order)
    elif method == "gaussian":
        passed = torch.exp(-squared / (2 * spatial**2))
    else:  # ideal; the published code compares the square of the distance with twice the frequency
        passed = (squared <= spatial * 2).double()
    return passed.float()
