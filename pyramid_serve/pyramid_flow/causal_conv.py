"""Causal 3-D convolutions whose memory goes in and comes out.

B batch, C channels, T frames, H W height and width.

A convolution that looks two frames back can process a video chunk by chunk, exactly, if it is given the last frames
of the chunk before. Those frames live in a :class:`Carry`, one per call, never on the modules.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

LayerFrames = tuple[Tensor, ...]
"""What one layer keeps: its last frames (1, C, k, H, W) of each of B videos, a tensor of its own for each video."""


Join = Callable[[Tensor, Tensor], Tensor]
"""Puts frames (B, C, k, H, W) in front of others (B, C, T, H, W), of which it may make something else before."""


def concatenate(before: Tensor, x: Tensor) -> Tensor:
    """The plain ``Join``."""
    return torch.cat([before, x], dim=2)


def in_order_of(x: Tensor, out: Tensor) -> Tensor:
    """``out`` (5-D) with its numbers lying in memory in the order of those of ``x`` (5-D): channels last, or not."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last_3d)
    return out.contiguous(memory_format=torch.channels_last_3d if channels_last else torch.contiguous_format)


class Carry:
    """The frames that causal layers hand from one chunk of a video to the next.

    The layers of a network run in a fixed order, so their frames are kept as a flat sequence in that order.
    ``previous`` is None at the first chunk of a video, and the ``memory`` of the last call afterwards. Its frames may
    lie on any device and are moved to the network's layer by layer. New ones are kept on the device ``keep_on``;
    None: on the network's.
    """

    def __init__(self, previous: Sequence[LayerFrames] | None, *, keep_on: torch.device | None = None) -> None:
        self.is_first = previous is None
        self._previous = list(reversed(previous or ()))
        self._memory: list[LayerFrames] = []
        self._keep_on = keep_on

    def prepend(self, x: Tensor, *, num_padding: int, num_kept: int, join: Join = concatenate) -> Tensor:
        """Put what came before in front of ``x`` (B, C, T, H, W) and remember its last ``num_kept`` frames.

        At the first chunk, ``num_padding`` zero frames stand in front. Raises ``ValueError`` where the memory is
        that of another network, size or tiling.
        """
        if self.is_first:
            before = in_order_of(x, x.new_zeros(x.shape[0], x.shape[1], num_padding, *x.shape[3:]))
        elif self._previous:
            videos = [video.to(x.device, non_blocking=x.is_cuda) for video in self._previous.pop()]
            before = videos[0] if len(videos) == 1 else torch.cat(videos)
        else:
            raise ValueError("memory: too short for this network and tiling")
        if before.shape[:2] + before.shape[3:] != x.shape[:2] + x.shape[3:]:
            raise ValueError(f"memory: frames of shape {tuple(before.shape)} do not continue {tuple(x.shape)}")
        joined = join(before, x)
        kept = joined[:, :, joined.shape[2] - num_kept :].split(1)
        self._memory.append(tuple(video.to(self._keep_on or x.device, copy=True) for video in kept))
        return joined

    def memory(self) -> tuple[LayerFrames, ...]:
        """What the next chunk's Carry takes. Raises ``ValueError`` if some of the old memory was not used."""
        if self._previous:
            raise ValueError("memory: too long for this network and tiling")
        return tuple(self._memory)


class Conv3d(nn.Conv3d):
    """torch's convolution, which oneDNN always computes on a CPU.

    For one video of few frames in float32 torch itself uses its general code (``slow_conv3d``: a batch of one with at
    most 20,480 channels times frames times rows), which takes up to six times as long.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or input.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
            return super().forward(input)
        assert not isinstance(self.padding, str)
        out: Tensor = torch.mkldnn_convolution(
            input, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups
        )
        return out


class CausalConv3d(nn.Module):
    """Convolution that sees its own frame and the ones before: (B, C, T, H, W) -> (B, C', T / stride, H', W')."""

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel_size: int = 3, stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        super().__init__()
        spatial = kernel_size // 2
        self.conv = Conv3d(in_channels, out_channels, kernel_size, stride=stride, padding=(0, spatial, spatial))
        self.num_padding = kernel_size - 1
        self.num_kept = kernel_size - stride[0]

    def forward(self, x: Tensor, carry: Carry, join: Join = concatenate) -> Tensor:
        if self.num_padding:
            x = carry.prepend(x, num_padding=self.num_padding, num_kept=self.num_kept, join=join)
        out: Tensor = self.conv(x)
        return out
